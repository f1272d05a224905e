"""Server-sent events: objects to `data:` frames, with comments while there is nothing to say.

A stream that ends well ends with `data: [DONE]`. One that fails sends an error frame and no [DONE], because
the status has gone out as 200 and clients take a stream that just ends for complete. A client that leaves
is noticed by the source of the events or by the next write; then the source is closed.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from flask import Response, request

from web.client import ClientGone
from web.context import Context
from web.errors import problem_of
from web.json_replies import encodable
from web.pump import SENDER, paced, written

PING = ": ping\n\n"
DONE = "data: [DONE]\n\n"
PING_SECONDS = 1.0

Events = Iterator[dict[str, Any] | None]

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def frame(event: dict[str, Any]) -> str:
    """Return one event as a frame; JSON has no line breaks of its own."""
    return f"data: {encodable(_encode(event))}\n\n"


def frames(events: Events, openai: bool = False) -> Iterator[str]:
    """Give the frames of events. None is a moment without one, and "" one in which there is nothing to say."""
    said = time.monotonic()
    try:
        for event in events:
            if event is not None:
                yield frame(event)
            elif time.monotonic() - said < PING_SECONDS:
                yield ""
                continue
            else:
                yield PING
            said = time.monotonic()
    except ClientGone:
        return
    except Exception as error:
        yield frame(problem_of(error, openai).body(openai))
        return
    yield DONE


def response(body: Iterator[str], close: Callable[[], None]) -> Response:
    """Return a streamed reply of frames. `close` is called when it is over, even if no byte was ever asked for."""
    reply = Response(body, mimetype="text/event-stream")
    reply.headers["Cache-Control"] = "no-cache"
    reply.headers["X-Accel-Buffering"] = "no"  # nginx passes it on at once
    reply.call_on_close(close)
    return reply


def generation(context: Context, events: Events, close: Callable[[], None], openai: bool = False) -> Response:
    """Return the streamed reply of a generation, whose events wait for nothing: the bell tells when to look."""
    said, sender = frames(events, openai), request.environ.get(SENDER)
    body = paced(said, context.engine.bell) if sender is None else written(said, sender, context.pump)
    return response(body, close)
