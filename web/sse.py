"""Server-sent events: objects to `data:` frames, with comments while there is nothing to say.

A stream that ends well ends with `data: [DONE]`. One that fails sends an error frame and no [DONE], because
the status has gone out as 200 and clients take a stream that just ends for complete. A client that leaves
is noticed by the source of the events or by the next write; then the source is closed.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from flask import Response

from web.client import ClientGone
from web.errors import problem_of

PING = ": ping\n\n"
DONE = "data: [DONE]\n\n"
PING_SECONDS = 1.0

Events = Iterator[dict[str, Any] | None]


def frame(event: dict[str, Any]) -> str:
    """Return one event as a frame; JSON has no line breaks of its own."""
    return f"data: {json.dumps(event, ensure_ascii=False, allow_nan=False)}\n\n"


def frames(events: Events, openai: bool = False) -> Iterator[str]:
    """Give the frames of events; None is a moment without one."""
    written = time.monotonic()
    try:
        for event in events:
            now = time.monotonic()
            if event is not None:
                yield frame(event)
            elif now - written >= PING_SECONDS:
                yield PING
            else:
                continue
            written = now
    except ClientGone:
        return
    except Exception as error:
        yield frame(problem_of(error, openai).body(openai))
        return
    yield DONE


def response(events: Events, close: Callable[[], None], openai: bool = False) -> Response:
    """Return a streamed reply. `close` is called when it is over, even if no byte of it was ever asked for."""
    reply = Response(frames(events, openai), mimetype="text/event-stream")
    reply.headers["Cache-Control"] = "no-cache"
    reply.headers["X-Accel-Buffering"] = "no"  # nginx passes it on at once
    reply.call_on_close(close)
    return reply
