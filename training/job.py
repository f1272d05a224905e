"""Job: a run as the server orchestrates it, read from its folder whenever somebody asks.

    status.json   the server's: state, identity of the trainer, times
    result.json   the trainer's: how it ended
    metrics.jsonl the trainer's: how far it is

A run that somebody trained by hand has no status.json and is a job all the same.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from storage import checkpoint_files
from storage.checkpoint_files import CHECKPOINT, PREVIOUS, regular_file
from storage.errors import NotLoadable
from storage.files import write_json
from storage.runs import Run
from training import log as job_log
from training import metrics
from training.process import TRAINER, ProcessIdentity, is_alive

ACTIVE = ("queued", "running")
ENDED = ("succeeded", "failed", "stopped", "lost")
NUMBER = (int, float)
STATUS: dict[str, Any] = {"state": str, "error": str, "identity": dict}  # of which type each entry is
STATUS |= dict.fromkeys(("created", "started", "finished"), NUMBER)
STATUS |= dict.fromkeys(("resume", "stopping", "killed", "had_succeeded"), bool)
STATUS |= dict.fromkeys(("exit_code", "order", "priority", "memory_kills"), int)
RESULT: dict[str, Any] = {"state": str, "error": str, "note": str}
RESULT |= {"iter_num": int, "exit_code": int, "finished": NUMBER}


class JobBusy(Exception):
    """The job's state does not allow this now (HTTP 409)."""


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a run, {} if there is none that can be read."""
    return checkpoint_files.read_object(str(path))[0]


def typed(found: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of an object that have the type which `kinds` says: others are as good as missing."""
    return {name: value for name, value in found.items() if isinstance(value, kinds.get(name, ()))}


def result_of(run: Run) -> dict[str, Any]:
    """Return how a run ended, as its trainer says; {} if it says nothing."""
    return typed(read_object(run.result), RESULT)


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except OSError as e:
        return not isinstance(e, FileNotFoundError | NotADirectoryError)
    return True


def is_job(run: Run) -> bool:
    """Say whether a run is a job; one of whose files the disk says nothing is one, to be listed as damaged."""
    return _is_there(run.status) or _is_there(run.config)


def trainer_of(run: Run) -> ProcessIdentity | None:
    """Return the living process that holds the run's folder, whoever started it."""
    identity = ProcessIdentity.from_json(read_object(run.folder / TRAINER))
    return identity if identity is not None and is_alive(identity) else None


def ranks_of(run: Run) -> list[int]:
    """Return the pids of the processes that train a run together, by rank; [] for a single one."""
    pids = read_object(run.folder / TRAINER).get("ranks")
    if not isinstance(pids, list) or len(pids) < 2:
        return []
    return [pid for pid in pids if type(pid) is int]


@dataclass
class Status:
    """What the server knows of a job; written whole, and only by the server."""

    state: str
    created: float  # seconds since the epoch, as all times
    started: float | None = None
    finished: float | None = None
    error: str | None = None
    exit_code: int | None = None
    identity: ProcessIdentity | None = None
    resume: bool = False  # whether the trainer goes on from a checkpoint
    order: int = 0  # when it came to the queue: lower is earlier
    priority: int = 0  # higher goes first, whenever it came
    stopping: bool = False  # somebody has asked for its end
    killed: bool = False  # and it did not come in time
    had_succeeded: bool = False  # before it was resumed: its result is still there, whatever becomes of the rest
    memory_kills: int = 0  # how often the system had ended a process for memory when this one started

    def write(self, run: Run) -> None:
        """Replace the run's status.json."""
        identity = None if self.identity is None else self.identity.to_json()
        write_json(run.status, self.__dict__ | {"identity": identity})

    @classmethod
    def read(cls, run: Run) -> "Status | None":
        """Return the run's status, None if the server never had to do with it."""
        found = typed(read_object(run.status), STATUS)
        if found.get("state") not in (*ACTIVE, *ENDED) or "created" not in found:
            return None
        return cls(**found | {"identity": ProcessIdentity.from_json(found.get("identity"))})


def _status_of_foreign(run: Run) -> Status:
    """Return the state of a run that was trained by hand, from what its trainer left."""
    result, config = result_of(run), regular_file(str(run.folder), run.config.name)
    created = 0.0 if config is None else config.st_mtime
    trainer = trainer_of(run)
    if trainer is not None:
        return Status("running", created, started=created, identity=trainer)
    if result.get("state") not in ENDED:
        return Status("lost", created, error="it ended without saying how")
    return Status(
        result["state"], created, created, result.get("finished"), result.get("error"), result.get("exit_code")
    )


class Place(NamedTuple):
    """Where a waiting job stands in the queue, and why it waits."""

    position: int | None = None  # counted from 1
    reason: str | None = None


class Job:
    """One job as its run's folder shows it now, at its place in the queue if it waits.

    `kept` stands for a status.json that the disk has not taken yet. A file that cannot be read does not hide the
    job: `damaged` says what is wrong with the first such file.
    """

    def __init__(self, run: Run, place: Place | None = None, kept: Status | None = None) -> None:
        self.run, self.place = run, place or Place()
        self.damaged: str | None = None
        status = kept or Status.read(run)
        if status is None:
            self._read(run.status)  # missing, or damaged
        self.status = status or _status_of_foreign(run)

    def _read(self, path: Path) -> dict[str, Any]:
        found, problem = checkpoint_files.read_object(str(path))
        self.damaged = self.damaged or problem
        return found

    def _told(self, read: Callable[[Path], Any], path: Path) -> Any:
        """Return what `read` finds in a file, None if it is damaged."""
        try:
            return read(path)
        except NotLoadable as e:
            self.damaged = self.damaged or str(e)
            return None

    @property
    def name(self) -> str:
        """Return the run's name."""
        return self.run.name

    @property
    def state(self) -> str:
        """Return the state at the time this job was read."""
        return self.status.state

    @property
    def has_result(self) -> bool:
        """Say whether the job has come to its end, now or before it was resumed: its model is one to be named."""
        return self.status.had_succeeded or self.state == "succeeded"

    def resumed(self, keeps_result: bool) -> Status:
        """Return the status of this ended job when it waits to go on, from its checkpoint if there is one."""
        resume = any(regular_file(str(self.run.folder), name) for name in (CHECKPOINT, PREVIOUS))
        had_succeeded, priority = self.has_result and keeps_result, self.status.priority
        return Status("queued", self.status.created, resume=resume, priority=priority, had_succeeded=had_succeeded)

    def sample(self) -> dict[str, Any] | None:
        """Return the latest text sample: iter_num, prompt and text; None before there is one."""
        return self._told(metrics.last, self.run.samples) or None

    def describe(self) -> dict[str, Any]:
        """Return what GET /api/jobs/<name> says; reads small files and the end of the metrics."""
        status, config = self.status, self._read(self.run.config)
        row = self._told(metrics.last, self.run.metrics) or {}
        result = typed(self._read(self.run.result), RESULT) if status.state in ENDED else {}
        max_iters = config.get("max_iters")
        iter_num = result.get("iter_num") or row.get("iter_num") or 0
        running = status.state == "running"
        said = self._told(job_log.last_lines, self.run.log) if running else None
        return {
            "name": self.run.name,
            "state": status.state,
            "iteration": iter_num,  # in a plain word, for whoever does not know nanoGPT's
            "iter_num": iter_num,
            "max_iters": max_iters,
            "loss": row.get("loss"),
            "train_loss": row.get("train_loss"),
            "val_loss": row.get("val_loss"),
            "val_bits_per_byte": row.get("val_bits_per_byte"),
            "best_val_loss": row.get("best_val_loss"),
            "tokens_per_second": row.get("tokens_per_second"),
            "mfu": row.get("mfu"),
            "eta_seconds": row.get("seconds_left") if running else None,
            "created": status.created,
            "started": status.started,
            "finished": status.finished,
            "error": status.error,
            "damaged": self.damaged,  # what is wrong with a file of its folder, so that its part is missing here
            "checkpoint_error": row.get("checkpoint_error"),
            "note": result.get("note") or row.get("note"),
            "exit_code": status.exit_code,
            "activity": said.splitlines()[-1][-200:] if said else None,
            "process_id": status.identity.pid if running and status.identity is not None else None,
            "ranks": ranks_of(self.run) if running else [],
            "stopping": running and status.stopping,
            "queue_position": self.place.position,
            "queue_reason": self.place.reason,
            "priority": status.priority,
            "output_dir": self.run.relative,
            "has_result": self.has_result,
            "has_checkpoint": self.run.has_checkpoint,
            "config": config,
        }
