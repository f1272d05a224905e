"""The trash: where the folder of a deleted or replaced run goes, so that a mistake is not the end of a checkpoint.

out/.trash/<name>.<time>[.<n>]/ keeps it; no run can have that name, so no listing shows it.
"""

import os
import time
from pathlib import Path

from storage.files import sync_folder
from storage.runs import Run


def move_to_trash(run: Run) -> Path:
    """Move the run's folder to the trash beside it and return where it is now."""
    trash = run.folder.parent / ".trash"
    trash.mkdir(exist_ok=True)
    stamp = time.strftime("%Y%m%dT%H%M%S")
    for n in range(1000):
        target = trash / (f"{run.name}.{stamp}" + (f".{n}" if n else ""))
        if not target.exists():
            os.rename(run.folder, target)
            sync_folder(run.folder.parent)
            return target
    raise FileExistsError(f"{trash.name} has a thousand folders of {run.name} from this second")
