"""StatusWriter: status.json of each job, written at once, or where the disk is full as soon as it takes it.

Until then what is kept here is told of the job: one that has ended must not look as if it still ran. It belongs
to the JobManager, whose lock guards the writing.
"""

import logging
from dataclasses import replace

from storage.errors import StorageError
from storage.runs import Run
from training.job import Status

log = logging.getLogger(__name__)


class StatusWriter:
    """The only writer of status.json, and what it could not write yet."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Run, Status]] = {}

    def __bool__(self) -> bool:
        """Say whether something is still to be written."""
        return bool(self._kept)

    def kept(self, run: Run) -> Status | None:
        """Return what is still to be written of a run, None when its file says it."""
        return self._kept.get(run.name, (run, None))[1]

    def write(self, run: Run, status: Status) -> None:
        """Write a status. Raises OSError and StorageError; then nothing was changed."""
        status.write(run)
        self.forget(run)

    def save(self, run: Run, status: Status) -> None:
        """Write a status, now or, if the disk does not take it, when `save_kept` is called."""
        new = run.name not in self._kept
        self._kept[run.name] = (run, replace(status))
        try:
            self.write(run, status)
        except FileNotFoundError:  # somebody has removed the folder
            self.forget(run)
        except (OSError, StorageError) as error:
            if new:
                log.error("the status of %s could not be written: %s", run.name, error)

    def save_kept(self) -> None:
        """Try again to write what could not be written."""
        for run, status in tuple(self._kept.values()):
            self.save(run, status)

    def forget(self, run: Run) -> None:
        """Let what is kept of a run go."""
        self._kept.pop(run.name, None)
