"""The lock of out/: one server at a time looks after the jobs in it. The system gives it up with the process."""

import contextlib
import fcntl
import os
import stat
import time
from pathlib import Path

from storage.errors import StorageError

PATIENCE = 2.0  # seconds: a worker that was killed a moment ago may not be gone yet


class OutInUse(StorageError):
    """Another server looks after this out/, or nobody can: the message says which."""


class OutLock:
    """An exclusive hold on a folder through the file .lock in it."""

    def __init__(self, out: Path, patience: float = PATIENCE):
        try:
            out.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._descriptor = os.open(out / ".lock", flags, 0o644)
        except OSError as error:
            raise OutInUse(f"{out.name}/ cannot be used for training: {os.strerror(error.errno or 0)}") from None
        try:
            if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
                raise OutInUse(f"{out.name}/.lock is a pipe or a device, not a file; remove it")
            self._acquire(out, time.monotonic() + patience)
        except BaseException:
            os.close(self._descriptor)
            raise
        with contextlib.suppress(OSError):  # a full disk has no room for the number, which only a refusal tells
            os.truncate(self._descriptor, 0)
            os.pwrite(self._descriptor, str(os.getpid()).encode(), 0)

    def _acquire(self, out: Path, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = os.pread(self._descriptor, 20, 0).decode("ascii", "replace").strip()
                    instead = "stop it, or give this one another root"
                    raise OutInUse(f"{out.name}/.lock is held by another server, process {holder}; {instead}") from None
            time.sleep(0.05)

    def release(self) -> None:
        """Let the next server have it."""
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
