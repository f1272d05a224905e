"""JobQueue: the jobs that run or wait, and in which order the waiting ones start.

Higher priority first, and among equals who came first. It holds no files and takes no lock: it belongs to the
JobManager, whose lock guards it, and a restarted server fills it again from the status.json of each run.
"""

from collections.abc import Iterator, Sequence

from training.job import Place, Status


class JobQueue:
    """The active jobs by name: those with the state queued or running."""

    def __init__(self) -> None:
        self._active: dict[str, Status] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._active

    def __iter__(self) -> Iterator[tuple[str, Status]]:
        """Give all names with their states; jobs may leave meanwhile."""
        return iter(tuple(self._active.items()))

    def get(self, name: str) -> Status | None:
        """Return the state of an active job, None for any other."""
        return self._active.get(name)

    def put(self, name: str, status: Status) -> None:
        """Take a job in."""
        self._active[name] = status

    def remove(self, name: str) -> None:
        """Let a job go that is not active any more."""
        self._active.pop(name, None)

    def next_order(self) -> int:
        """Return the place of a job that comes now: behind all others."""
        return 1 + max((status.order for status in self._active.values()), default=0)

    def count(self, state: str) -> int:
        """Return how many jobs have this state."""
        return sum(status.state == state for status in self._active.values())

    def waiting(self) -> Sequence[str]:
        """Return the names of the waiting jobs, the next one first."""
        keys = [(-status.priority, status.order, name) for name, status in self if status.state == "queued"]
        return [name for _, _, name in sorted(keys)]

    def places(self, max_jobs: int) -> dict[str, Place]:
        """Return the place of each waiting job, and why there is one: no reason where it is about to start."""
        running = [name for name, status in self if status.state == "running"]
        reason = f"max_jobs is {max_jobs}; running now: {', '.join(running)}" if len(running) >= max_jobs else None
        return {name: Place(position, reason) for position, name in enumerate(self.waiting(), start=1)}
