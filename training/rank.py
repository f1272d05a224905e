"""Rank: which of the processes that train one run together this one is, and what binds it to their launcher.

torchrun tells it in the environment, and so does learning/launcher.py, which adds three words of its own: its pid,
a folder for this start, and why they were started again. No torch here, and no talk between the processes: that is
learning/team.py.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

LAUNCHER, FOLDER, NOTE = "TRAIN_LAUNCHER", "TRAIN_FOLDER", "TRAIN_NOTE"
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Rank:
    """The place of a process among those that train together; a single one is number 0 of 1."""

    number: int = 0
    world: int = 1
    local: int = 0  # its number on this machine, which is the GPU it takes
    local_world: int = 1
    launcher: int | None = None  # the pid of our launcher, None under torchrun itself
    folder: Path | None = None  # of our launcher, for this start of the processes
    note: str | None = None  # why the processes were started again

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self:
        """Return the rank that an environment describes."""
        names = {"number": "RANK", "world": "WORLD_SIZE", "local": "LOCAL_RANK", "local_world": "LOCAL_WORLD_SIZE"}
        numbers = {field: int(environ[name]) for field, name in names.items() if name in environ}
        launcher, folder = environ.get(LAUNCHER), environ.get(FOLDER)
        return cls(
            **numbers,
            launcher=None if launcher is None else int(launcher),
            folder=None if folder is None else Path(folder),
            note=environ.get(NOTE) or None,
        )

    def bind(self) -> None:
        """Tie this process to our launcher, if it has one: it dies when the launcher does, and yields as it does.

        A request to stop ends it at once from here on, until the training loop listens.
        Only process 0 prints: the others have the same to say. Raises SystemExit if the launcher is gone.
        """
        if self.launcher is None:
            return
        for number in (signal.SIGTERM, signal.SIGINT):  # until it trains it may wait for the others, deaf to Python
            signal.signal(number, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.launcher:  # it ended before the line above
            raise SystemExit(1)
        with contextlib.suppress(OSError, IndexError):  # a session of its own has a priority of its own
            nice = Path(f"/proc/{self.launcher}/autogroup").read_text().split()[-1]
            Path("/proc/self/autogroup").write_text(nice)
        if self.number > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lasts
