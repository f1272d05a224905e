"""metrics.jsonl and samples.jsonl: one JSON object per line, appended by the trainer and read by anyone.

A row belongs to an iteration (`iter_num`). Readers never trust the last line to be complete, and look at the
end of a large file without reading all of it.
"""

import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from storage.errors import NotFound, NotLoadable
from storage.files import open_to_append, opened, replace_file, write_all

TAIL_BYTES = 2**18  # about a thousand rows
TEXTS = frozenset(("note", "checkpoint_error", "prompt", "text"))  # columns; all others are numbers
HUGE = 1e100
LINE_BYTES = 2**22  # far more than any row, so that damage is not read into memory


def finite(value: Any) -> Any:
    """Return `value`, or None in place of NaN and infinities, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return the columns of a row that are finite numbers, but for its place and its time."""
    plain = {name: value for name, value in row.items() if isinstance(value, int | float) and math.isfinite(value)}
    return {name: value for name, value in plain.items() if name not in ("iter_num", "time")}


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row in one write, so that readers see all of it or nothing. Raises OSError, and leaves no half row."""
    line = json.dumps({name: finite(value) for name, value in row.items()}, allow_nan=False).encode() + b"\n"
    append_whole(path, line)


def append_whole(path: Path, line: bytes) -> None:
    """Append bytes in one write, all of them or none. Raises OSError."""
    descriptor = open_to_append(path)
    try:
        before = os.fstat(descriptor).st_size
        if os.write(descriptor, line) < len(line):
            os.ftruncate(descriptor, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def _is_sound(name: str, value: Any) -> bool:
    """Say whether a column's value has its type, and if a number, a size that can be computed with."""
    if name in TEXTS:
        return value is None or isinstance(value, str)
    return value is None or (isinstance(value, (int, float)) and -HUGE < value < HUGE)


def _sound(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if _is_sound(name, value)}


def _shown(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"  # several runs may be read for one reply


def _rows(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # cut short by a crash, or still being written; or none of ours
            continue
        if isinstance(row, dict) and isinstance(row.get("iter_num"), int) and _is_sound("iter_num", row["iter_num"]):
            yield row


def _lines(f: BinaryIO, path: Path) -> Iterator[bytes]:
    while line := f.readline(LINE_BYTES):
        if len(line) == LINE_BYTES:
            raise NotLoadable(f"{_shown(path)} has a line of {LINE_BYTES // 2**20} MiB or more; rows are far shorter")
        yield line


def read(path: Path, after: int | None = None, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the rows after iteration `after`, the first `limit` of them; no rows if there is no file.

    Raises NotLoadable.
    """
    found: list[dict[str, Any]] = []
    try:
        with opened(path, _shown(path)) as f:
            for row in _rows(_lines(f, path)):
                if limit is not None and len(found) >= limit:
                    break
                if after is None or row["iter_num"] > after:
                    found.append(_sound(row))
    except NotFound:
        return []
    return found


def last(path: Path) -> dict[str, Any]:
    """Return the newest value of every column in the last rows of the file; {} if there are none.

    Raises NotLoadable.
    """
    try:
        with opened(path, _shown(path)) as f:
            size = f.seek(0, os.SEEK_END)
            f.seek(max(0, size - TAIL_BYTES))
            tail = f.read(TAIL_BYTES)
    except NotFound:
        return {}
    newest: dict[str, Any] = {}
    for row in _rows(iter(tail.splitlines())):
        newest.update(row)
    return _sound(newest)


def cut(path: Path, iter_num: int) -> None:
    """Remove the rows after iteration `iter_num`: a resumed run writes them again. Raises StorageError, OSError."""
    if path.exists():
        kept = [json.dumps(row) + "\n" for row in read(path) if row["iter_num"] <= iter_num]
        replace_file(path, lambda f: write_all(f, "".join(kept).encode()))
