"""The pump: writes all streams of generated text, once after each step of the engine.

With a thread awake for each stream, 16 streams switch threads about 60 times a step, which costs more than all they
have to say. So a request's own thread sleeps, and one thread writes for all. To wake that, too, costs one stream more
than its frame: few are written by the engine's thread, while the others compute the next step. Of many, the pump's own
thread may fall behind, which makes pieces larger and holds up no step. A request's thread takes over when its reader is
behind, waits for the reader, and gives the stream back; so a slow reader is in nobody's way.
Knows frames and sockets, nothing of what they say.
"""

import threading
from collections.abc import Iterator
from typing import Protocol

from inference.backend import InferenceBackend
from inference.sequence import Bell

LOOK = 0.1  # seconds after which every stream gets a moment, also when nothing has come: to say so, or to be ended
FEW = 16  # streams: beside emulated steps of 1.5 ms, 128 got 25,000 tokens/s from the pump's thread, and else 16,000
SENDER = "web.sender"  # in the WSGI environment: the Sender of this reply

Frames = Iterator[str]  # gives "" whenever there is nothing to say yet; waits for nothing


class Sender(Protocol):
    """How the body of a reply gets to its client."""

    def begin(self) -> None:
        """Prepare to send; raises OSError as the others do."""
        ...

    def send(self, data: bytes, last: bool) -> bytes:
        """Send as much as goes without waiting, at first after the head, and with the `last` data the body's end.

        Returns the rest, as `send_rest` takes it.
        """
        ...

    def send_rest(self, rest: bytes) -> None:
        """Send a rest, waiting for the client."""
        ...


class Nobody:
    """The sender of what is only looked at."""

    def begin(self) -> None:
        """Begin nothing."""

    def send(self, data: bytes, last: bool) -> bytes:
        """Send nothing, of which nothing is left."""
        return b""

    def send_rest(self, rest: bytes) -> None:
        """Send nothing."""


class Stream:
    """The frames of one reply on their way to one client."""

    def __init__(self, frames: Frames, sender: Sender):
        self._frames, self._sender = frames, sender
        self._rest = b""
        self._over = False
        self._failed: BaseException | None = None
        self._let_go = threading.Event()

    def move(self) -> bool:
        """Send what is there; say whether it is the pump's turn again, after the next step."""
        try:
            text = ""
            for frame in self._frames:
                if not frame:
                    break
                text += frame
            else:
                self._over = True
            if text or self._over:
                self._rest = self._sender.send(text.encode(), self._over)
        except BaseException as error:  # the request's own thread raises it
            self._failed = error
        return not (self._over or self._rest or self._failed)

    def let_go(self) -> None:
        """Give it back to the thread of its request."""
        self._let_go.set()

    def run(self, pump: "Pump") -> None:
        """Have the pump write it all; wait for the reader whenever he is behind. Raises what writing raises."""
        self._sender.begin()
        while not self._over:
            self._let_go.clear()
            pump.take(self)
            self._let_go.wait()
            if self._failed is not None:
                raise self._failed
            if self._rest:
                self._sender.send_rest(self._rest)
                self._rest = b""


class Pump:
    """Moves streams on whenever the engine's bell rings: in a thread of its own, or few of them in the engine's."""

    def __init__(self, engine: InferenceBackend):
        self._engine = engine
        self._streams: list[Stream] = []  # anyone may append; who moves them removes
        self._moving = threading.Lock()  # held by the one who moves them
        self._wake = threading.Event()
        self.running = False

    def start(self) -> None:
        """Begin, in a thread."""
        self.running = True
        self._engine.bell.listen(self._rung)
        threading.Thread(target=self._run, name="pump", daemon=True).start()

    def take(self, stream: Stream) -> None:
        """Take a stream over until `move` says that it is somebody else's turn."""
        self._streams.append(stream)
        self._wake.set()

    def _rung(self, spare: bool) -> None:
        """Move few streams on in spare time, unless the pump's thread is at it; else wake that."""
        if not self._streams:
            return
        if spare and len(self._streams) <= FEW and self._moving.acquire(blocking=False):
            try:
                self._move_all()
            finally:
                self._moving.release()
        else:
            self._wake.set()

    def _move_all(self) -> None:
        for stream in list(self._streams):
            if not stream.move():
                self._streams.remove(stream)
                stream.let_go()

    def _run(self) -> None:
        while True:
            self._wake.wait(LOOK)
            self._wake.clear()
            with self._moving:
                self._move_all()


def written(frames: Frames, sender: Sender, pump: Pump) -> Iterator[str]:
    """Write frames through the pump; gives nothing itself, but ends when all is written."""
    Stream(frames, sender).run(pump)
    yield from ()


def looked_at(moments: Iterator[object], pump: Pump) -> None:
    """Have the pump take in all `moments` as they come, None whenever there is none. Raises what they raise."""
    Stream(("" for moment in moments if moment is None), Nobody()).run(pump)


def paced(frames: Frames, bell: Bell) -> Iterator[str]:
    """Give frames as they come, for whoever writes them: the same without a pump."""
    while True:
        seen = bell.rung
        for frame in frames:
            if not frame:
                break
            yield frame
        else:
            return
        bell.wait(seen, LOOK)
