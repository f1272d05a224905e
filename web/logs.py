"""Log lines: text for people or JSON for programs, one line each, whatever is in the message.

Control characters are escaped, so that nobody can write lines of his own into the log, and a line has a
limit. Prompts and keys are never logged. gunicorn's messages go the same way, without its chatter.
"""

import json
import logging
import sys
import time
from typing import Any

from gunicorn import glogging

MAX_LINE = 4096
CHATTER = {  # what the master says of a worker that has already given its reason
    "Worker (pid:%s) exited with code %s.",
    "Shutting down: %s",
    "Reason: %s",
    "Socket error processing request.",
}


def one_line(text: str) -> str:
    """Return text without control characters, cut to the limit."""
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:MAX_LINE])
    return escaped[:MAX_LINE]


def _message(record: logging.LogRecord) -> str:
    text = record.getMessage()
    if record.exc_info:
        text += " | " + logging.Formatter().formatException(record.exc_info)[-MAX_LINE // 2 :]
    return text


class TextFormatter(logging.Formatter):
    """12:34:56 warning web.errors: what happened."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        return one_line(f"{moment} {record.levelname.lower()} {record.name}: {_message(record)}")


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": round(record.created, 3), "level": record.levelname.lower(), "logger": record.name}
        return json.dumps(fields | {"message": one_line(_message(record))})


def _is_chatter(record: logging.LogRecord) -> bool:
    return record.msg in CHATTER


def configure(log_format: str, log_level: str) -> None:
    """Send all log lines to stderr, in this form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    handler.addFilter(lambda record: not _is_chatter(record))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(log_level.upper())


class GunicornLogger(glogging.Logger):  # type: ignore[misc]
    """gunicorn's logger, whose lines go to ours."""

    def setup(self, cfg: Any) -> None:
        """Leave handlers and form to the root logger."""
        super().setup(cfg)
        self.error_log.handlers[:] = []
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)
