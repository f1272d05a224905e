"""Client: the other end of a request's connection, and whether it is still there.

WSGI never says that a client has gone while a reply is being computed. gunicorn puts the socket into the
environment, and a look at it does: readable with nothing to read is a closed connection. A client that
only closed its sending side counts as gone. Behind a proxy this sees the proxy. Without gunicorn's socket,
as in tests, the client never goes.
"""

import select
import socket
import time
from typing import Any

LOOK = 0.05  # seconds between looks


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


class Client:
    """The other end of a request's connection."""

    def __init__(self, environ: dict[str, Any]):
        self._socket: socket.socket | None = environ.get("gunicorn.socket")
        self._looked = 0.0

    def check(self) -> None:
        """Raise ClientGone when the client has closed its connection."""
        now = time.monotonic()
        if self._socket is None or now - self._looked < LOOK:
            return
        self._looked = now
        try:
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            if poll.poll(0) and self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"":
                raise ClientGone
        except BlockingIOError:
            return
        except OSError:
            raise ClientGone from None
