"""The listing of the runs that the server keeps: what GET /api/models says, read anew only of runs that have changed.

A run is the same as long as the file system says so of its folder and of every file that its description was made
of: inode, size and both times, of which the second (ctime) cannot be set back. What changed a moment before it was
read is read again the next time, because a clock that ticks slowly may give a later change the same time. No weights
are opened. How a run is described is in runs.py.
"""

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from storage.checkpoint_files import BEST, CHECKPOINT, PREVIOUS
from storage.errors import NotFound
from storage.runs import EXPORTED, Workspace, describe_run

ALWAYS = ("train_config.json", CHECKPOINT, f"{CHECKPOINT}.json", BEST, f"{BEST}.json", PREVIOUS)
AT_ONCE = 1000  # runs that one listing takes into memory, so that the first of thousands is hardly slower for it
SETTLED = 2_000_000_000  # nanoseconds after which a time is known not to be that of a later change, too

Described = dict[str, Any] | None  # None: a folder without weights
Stamp = tuple[int, ...]


def _made_of(described: Described) -> Iterator[str]:
    """Give the names of the files in a run's folder that its description was made of, or could have been."""
    yield from ALWAYS
    files = [] if described is None else described["checkpoints"]
    if not files:
        yield from ("config.json", *EXPORTED)
    for file in files:
        name = file["path"].rpartition("/")[2]
        if name not in ALWAYS:  # kept ones
            yield from (name, f"{name}.json")


def _stamp(folder: str, names: Sequence[str]) -> tuple[Stamp, int]:
    """Return what the file system says of a folder and files in it, and when the last of them changed."""
    found, newest = [], 0
    for path in (folder, *[f"{folder}/{name}" for name in names]):
        try:
            s = os.lstat(path)
        except OSError:
            found.append(-1)
            continue
        found += (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        newest = max(newest, s.st_mtime_ns, s.st_ctime_ns)
    return tuple(found), newest


def _describe(name: str, folder: str) -> Described:
    try:
        return describe_run(name, folder)
    except NotFound:
        return None


class RunListing:
    """The descriptions of all runs that have weights. May be used from any thread."""

    def __init__(self, workspace: Workspace):
        """Begin with nothing in memory: a run takes about 5 kB of it."""
        self._workspace = workspace
        self._known: dict[str, tuple[Sequence[str], Stamp, Described]] = {}

    def trained_models(self) -> list[dict[str, Any]]:
        """Return the description of every run that has weights, sorted by name; they are shared, so change none."""
        out, before, now, new = str(self._workspace.out), self._known, {}, 0
        found: list[Described] = []
        for name in self._workspace.names():
            folder, known = f"{out}/{name}", before.get(name)
            if known is not None and _stamp(folder, known[0])[0] == known[1]:
                now[name] = known
                found.append(known[2])
                continue
            began = time.time_ns()
            found.append(_describe(name, folder))
            if new < AT_ONCE:
                new, names = new + 1, tuple(_made_of(found[-1]))
                stamp, newest = _stamp(folder, names)
                if newest < began - SETTLED:
                    now[name] = names, stamp, found[-1]
        self._known = now
        return [described for described in found if described is not None]
