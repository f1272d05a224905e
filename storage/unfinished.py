"""Token files that are being written: a folder that a killed preparation leaves, and that the next one goes on with.

    train.bin, val.bin, …    what is written, and perhaps some bytes more
    documents.bin            the hash of each document, when all have been read once
    progress.json            of which text this is, what that reading told, how many batches and bytes are done

progress.json is replaced after the bytes it counts are on the disk; what lies behind them is cut off. Text comes in
the same batches each time, so the finished files are those of a preparation that was never interrupted. When all is
there, the folder becomes the finished one (token_cache.py). One process at a time works here.
"""

import contextlib
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from storage.documents import Scan
from storage.errors import StorageError
from storage.files import read_bytes, read_json, replace_file, write_all, write_json

PROGRESS, DOCUMENTS = "progress.json", "documents.bin"
MAX_HASHES = 2**30  # bytes; the hashes of more documents are made again
VERSION = 1  # of the batches: of other ones nothing can be used


def saved(folder: Path, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """Return what progress.json of a folder says, None if it is not of tokens `made_of` the same (values of JSON)."""
    try:
        found = read_json(folder / PROGRESS)
        sizes, batches, told = found["sizes"], found["batches"], found["told"]
        right = isinstance(told, dict) and isinstance(batches, int) and all(isinstance(size, int) for size in sizes)
        return found if right and found["made_of"] == made_of | {"version": VERSION} else None
    except (StorageError, KeyError, TypeError):
        return None


class Unfinished:
    """The folder of unfinished token files."""

    def __init__(self, folder: Path, made_of: dict[str, Any]):
        """Go on with what is there if it was `made_of` the same, else begin with an empty folder."""
        self.folder, self._made_of = folder, made_of | {"version": VERSION}
        found = saved(folder, made_of)
        if found is None:
            self.discard()
            folder.mkdir()
            found = {"told": {}, "batches": 0, "sizes": []}
        self._told: dict[str, Any] = found["told"]
        self._sizes: list[int] = found["sizes"]
        self.batches: int = found["batches"]  # that need not be made again

    @property
    def written(self) -> int:
        """Return the bytes that are written and stay."""
        return sum(self._sizes)

    def _save(self) -> None:
        progress = {"made_of": self._made_of, "told": self._told, "batches": self.batches, "sizes": self._sizes}
        write_json(self.folder / PROGRESS, progress)

    def scan(self, read: Callable[[], Scan]) -> Scan:
        """Return what a reading of all documents tells: that of the last time, or `read` now and keep it."""
        with contextlib.suppress(StorageError, KeyError, TypeError, ValueError):
            hashes = array("Q", read_bytes(self.folder / DOCUMENTS, MAX_HASHES))
            if len(hashes) == self._told["documents"]:
                return Scan(hashes, **{name: value for name, value in self._told.items() if name != "documents"})
        found = read()
        replace_file(self.folder / DOCUMENTS, lambda f: write_all(f, found.hashes.tobytes()))
        self._told = {"documents": found.documents, "characters": found.characters, "bytes": found.bytes}
        self._told |= {"longest_line": found.longest_line, "masked": found.masked}
        self.batches, self._sizes = 0, []
        self._save()
        return found

    @contextlib.contextmanager
    def files(self, names: Sequence[str]) -> Iterator[list[BinaryIO]]:
        """Give the files of these names, open to append to what is done."""
        whole = len(self._sizes) == len(names) and all(
            (self.folder / name).exists() and (self.folder / name).stat().st_size >= size
            for name, size in zip(names, self._sizes, strict=True)
        )
        if not whole:
            self.batches, self._sizes = 0, [0] * len(names)
        with contextlib.ExitStack() as stack:
            opened: list[BinaryIO] = [stack.enter_context(open(self.folder / name, "ab")) for name in names]
            for f, size in zip(opened, self._sizes, strict=True):
                f.truncate(size)
            yield opened

    def done(self, files: Sequence[BinaryIO], batches: int) -> None:
        """Make what was appended for so many batches in all durable, and remember that it need not be made again."""
        for f in files:
            f.flush()
            os.fsync(f.fileno())
        self.batches, self._sizes = batches, [f.tell() for f in files]
        self._save()

    def finish(self) -> None:
        """Remove what only the work needed."""
        for name in (PROGRESS, DOCUMENTS):
            (self.folder / name).unlink()

    def discard(self) -> None:
        """Remove the folder with all that was done."""
        shutil.rmtree(self.folder, ignore_errors=True)
