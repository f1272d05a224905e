"""Receiving: how long the sender of a request may take, and how many slow ones may hold a thread.

A request usually is there when its first byte is. One that is not after QUICK seconds is slow: it must be there
after DEADLINE seconds and one more for each SLOWEST bytes, and while it waits for bytes it takes one of a few
places, so that most threads stay free for those who ask properly. Without a place, or out of time, the
connection reads as closed by its sender: a head ends without an answer, a body with 408.
"""

import select
import socket
import threading
import time

from gunicorn.http.unreader import SocketUnreader

QUICK = 0.2
DEADLINE = 10.0
SLOWEST = 16 * 1024  # bytes per second
BEGINNING = 64  # bytes of a request that are remembered: method and the first parts of the path


class Receiver(SocketUnreader):  # type: ignore[misc]
    """gunicorn's reader of a socket, with the deadline and the places of this module. Used by one thread at a time."""

    def __init__(self, sock: socket.socket, places: threading.Semaphore):
        super().__init__(sock)
        self._places = places
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self.begin()

    def begin(self) -> None:
        """Start the clock for a request."""
        self._began, self._received = time.monotonic(), 0
        self._beginning = b""

    @property
    def path(self) -> str:
        """Return how the path of the request begins, also of one that cannot be parsed."""
        target = (self._beginning.split(b" ", 2)[1:2] or [b""])[0]
        return target.partition(b"?")[0].decode("latin-1")

    def read(self, size: int | None = None, read_ahead: int | None = None) -> bytes:
        """Return bytes that have been received; the first ones of a request are remembered."""
        data: bytes = super().read(size, read_ahead)
        self._beginning += data[: BEGINNING - len(self._beginning)]
        return data

    def chunk(self, size_hint: int | None = None) -> bytes:
        """Return the next bytes; b"" at the end, or when there is no more time or place."""
        if not self._wait():
            return b""
        data: bytes = super().chunk(size_hint)
        self._received += len(data)
        return data

    def _wait(self) -> bool:
        spent = time.monotonic() - self._began
        if self._ready(QUICK - spent):
            return True
        if not self._places.acquire(blocking=False):
            return False
        try:
            spent = time.monotonic() - self._began
            left = DEADLINE + self._received / SLOWEST - spent
            return left > 0 and self._ready(left)
        finally:
            self._places.release()

    def _ready(self, seconds: float) -> bool:
        return bool(self._poll.poll(max(0.0, seconds) * 1000))
