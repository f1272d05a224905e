"""The trash: where deleted or replaced folders go, so that a mistake is not the end of a checkpoint or a dataset.

out/.trash/ and data/.trash/ keep them as <name>.<time>[.<n>]; no run or dataset can lie there, so no listing shows
them. What has lain there for a month is removed when a server starts.
"""

import os
import shutil
import time
from pathlib import Path

from storage.errors import NotWritable
from storage.files import sync_folder

TRASH = ".trash"
STAMP = "%Y%m%dT%H%M%S"
KEPT_SECONDS = 30 * 86400.0


def move_to_trash(folder: Path) -> Path:
    """Move a folder to the trash beside it and return where it is now. Raises OSError, and NotWritable for no trash."""
    trash = folder.parent / TRASH
    if trash.is_symlink() or (os.path.lexists(trash) and not trash.is_dir()):
        raise NotWritable(
            f"{trash.parent.name}/{TRASH} is not a folder, so nothing can be moved there; remove it first"
        )
    trash.mkdir(exist_ok=True)
    stamp = time.strftime(STAMP)
    for n in range(1000):
        target = trash / (f"{folder.name}.{stamp}" + (f".{n}" if n else ""))
        if not target.exists():
            os.rename(folder, target)
            sync_folder(folder.parent)
            return target
    raise FileExistsError(f"{TRASH} has a thousand folders of {folder.name} from this second")


def _moved_at(name: str) -> float | None:
    """Return when a folder was moved to the trash, in seconds since the epoch; None for what is none of ours."""
    parts = name.split(".")
    for part in parts[1:][-2:]:
        try:
            return time.mktime(time.strptime(part, STAMP))
        except (ValueError, OverflowError):
            continue
    return None


def empty_trash(parent: Path, kept_seconds: float = KEPT_SECONDS) -> None:
    """Remove for good what was moved to the trash in `parent` more than `kept_seconds` ago."""
    trash = parent / TRASH
    if not trash.is_dir() or trash.is_symlink():
        return
    for entry in list(os.scandir(trash)):
        moved = _moved_at(entry.name)
        if moved is not None and moved < time.time() - kept_seconds and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
