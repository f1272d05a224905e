"""One parser for every JSON body: strict JSON, bounded, and refused with a sentence.

`StrictRequest` is Flask's request with this parser in place of Flask's, so that every route and
flask-openapi3 read bodies through it. Refused: other content types, compressed bodies, what is not
UTF-8, top-level values other than an object, NaN and infinities, long integers, repeated keys, deep
nesting, lone surrogates. An empty body is an empty object. It also knows whether the body has been
read, because an error reply to an unread body must close the connection. Uploads are forms (`expect_upload`).
"""

import json
import math
import re
from typing import IO, Any

from flask import Request, Response, request
from werkzeug.datastructures import Headers
from werkzeug.exceptions import (
    BadRequest,
    ClientDisconnected,
    HTTPException,
    RequestTimeout,
    UnsupportedMediaType,
)
from werkzeug.utils import cached_property
from werkzeug.wsgi import get_input_stream

from web.errors import Refused

DIGITS = 20  # of an integer
LONG = re.compile("[0-9]" * (DIGITS + 1))  # in an integer, or in a text or fraction where it may be
DEPTH = 64  # of nested objects and lists
SIMPLE = {int, float, bool, type(None)}  # what needs no look inside
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded", "")  # the last two without a file
MULTIPART_BYTES = 64 * 1024  # of an upload's body beside the file


class BadField(ValueError):
    """What is wrong with the value of a field."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field[:60]} {message}")
        self.field = field


class _NoNumber:
    """What stands where a number should, until `_check` has found whose value it is."""

    def __init__(self, text: str, rule: str = "a finite number"):
        self.sentence = f"is {text[:30]}; it must be {rule}"


def _float(text: str) -> float | _NoNumber:
    value = float(text)
    return _NoNumber(text) if math.isinf(value) else value


def _int(text: str) -> int | _NoNumber:
    return _NoNumber(text, f"at most {DIGITS} digits long") if len(text.lstrip("-")) > DIGITS else int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {name[:60]!r} occurs twice in one object")
    return value


# Where LONG is nowhere integers need no look: without a call for each, 1000 token ids are read in a third of the time.
_DECODER = json.JSONDecoder(parse_constant=_NoNumber, parse_float=_float, object_pairs_hook=_object)
_LONG_DECODER = json.JSONDecoder(
    parse_constant=_NoNumber, parse_float=_float, parse_int=_int, object_pairs_hook=_object
)


def _check(field: str, value: Any) -> None:
    """Refuse deep nesting, what is no number, and lone surrogates, which no text and no file name can hold."""
    level: list[Any] = [[value]]
    for _ in range(DEPTH):
        below: list[Any] = []
        for item in level:
            parts = [*item, *item.values()] if isinstance(item, dict) else item
            if SIMPLE.issuperset(map(type, parts)):
                continue
            for part in parts:
                if type(part) is str:
                    if not part.isascii() and _has_surrogate(part):
                        raise BadField(field, "has a text with half of a surrogate pair")
                elif type(part) is _NoNumber:
                    raise BadField(field, part.sentence)
                elif type(part) is list or type(part) is dict:
                    below.append(part)
        if not below:
            return
        level = below
    raise BadField(field, f"has objects and lists that are nested more than {DEPTH} deep")


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def parse(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`. Raises ValueError with a sentence, BadField if it concerns a field."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the body is not valid UTF-8 at byte {error.start}") from None
    if not text or text.isspace():
        return {}
    try:
        value = (_LONG_DECODER if LONG.search(text) else _DECODER).decode(text)
    except RecursionError:
        raise ValueError(f"objects and lists are nested more than {DEPTH} deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the body is not valid JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(value, dict):
        raise ValueError("the body must be a JSON object")
    for field, part in value.items():
        if _has_surrogate(field):
            raise ValueError("a field's name has half of a surrogate pair")
        _check(field, part)
    return value


class _Body:
    """A body's stream whose failures are the client's: its socket timed out or closed, or its chunks are damaged."""

    def __init__(self, stream: IO[bytes]):
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        try:
            return self._stream.read(size)
        except (ClientDisconnected, OSError):
            raise RequestTimeout("the body did not come in time") from None
        except HTTPException:  # too large
            raise
        except Exception:  # the server's reader of chunks has error classes of its own
            raise BadRequest("the body's transfer encoding is damaged") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def refuse_compressed(headers: Headers) -> None:
    """Raise 415, or 501 for the transfer alone, for a body that is not sent as it is."""
    codings = {coding.strip().lower() for coding in headers.get("Transfer-Encoding", "").split(",")}
    if not codings <= {"", "identity", "chunked"}:
        raise Refused(501, "of Transfer-Encoding only chunked is supported; send the body as it is")
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("Content-Encoding is not supported; send the body as it is")


class StrictRequest(Request):
    """Flask's request with the strict parser."""

    body_read = False  # the whole body has been taken from the socket
    _json: dict[str, Any] | None = None

    @cached_property
    def stream(self) -> Any:
        """Return the body's stream, limited to max_content_length."""
        return _Body(get_input_stream(self.environ, max_content_length=self.max_content_length))

    @property
    def has_body(self) -> bool:
        """Say whether the client sends a body."""
        return bool(self.content_length) or "Transfer-Encoding" in self.headers

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> dict[str, Any]:
        """Return the body's JSON object, {} for an empty body; raise 400, 408, 413 or 415, whatever the arguments."""
        if self._json is None:
            self._json = self._parsed()
        return self._json

    def _parsed(self) -> dict[str, Any]:
        if not self.has_body:
            return {}
        refuse_compressed(self.headers)
        if self.mimetype != "application/json":
            raise UnsupportedMediaType("Content-Type must be application/json")
        data = self._whole_body()
        try:
            return parse(data)
        except BadField as error:
            raise Refused(400, str(error), param=error.field) from None
        except ValueError as error:
            raise BadRequest(str(error)) from None

    @property
    def fields(self) -> frozenset[str]:
        """Return the names in the JSON body, as far as it has been read."""
        return frozenset(self._json or ())

    def _whole_body(self) -> bytes:
        data = self.get_data(cache=False)
        if len(data) < (self.content_length or 0):  # it ended early, or the server has ended it for being too slow
            raise RequestTimeout("the body did not come in time")
        self.body_read = True
        return data

    def _load_form_data(self) -> None:
        super()._load_form_data()
        self.body_read = True


def expect_upload(most_bytes: int) -> None:
    """Let the current request be a form with a file of at most `most_bytes`. Raises 415."""
    refuse_compressed(request.headers)
    if request.mimetype not in FORMS:
        raise UnsupportedMediaType("Content-Type must be multipart/form-data, with the file as one of its parts")
    request.max_content_length = most_bytes + MULTIPART_BYTES


def close_if_unread(response: Response) -> Response:
    """Have the connection closed after `response` if the request's body was not read: it may never come."""
    close = request.environ.get("web.close_connection")
    if close is not None and request.has_body and not request.body_read:  # type: ignore[attr-defined]
        close()
    return response
