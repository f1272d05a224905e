"""From exception to status and body: the only place that shapes errors.

    Exception                        status  code under /v1
    ├── Refused                      its own, decided by the route
    ├── werkzeug HTTPException       its own (404, 405, 408, 413, 415, 429 …)
    ├── ConfigError                  400
    ├── StorageError
    │   ├── BadName                  400
    │   ├── NotFound                 404     not_found
    │   ├── Exists                   409     (400 under /v1)
    │   ├── TooLarge                 413
    │   ├── NotLoadable              422
    │   ├── NoSpace, NotWritable     409     (400 under /v1)
    │   └── Unreachable              503
    ├── JobBusy                      409     (400 under /v1)
    ├── InferenceError
    │   ├── PromptTooLong            400     context_length_exceeded
    │   ├── NoModel                  409     model_not_found (404 under /v1)
    │   ├── LoadInProgress           409     (503 under /v1)
    │   ├── DoesNotFit               422     model_too_large (400 under /v1)
    │   ├── QueueFull                429     queue_full
    │   ├── OutOfTime                504     request_timeout
    │   └── EngineDown               503     engine_down
    ├── GenerationFailed             500     engine_error
    ├── ClientGone                   499     nobody reads it; it is for the counters
    ├── OSError of a full disk       409     (400 under /v1)
    └── anything else                500     an id, whose details are in the log

Bodies: {"error": "…"}; under /v1 and for /completions {"error": {"message", "type", "param", "code"}}.
Messages of our own exceptions are written for users; those of unknown exceptions never leave the server.
OpenAI's clients retry 409 and everything from 500 up, so /v1 uses 409 for nothing, and what would only
fail again (501, 504) tells them not to.
"""

import errno
import inspect
import logging
import re
import uuid
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_type_hints

from flask import Flask, Response, current_app, jsonify, request
from pydantic import BaseModel, ValidationError
from werkzeug.exceptions import HTTPException

from inference import sequence
from storage import errors as storage
from training.jobs import JobBusy
from training.strict_model import ConfigError, errors_to_sentence
from web.client import ClientGone
from web.completion import GenerationFailed

log = logging.getLogger(__name__)

OPENAI_PATHS = ("/v1/", "/completions/", "/tokenize/", "/detokenize/", "/tokenizer_info/")
TYPES = {403: "permission_error", 429: "rate_limit_error", 501: "not_implemented_error"}
FULL = (errno.ENOSPC, errno.EDQUOT)
FIXED = {
    404: "there is nothing at this path; GET /docs lists every route",
    405: "this path does not have this method",
    413: "the body is larger, or a form of more parts, than the server accepts",
    429: "too many requests",
}


class Refused(Exception):
    """A request that a route or a check refuses; the message is for the user."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.problem = Problem(status, message, code, param, dict(headers or {}))


@dataclass(frozen=True)
class Problem:
    """An error as the client gets it."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def openai(self) -> dict[str, Any]:
        """Return the error object of OpenAI's shape."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}

    def body(self, openai: bool) -> dict[str, Any]:
        """Return the JSON body."""
        return {"error": self.openai() if openai else self.message}


def is_openai(path: str) -> bool:
    """Say whether a path speaks OpenAI's protocol."""
    return f"{path}/".startswith(OPENAI_PATHS)


def _retry(seconds: int = 1) -> dict[str, str]:
    return {"Retry-After": str(seconds)}


def _of_storage(error: storage.StorageError, openai: bool) -> Problem:
    text = str(error)
    if isinstance(error, storage.NotFound):
        return Problem(404, text, "not_found")
    if isinstance(error, storage.NotLoadable):
        return Problem(422, text, "not_loadable")
    if isinstance(error, storage.TooLarge):
        return Problem(413, text)
    if isinstance(error, storage.NoSpace | storage.NotWritable | storage.Exists):
        return Problem(400 if openai else 409, text)
    if isinstance(error, storage.Unreachable):
        return Problem(503, text, "hub_unreachable", headers=_retry(60))
    return Problem(400, text)


def _of_inference(error: sequence.InferenceError, openai: bool) -> Problem:
    text = str(error)
    if isinstance(error, sequence.PromptTooLong):
        return Problem(400, text, "context_length_exceeded", "prompt")
    if isinstance(error, sequence.QueueFull):
        return Problem(429, text, "queue_full", headers=_retry(error.retry_after))
    if isinstance(error, sequence.NoModel):
        return Problem(404, text, "model_not_found", "model") if openai else Problem(409, text)
    if isinstance(error, sequence.LoadInProgress):
        return Problem(503, text, "loading", headers=_retry()) if openai else Problem(409, text)
    if isinstance(error, sequence.DoesNotFit):
        return Problem(400 if openai else 422, text, "model_too_large", "model")
    if isinstance(error, sequence.OutOfTime):
        return Problem(504, text, "request_timeout")
    return Problem(503, text or "the engine is stopping", "engine_down", headers=_retry())


def _of_http(error: HTTPException) -> Problem:
    status = error.code or 500
    headers = {name: value for name, value in error.get_headers() if name in ("Allow", "Retry-After")}
    if status == 429:
        headers = _retry() | headers
    text = FIXED.get(status) or str(error.description or error.name)
    if status == 405 and "Allow" in headers:
        text += f"; it has {headers['Allow']}"
    return Problem(status, text, "rate_limit_exceeded" if status == 429 else None, headers=headers)


def _unexpected(error: Exception) -> Problem:
    error_id = uuid.uuid4().hex[:12]
    log.error("error %s", error_id, exc_info=error)
    return Problem(500, f"internal error {error_id}; the server's log has the details", "internal_error")


def problem_of(error: Exception, openai: bool = False) -> Problem:
    """Return what the client is told about an exception; an unknown one is logged under an id."""
    if isinstance(error, Refused):
        return error.problem
    if isinstance(error, HTTPException):
        return _of_http(error)
    if isinstance(error, storage.StorageError):
        return _of_storage(error, openai)
    if isinstance(error, sequence.InferenceError):
        return _of_inference(error, openai)
    if isinstance(error, ConfigError):
        return Problem(400, str(error))
    if isinstance(error, JobBusy):
        return Problem(400 if openai else 409, str(error))
    if isinstance(error, GenerationFailed):
        return Problem(500, str(error), "engine_error")
    if isinstance(error, ClientGone):
        return Problem(499, "the client has gone")
    if isinstance(error, OSError) and error.errno in FULL:
        log.error("the disk is full: %s", error.filename)
        return Problem(400 if openai else 409, "a disk of the server is full, so this could not be kept")
    return _unexpected(error)


def _named(message: str, fields: Container[str]) -> str | None:
    """Return the field that a message is about: those that are about one begin with its name."""
    found = re.match(r"\w+", message)
    return found[0] if found is not None and found[0] in fields else None


def respond(error: Exception) -> Response:
    """Return the error reply of the current request."""
    openai = is_openai(request.path)
    problem = problem_of(error, openai)
    if openai and problem.status in (400, 422) and problem.param is None:
        problem = replace(problem, param=_named(problem.message, request.fields))  # type: ignore[attr-defined]
    response = jsonify(problem.body(openai))
    response.status_code = problem.status
    response.headers.update(problem.headers)
    if problem.status in (501, 504):
        response.headers["x-should-retry"] = "false"
    return response


def _model_of(error: ValidationError) -> type[BaseModel] | None:
    """Return the class that the current route's body, form or query was checked against."""
    if request.endpoint is None:
        return None
    hints = get_type_hints(inspect.unwrap(current_app.view_functions[request.endpoint]))
    return next((hint for hint in hints.values() if getattr(hint, "__name__", None) == error.title), None)


def refuse_invalid(error: ValidationError) -> Response:
    """Raise the 400 of a body that does not fit its class, in one sentence."""
    location, model = error.errors(include_url=False)[0]["loc"], _model_of(error)
    sentence = errors_to_sentence(error, model)
    param = str(location[0]) if location else _named(sentence, {} if model is None else model.model_fields)
    raise Refused(400, sentence, param=param)


def register(app: Flask) -> None:
    """Let this module answer every error of `app`."""
    app.register_error_handler(Exception, respond)
