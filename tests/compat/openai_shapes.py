"""The shapes of OpenAI's published schema: which keys every reply under /v1 must have, of which types. One place.

A shape is a type, None, a set of the only values, a tuple of alternatives, a list of one shape, a dict of keys (one
that ends in "?" may be missing; others may come), or {str: shape} for any keys. `fault` says what is wrong with a
reply; `checked` gives the openai package's client with a transport that looks at every reply, streams to their end.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
from openai import OpenAI

FINISH = {"stop", "length", "content_filter"}
USAGE = {"prompt_tokens": int, "completion_tokens": int, "total_tokens": int}

# ---- completions

TOPS = [(None, {str: float})]
LEGACY_LOGPROBS = {"tokens": [str], "token_logprobs": [(None, float)], "top_logprobs": TOPS, "text_offset": [int]}
CHOICE = {"index": int, "text": str, "logprobs": (None, LEGACY_LOGPROBS), "finish_reason": FINISH}
HEAD = {"id": str, "created": int, "model": str}
COMPLETION = HEAD | {"object": {"text_completion"}, "choices": [CHOICE], "usage": USAGE}
PART = CHOICE | {"finish_reason": (None, FINISH)}
COMPLETION_CHUNK = HEAD | {"object": {"text_completion"}, "choices": [PART], "usage?": (None, USAGE)}

# ---- chat

TOKEN = {"token": str, "logprob": float, "bytes": (None, [int])}
LOGPROBS = (None, {"content": (None, [TOKEN | {"top_logprobs": [TOKEN]}]), "refusal": (None, str)})
MESSAGE = {"role": {"assistant"}, "content": (None, str), "refusal": (None, str)}
CHAT_CHOICE = {"index": int, "message": MESSAGE, "logprobs": LOGPROBS, "finish_reason": FINISH}
CHAT = HEAD | {"object": {"chat.completion"}, "choices": [CHAT_CHOICE], "usage": USAGE}
DELTA = {"role?": {"assistant"}, "content?": (None, str)}
CHAT_PART = {"index": int, "delta": DELTA, "logprobs?": LOGPROBS, "finish_reason": (None, FINISH)}
CHAT_CHUNK = HEAD | {"object": {"chat.completion.chunk"}, "choices": [CHAT_PART], "usage?": (None, USAGE)}

# ---- embeddings and models

EMBEDDING = {"object": {"embedding"}, "index": int, "embedding": ([float], str)}
EMBEDDINGS = {
    "object": {"list"},
    "data": [EMBEDDING],
    "model": str,
    "usage": {"prompt_tokens": int, "total_tokens": int},
}
MODEL = {"id": str, "object": {"model"}, "created": int, "owned_by": str}
MODELS = {"object": {"list"}, "data": [MODEL]}
MODEL_DELETED = {"id": str, "object": {"model"}, "deleted": {True}}

# ---- files

FILE = {
    **{"id": str, "object": {"file"}, "bytes": int, "created_at": int, "filename": str, "purpose": str},
    "status": {"uploaded", "processed", "error"},
    "status_details?": (None, str),
    "expires_at?": (None, int),
}
FILE_DELETED = {"id": str, "object": {"file"}, "deleted": {True}}
PAGE = {"object": {"list"}, "has_more": bool, "first_id": (None, str), "last_id": (None, str)}

# ---- fine-tuning

HYPERPARAMETERS = {"n_epochs?": ({"auto"}, int), "batch_size?": ({"auto"}, int)}
HYPERPARAMETERS |= {"learning_rate_multiplier?": ({"auto"}, float)}
JOB = {
    **{"id": str, "object": {"fine_tuning.job"}, "created_at": int, "finished_at": (None, int), "model": str},
    "error": (None, {"code": str, "message": str, "param": (None, str)}),
    "fine_tuned_model": (None, str),
    "hyperparameters": HYPERPARAMETERS,
    "organization_id": str,
    "result_files": [str],
    "status": {"validating_files", "queued", "running", "succeeded", "failed", "cancelled", "paused"},
    "trained_tokens": (None, int),
    "training_file": str,
    "validation_file": (None, str),
    "seed": int,
    "estimated_finish?": (None, int),
    "integrations?": (None, list),
    "metadata?": (None, {str: str}),
    "method?": {"type": {"supervised"}, "supervised": {"hyperparameters": HYPERPARAMETERS}},
}
EVENT = {
    **{"id": str, "object": {"fine_tuning.job.event"}, "created_at": int, "level": {"info", "warn", "error"}},
    **{"message": str, "type?": {"message", "metrics"}, "data?": dict},
}
CHECKPOINT = {
    **{"id": str, "object": {"fine_tuning.job.checkpoint"}, "created_at": int, "step_number": int},
    **{"fine_tuned_model_checkpoint": str, "fine_tuning_job_id": str, "metrics": {str: float}},
}

ERROR = {"error": {"message": str, "type": str, "param": (None, str), "code": (None, str)}}

# ---- which route answers with what: method, path, shape; chunks of streams beside

BYTES = object()  # a reply that is no JSON
JOBS = "/v1/fine_tuning/jobs"
ROUTES: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/v1/completions", COMPLETION),
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/embeddings", EMBEDDINGS),
    ("GET", "/v1/models", MODELS),
    ("GET", "/v1/models/.+", MODEL),
    ("DELETE", "/v1/models/.+", MODEL_DELETED),
    ("POST", "/v1/files", FILE),
    ("GET", "/v1/files", PAGE | {"data": [FILE]}),
    ("GET", "/v1/files/[^/]+", FILE),
    ("DELETE", "/v1/files/[^/]+", FILE_DELETED),
    ("GET", "/v1/files/[^/]+/content", BYTES),
    ("POST", JOBS, JOB),
    ("GET", JOBS, PAGE | {"data": [JOB]}),
    ("GET", f"{JOBS}/[^/]+", JOB),
    ("POST", f"{JOBS}/[^/]+/(cancel|pause|resume)", JOB),
    ("GET", f"{JOBS}/[^/]+/events", PAGE | {"data": [EVENT]}),
    ("GET", f"{JOBS}/[^/]+/checkpoints", PAGE | {"data": [CHECKPOINT]}),
)
CHUNKS = {"/v1/completions": COMPLETION_CHUNK, "/v1/chat/completions": CHAT_CHUNK}
SAME_IN_ALL = ("id", "object", "created", "model")  # of the chunks of a stream


# ---- comparing


def _object_fault(value: dict, shape: dict, where: str) -> str | None:
    if set(shape) == {str}:
        return next((found for key in value if (found := mismatch(value[key], shape[str], f"{where}.{key}"))), None)
    for name, wanted in shape.items():
        key = name.removesuffix("?")
        if key in value:
            if (found := mismatch(value[key], wanted, f"{where}.{key}")) is not None:
                return found
        elif key == name:
            return f"{where} lacks {key}"
    return None


def mismatch(value: Any, shape: Any, where: str = "reply") -> str | None:
    """Return how a value differs from a shape, or None."""
    if isinstance(shape, tuple):
        found = [mismatch(value, one, where) for one in shape]
        return None if None in found else found[-1]
    if isinstance(shape, dict) and isinstance(value, dict):
        return _object_fault(value, shape, where)
    if isinstance(shape, list) and isinstance(value, list):
        return next((found for i, v in enumerate(value) if (found := mismatch(v, shape[0], f"{where}[{i}]"))), None)
    if isinstance(shape, set):
        fits = any(value == one and type(value) is type(one) for one in shape)
    elif isinstance(shape, type):
        fits = type(value) is shape or (shape is float and type(value) is int)
    else:
        fits = shape is None and value is None
    return None if fits else f"{where} is {value!r:.80}"


def _strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def stream_fault(text: str, shape: Any) -> str | None:
    """Return what is wrong with a stream: each frame, and that they are one reply that ends as it should."""
    frames = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    *given, last = frames or [""]
    if last != "[DONE]":
        return mismatch(_strict(last), ERROR, "last frame") if last else "the stream is empty"
    chunks, ended = [_strict(frame) for frame in given], []
    for i, chunk in enumerate(chunks):
        if (found := mismatch(chunk, shape, f"chunk {i}")) is not None:
            return found
        if not chunk["choices"] and (i < len(chunks) - 1 or not chunk.get("usage")):
            return f"chunk {i} has no choice, and is not the one that tells the usage"
        ended += [choice["index"] for choice in chunk["choices"] if choice["finish_reason"] is not None]
    if sorted(ended) != list(range(len(ended))) or not ended:
        return f"the choices that ended are {ended}; each must end once"
    differing = [name for name in SAME_IN_ALL if len({chunk[name] for chunk in chunks}) > 1]
    return f"the chunks differ in {differing}" if differing else None


def fault(method: str, path: str, status: int, kind: str, body: bytes) -> str | None:
    """Return what is wrong with a reply to `method` `path`, or None. `kind` is its content type."""
    if status >= 400:
        return mismatch(_strict(body.decode()), ERROR)
    shape = next((shape for wanted, way, shape in ROUTES if wanted == method and re.fullmatch(way, path)), None)
    if shape is None:
        return "no shape is known"
    if kind.startswith("text/event-stream"):
        return stream_fault(body.decode(), CHUNKS[path])
    return None if shape is BYTES else mismatch(_strict(body.decode()), shape)


class Checked(httpx.HTTPTransport):
    """Compare every reply with its shape. A stream is read to its end before the client sees its beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.statuses: list[int] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        reply = super().handle_request(request)
        try:
            body = reply.read()
        finally:
            reply.close()
        self.statuses.append(reply.status_code)
        kind, path = reply.headers.get("Content-Type", ""), request.url.path
        found = fault(request.method, path, reply.status_code, kind, body)
        if found is not None:
            self.faults.append(f"{request.method} {path}: {found}")
        return httpx.Response(reply.status_code, headers=reply.headers, content=body)


@contextmanager
def checked(url: str, **more: Any) -> Iterator[OpenAI]:
    """Give a client of the server at `url`; in the end every reply that it got must have had its shape."""
    transport = Checked()
    http = httpx.Client(transport=transport)
    with OpenAI(base_url=f"{url}/v1", http_client=http, **({"api_key": "none", "timeout": 30} | more)) as client:
        yield client
    assert transport.faults == []
