"""train.log: what a trainer prints, read in bounded pieces however large it is, and kept from growing for ever."""

import codecs
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from storage.checkpoint_files import regular_file
from storage.errors import NotFound, StorageError
from storage.files import opened

TAIL_BYTES = 64 * 1024
CAP_BYTES, KEPT_BYTES = 50 * 2**20, 2**20


class PatientStream:
    """A text stream on which a write may fail: on a full disk a line is lost, and not the run that prints it."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def patient_output() -> Iterator[None]:
    """Let sys.stdout and sys.stderr bear a full disk inside."""
    out, err = cast(TextIO, PatientStream(sys.stdout)), cast(TextIO, PatientStream(sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


def _read(path: Path, start: int | None, limit: int) -> tuple[bytes, int]:
    """Return up to `limit` bytes from `start`, and where they end; from the beginning if the log was cut since.

    Without `start` they are the last ones. Raises NotLoadable.
    """
    try:
        with opened(path, f"{path.parent.name}/{path.name}") as f:
            size = f.seek(0, os.SEEK_END)
            if start is None:
                start = max(0, size - limit)
            elif start > size:
                start = 0
            f.seek(start)
            data = f.read(limit)
    except NotFound:  # nothing has been printed yet
        return b"", 0
    return data, start + len(data)


def tail(path: Path, limit: int = TAIL_BYTES) -> str:
    """Return the end of the log, at most `limit` bytes of it; "" if there is none. Raises NotLoadable."""
    return _read(path, None, limit)[0].decode("utf-8", "replace")


def last_lines(path: Path, lines: int = 3, limit: int = 4096) -> str:
    """Return the last lines that say something, for a sentence about what went wrong; frames of a traceback do not.

    Raises NotLoadable.
    """
    said = [line for line in tail(path, limit).splitlines() if line.strip() and not line[0].isspace()]
    return "\n".join([line for line in said if not line.startswith("Traceback")][-lines:])


def follow(path: Path, running: Callable[[], bool], interval: float = 0.5) -> Iterator[str | None]:
    """Give the end of the log and then what is added to it, until the job has ended and all is read.

    None stands for an interval in which nothing was added: the moment to see whether the reader is still there.
    Raises NotLoadable.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    position: int | None = None
    while True:
        active = running()  # before the reading, so that the last words of a job are read
        data, position = _read(path, position, TAIL_BYTES)
        if text := decoder.decode(data):
            yield text
        elif not active:
            return
        else:
            yield None
            time.sleep(interval)


def cap(path: Path, limit: int = CAP_BYTES) -> bool:
    """Cut a log that has grown over `limit` to its last megabyte, under its writer's hands; say whether it was cut.

    The writer appends, so it goes on at the new end. What it prints during the cut may be lost. A log that cannot be
    read or written stays as it is: a reader is told, and the job goes on.
    """
    found = regular_file(str(path.parent), path.name)
    if found is None or found.st_size <= limit:
        return False
    with contextlib.suppress(StorageError, OSError):
        data, _ = _read(path, None, KEPT_BYTES)
        with open(path, "r+b") as f:
            f.truncate(0)
            f.write(b"(earlier lines were removed: the log was over its limit)\n" + data)
        return True
    return False
