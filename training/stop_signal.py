"""SIGTERM and SIGINT as a flag: the trainer finishes its iteration, saves and ends with success.

Before the loop, while data is prepared or weights are loaded, there is nothing to save, and the signal ends
the run at once. A second SIGINT always does.
"""

import signal
from types import FrameType
from typing import Self


class Stopped(BaseException):
    """The run was asked to stop before its first iteration."""


class StopSignal:
    """The request to stop, from a person or the server."""

    def __init__(self) -> None:
        self.requested = False
        self.looping = False

    @classmethod
    def installed(cls) -> Self:
        """Return one that receives SIGTERM and SIGINT from here on; only the main thread may call this."""
        made = cls()
        made._listen()
        return made

    def enter_loop(self) -> None:
        """Only take note of a signal from here on; the training loop looks at `requested` itself."""
        self.looping = True
        self._listen()  # a process of several has not listened before

    def _listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._received)

    def _received(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if not self.looping or (again and number == signal.SIGINT):
            raise Stopped
