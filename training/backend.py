"""Where training runs, as the JobManager sees it: start a process for a run, and know for certain what became of it."""

from collections.abc import Collection
from typing import Protocol

from storage.runs import Run
from training.process import ProcessIdentity


class TrainingBackend(Protocol):
    """Start and end trainers. A trainer outlives the server; its identity is all that is kept of it."""

    def start(self, run: Run, resume: bool, downloads: bool) -> ProcessIdentity:
        """Start train.py with the run's train_config.json, its output going to the run's log. Raises OSError.

        `resume` goes on from the newest checkpoint; `downloads` gives the process what the hub needs.
        """
        ...

    def alive(self, identity: ProcessIdentity) -> bool:
        """Say whether this very process is running."""
        ...

    def exit_code(self, identity: ProcessIdentity) -> int | None:
        """Return, once, the exit code of an ended process, negative for a signal; None if nobody can know it."""
        ...

    def terminate(self, identity: ProcessIdentity) -> None:
        """Ask the process and its children to save and end."""
        ...

    def kill(self, identity: ProcessIdentity) -> None:
        """End the process and its children at once."""
        ...

    def wait(self, identities: Collection[ProcessIdentity], timeout: float | None) -> None:
        """Return when one of the processes has ended, when `wake` was called, or after `timeout` seconds."""
        ...

    def wake(self) -> None:
        """Let `wait` return now, or the next one if nobody waits."""
        ...
