"""The watchdog: a thread that sees the engine stop moving, and has the server do without it.

An engine that works says so several times a second: its steps are bounded (`scheduler.LONGEST_STEP`), and
models are loaded in another thread. After REFUSE seconds of quiet what waits for the engine is told so
(`stalled`); after REPLACE seconds the stacks of all threads are logged and the process ends, and the master
starts another, which loads the last model again. Quiet counts only while this thread itself gets to run:
a machine that slept or a process that was stopped is no stall. When nothing in this process runs, because
the lock of the interpreter is held for ever, gunicorn's timeout does the same.
"""

import logging
import os
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable

log = logging.getLogger(__name__)

TICK = 0.5  # seconds between looks
LONGEST_TICK = 1.0  # a look that comes later counts as this much
REFUSE = 7.0
REPLACE = 15.0
LAST_WORDS = 2.0  # seconds for the log: whatever hangs may hold its lock
STALL_EXIT = 75  # EX_TEMPFAIL; gunicorn starts a new worker after any code that is not its own for a failed start


class Watchdog:
    """Watch one engine: `stalled` is set while it is quiet, nothing is done once `closing` is set."""

    def __init__(self, heartbeat_age: Callable[[], float], stalled: threading.Event, closing: threading.Event):
        self._heartbeat_age, self._stalled, self._closing = heartbeat_age, stalled, closing
        self.quiet = 0.0  # seconds

    def start(self) -> None:
        """Watch from now on, in a thread."""
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def look(self, elapsed: float) -> bool:
        """Take note of the engine `elapsed` seconds after the last look; say whether it is to be replaced."""
        self.quiet = min(self._heartbeat_age(), self.quiet + min(elapsed, LONGEST_TICK))
        if self.quiet < REFUSE:
            self._stalled.clear()
        elif not self._stalled.is_set():
            log.error("the engine has not moved for %.0f seconds; requests are refused", self.quiet)
            self._stalled.set()
        return self.quiet >= REPLACE

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._closing.wait(TICK):
            now = time.monotonic()
            if self.look(now - looked):
                words = threading.Thread(target=log_stacks, name="last words", daemon=True)
                words.start()
                words.join(LAST_WORDS)
                os._exit(STALL_EXIT)
            looked = now


def log_stacks() -> None:
    """Log what each thread is doing, those that do the same together."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    doing = defaultdict(list)
    for ident, frame in sys._current_frames().items():
        lines = [f"{entry.filename}:{entry.lineno} {entry.name}" for entry in traceback.extract_stack(frame)]
        doing[" < ".join(reversed(lines))].append(names.get(ident, str(ident)))
    log.critical("the engine has stopped; a new worker takes over. What the threads were doing:")
    for stack, threads in doing.items():
        log.critical("%s: %s", ", ".join(sorted(threads)[:3]) + (" …" if len(threads) > 3 else ""), stack)
