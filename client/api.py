"""ApiClient: the server's HTTP API as a class with one method for each call, and its errors as one exception.

    client = ApiClient("http://127.0.0.1:5000")
    for event in client.generate_stream({"prompt": "Once upon a time", "stream": True}): ...

It prints nothing and keeps no state but the address and the key: the server knows everything else.
requests is imported at the first call, so that help and usage errors of the commands come at once.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property, partial, partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

if TYPE_CHECKING:
    import requests

Reply = dict[str, Any]

DEFAULT_URL = "http://127.0.0.1:5000"
ADDRESS = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[^\s/:@?#\[\]]+)(:\d{1,5})?(/[^\s?#]*)?")
CONNECT_SECONDS = 5.0
LONG_SECONDS = 900.0  # loading, generating without a stream, exporting
HINTS = {  # what the server's sentence means on this command line
    401: " (the key goes into --api_key or LM_SERVER_API_KEY)",
    501: " (here with `generate`)",
}
# Control characters, and the marks that turn the direction of text round: a server's text must not drive a terminal.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """Make control characters visible, all but newline and tab: an escape becomes `\\x1b`."""
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


class ApiError(click.ClickException):
    """One line on what went wrong. `away`: the server may be back later, so asking again makes sense.

    The exit code is 1 when the server refused or failed, 3 when it cannot be reached.
    """

    def __init__(self, message: str, exit_code: int = 1, away: bool = False):
        super().__init__(clean(message))
        self.exit_code = exit_code  # type: ignore[misc]  # as the commands of click do
        self.away = away


def json_object(text: str | bytes, origin: str) -> Reply:
    """Parse what the server sent. Raises ApiError, which names the origin, when it is no JSON object."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    raise ApiError(f"{origin} is not a JSON object; is that this project's server?")


def complaint(error: Any) -> str:
    """Return the sentence of an error, which under /v1 is an object."""
    return str(error["message"] if isinstance(error, dict) else error)


def event_data(blocks: Iterable[bytes]) -> Iterator[str]:
    """Yield the data of each server-sent event: its data lines joined; comments and other fields are dropped."""
    rest, data = b"", []
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in (raw.rstrip(b"\r").decode("utf-8", "replace") for raw in lines):
            if line.startswith("data:"):
                data.append(line[5:].removeprefix(" "))
            elif not line and data:
                yield "\n".join(data)
                data = []


class FileForm:
    """A multipart body with one file, read from the disk while it is sent: any size, its length known before."""

    def __init__(self, path: Path, fields: dict[str, str]):
        mark = os.urandom(16).hex()
        part = f"--{mark}\r\nContent-Disposition: form-data; name="
        texts = "".join(f'{part}"{name}"\r\n\r\n{value}\r\n' for name, value in fields.items())
        file = f'{part}"file"; filename="{quote(path.name)}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        self.path = path
        self.head = (texts + file).encode("utf-8", "surrogateescape")
        self.tail = f"\r\n--{mark}--\r\n".encode()
        self.headers = {"Content-Type": f"multipart/form-data; boundary={mark}"}

    def __len__(self) -> int:
        return len(self.head) + self.path.stat().st_size + len(self.tail)

    def __iter__(self) -> Iterator[bytes]:
        yield self.head
        with self.path.open("rb") as file:
            yield from iter(partial(file.read, 1 << 20), b"")
        yield self.tail


class ApiClient:
    """The server's HTTP API. Every call returns the reply's JSON object or raises ApiError."""

    def __init__(self, url: str = DEFAULT_URL, api_key: str | None = None):
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        if ADDRESS.fullmatch(self.url) is None:
            raise click.UsageError(f"--url is {url!r}; give it as http://HOST:PORT")
        if api_key is not None and not api_key.isprintable():
            raise click.UsageError("--api_key holds a line end or another control character")
        self.api_key = api_key

    @cached_property
    def session(self) -> "requests.Session":
        """Return the connection pool; neither a proxy nor ~/.netrc comes between us and the server that was named."""
        import requests

        session = requests.Session()
        session.trust_env = False
        if self.api_key is not None:
            session.headers["Authorization"] = f"Bearer {self.api_key}".encode()
        return session

    def send(self, method: str, path: str, seconds: float = 60, **more: Any) -> "requests.Response":
        """Return the response of a request that succeeded; `seconds` bounds the wait for each piece of it."""
        import requests

        more |= {"timeout": (CONNECT_SECONDS, seconds), "allow_redirects": False}
        try:
            response = self.session.request(method, self.url + path, **more)
        except requests.exceptions.SSLError as error:
            why = "its certificate is not trusted, or it speaks http://, as this project's server does by itself"
            raise ApiError(f"no https with {self.url}: {why}", exit_code=3) from error
        except requests.RequestException as error:
            if hasattr(next(iter(error.args), None), "reason"):  # urllib3 gave up before there was a connection
                start = "start one with `python api_server.py` or `make run`, or name another with --url"
                raise ApiError(f"no server answers at {self.url}: {start}", exit_code=3, away=True) from error
            if isinstance(error, requests.Timeout):
                raise ApiError(f"the server at {self.url} sent nothing for {seconds:g} s", away=True) from error
            raise ApiError(f"the server at {self.url} broke off before its answer was complete", away=True) from error
        if not 200 <= response.status_code < 300:
            raise self.refusal(response, path)
        return response

    def refusal(self, response: "requests.Response", path: str) -> ApiError:
        """Turn a reply with another status than 2xx into its one line."""
        import requests

        status = response.status_code
        try:
            message = complaint(json_object(response.content, "the error")["error"])
        except (ApiError, KeyError, requests.RequestException):
            message = f"{self.url}{path} answers {status} {response.reason}; is that this project's server?"
        if status == 404 and self.url.endswith("/v1"):
            message += " (give --url without /v1)"
        return ApiError(message + HINTS.get(status, ""), away=status in (502, 503, 504))

    def call(self, method: str, path: str, body: Reply | None = None, **more: Any) -> Reply:
        """Send JSON and return the JSON object of the reply."""
        response = self.send(method, path, json=body, **more)
        return json_object(response.content, f"the answer of {self.url}{path}")

    def events(self, method: str, path: str, body: Reply | None = None, **more: Any) -> Iterator[Reply]:
        """Yield each event of a stream until [DONE]. Leaving the iterator closes the connection."""
        import requests

        with self.send(method, path, json=body, stream=True, **more) as response:
            # Without chunks only single bytes come as they are sent; larger reads would wait until they are full.
            blocks = response.iter_content(None if response.raw.chunked else 1)
            with contextlib.suppress(requests.RequestException):  # cut short, as is said below
                for data in event_data(blocks):
                    if data == "[DONE]":
                        return
                    event = json_object(data, f"an event of {self.url}{path}")
                    if "error" in event:
                        raise ApiError(complaint(event["error"]))
                    yield event
        raise ApiError("the stream was cut: the connection ended before the server said that it was done", away=True)

    def on_job(self, method: str, action: str, name: str, body: Reply | None = None, **more: Any) -> Reply:
        """Call /api/jobs/<name> with an action after it."""
        return self.call(method, f"/api/jobs/{quote(name, safe='')}{action}", body, **more)

    def metrics(self, name: str, after: int | None = None) -> list[Reply]:
        """Return a job's rows of metrics with a larger iteration than `after`."""
        rows: list[Reply] = self.on_job("GET", "/metrics", name, params={"after": after})["metrics"]
        return rows

    def samples(self, name: str) -> list[Reply]:
        """Return a job's text samples, the first one first."""
        rows: list[Reply] = self.on_job("GET", "/samples", name)["samples"]
        return rows

    def picture(self, name: str, others: tuple[str, ...] = (), kind: str = "svg") -> bytes:
        """Return the losses of a job, and of others beside it, as a picture of a kind: svg or png."""
        path = f"/api/jobs/{quote(name, safe='')}/plot.{kind}"
        return self.send("GET", path, params={"compare": ",".join(others) or None}).content

    def log_events(self, name: str) -> Iterator[Reply]:
        """Yield the events of a job's log, the tail first, until the job ends."""
        return self.events("GET", f"/api/jobs/{quote(name, safe='')}/log?follow=1")

    def delete_dataset(self, name: str) -> Reply:
        """Delete a dataset."""
        return self.call("DELETE", f"/api/datasets/{quote(name, safe='')}")

    def upload(self, path: Path, name: str, encoding: str | None = None) -> Reply:
        """Send a text or JSONL file, UTF-8 unless an encoding is given, as the dataset `name`."""
        form = FileForm(path, {"name": name} if encoding is None else {"name": name, "encoding": encoding})
        return self.call("POST", "/api/datasets", data=form, headers=form.headers, seconds=LONG_SECONDS)

    status = partialmethod(call, "GET", "/api/status")
    models = partialmethod(call, "GET", "/api/models")
    sizes = partialmethod(call, "GET", "/v1/models")
    load_model = partialmethod(call, "POST", "/api/load_model", seconds=LONG_SECONDS)
    unload_model = partialmethod(call, "POST", "/api/unload_model", seconds=LONG_SECONDS)
    generate = partialmethod(call, "POST", "/api/generate", seconds=LONG_SECONDS)
    generate_stream = partialmethod(events, "POST", "/api/generate")
    chat = partialmethod(call, "POST", "/v1/chat/completions", seconds=LONG_SECONDS)
    chat_stream = partialmethod(events, "POST", "/v1/chat/completions")
    train = partialmethod(call, "POST", "/api/train")
    dry_run = partialmethod(call, "POST", "/api/train", seconds=LONG_SECONDS)
    jobs = partialmethod(call, "GET", "/api/jobs")
    job = partialmethod(on_job, "GET", "")
    log = partialmethod(on_job, "GET", "/log")
    stop = partialmethod(on_job, "POST", "/stop")
    resume = partialmethod(on_job, "POST", "/resume")
    prioritize = partialmethod(on_job, "POST", "/priority")
    delete_job = partialmethod(on_job, "DELETE", "")
    datasets = partialmethod(call, "GET", "/api/datasets")
    export = partialmethod(call, "POST", "/api/export", seconds=LONG_SECONDS)
