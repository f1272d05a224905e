"""Job: a run as the server orchestrates it, read from its folder whenever somebody asks.

    status.json   the server's: state, identity of the trainer, times
    result.json   the trainer's: how it ended
    metrics.jsonl the trainer's: how far it is

A run that somebody trained by hand has no status.json and is a job all the same.
"""

from dataclasses import dataclass
from typing import Any

from storage.errors import StorageError
from storage.files import read_json, write_json
from storage.runs import Run
from training import log as job_log
from training import metrics
from training.process import TRAINER, ProcessIdentity, is_alive

ACTIVE = ("queued", "running")
ENDED = ("succeeded", "failed", "stopped", "lost")


class JobBusy(Exception):
    """The job's state does not allow this now (HTTP 409)."""


def read_object(path: Any) -> dict[str, Any]:
    """Return the JSON object in a file of a run, {} if there is none that can be read."""
    try:
        value = read_json(path)
    except StorageError:
        return {}
    return value if isinstance(value, dict) else {}


def trainer_of(run: Run) -> ProcessIdentity | None:
    """Return the living process that holds the run's folder, whoever started it."""
    identity = ProcessIdentity.from_json(read_object(run.folder / TRAINER))
    return identity if identity is not None and is_alive(identity) else None


def ranks_of(run: Run) -> list[int]:
    """Return the pids of the processes that train a run together, by rank; [] for a single one."""
    pids = read_object(run.folder / TRAINER).get("ranks")
    if not isinstance(pids, list) or len(pids) < 2:
        return []
    return [int(pid) for pid in pids]


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
        found = read_object(run.status)
        if found.get("state") not in (*ACTIVE, *ENDED) or not isinstance(found.get("created"), int | float):
            return None
        known = {name: found[name] for name in cls.__dataclass_fields__ if name in found}
        return cls(**known | {"identity": ProcessIdentity.from_json(found.get("identity"))})


def _status_of_foreign(run: Run) -> Status:
    """Return the state of a run that was trained by hand, from what its trainer left."""
    result, created = read_object(run.result), run.config.stat().st_mtime if run.config.exists() else 0.0
    trainer = trainer_of(run)
    if trainer is not None:
        return Status("running", created, started=created, identity=trainer)
    if result.get("state") not in ENDED:
        return Status("lost", created, error="it ended without saying how")
    return Status(
        result["state"], created, created, result.get("finished"), result.get("error"), result.get("exit_code")
    )


class Job:
    """One job as its run's folder shows it now; `position` is its place in the queue, counted from 1."""

    def __init__(self, run: Run, position: int | None = None) -> None:
        self.run, self.position = run, position
        self.status = Status.read(run) or _status_of_foreign(run)

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
        resume = any(path.exists() for path in (self.run.checkpoint, self.run.previous))
        had_succeeded, priority = self.has_result and keeps_result, self.status.priority
        return Status("queued", self.status.created, resume=resume, priority=priority, had_succeeded=had_succeeded)

    def sample(self) -> dict[str, Any] | None:
        """Return the latest text sample: iter_num, prompt and text; None before there is one."""
        return metrics.last(self.run.samples) or None

    def describe(self) -> dict[str, Any]:
        """Return what GET /api/jobs/<name> says; reads small files and the end of the metrics."""
        status, config, row = self.status, read_object(self.run.config), metrics.last(self.run.metrics)
        result = read_object(self.run.result) if status.state in ENDED else {}
        max_iters = config.get("max_iters")
        iter_num = result.get("iter_num") or row.get("iter_num") or 0
        running = status.state == "running"
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
            "checkpoint_error": row.get("checkpoint_error"),
            "note": result.get("note") or row.get("note"),
            "exit_code": status.exit_code,
            "activity": job_log.last_lines(self.run.log, 1)[-200:] or None if running else None,
            "process_id": status.identity.pid if running and status.identity is not None else None,
            "ranks": ranks_of(self.run) if running else [],
            "stopping": running and status.stopping,
            "queue_position": self.position,
            "priority": status.priority,
            "output_dir": self.run.relative,
            "has_result": self.has_result,
            "has_checkpoint": self.run.checkpoint.exists(),
            "config": config,
        }
