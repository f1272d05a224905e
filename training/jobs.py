"""JobManager: the queue of training jobs, and the only writer of their status.json.

    create, resume ─► queued ─► running ─► succeeded | failed | stopped | lost
                         └─────── stop ──────► stopped

The run folder is the truth: a restarted server reads it and finds its jobs again, running or waiting. In memory
are only the active ones. One lock guards them; a watcher thread sleeps until a trainer ends or somebody wakes it.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from storage import datasets, hub, registry, tokenizer
from storage.errors import BadName, NotFound, StorageError
from storage.files import check_name, require_space, sweep_temporary, write_json
from storage.runs import Run, Workspace
from training import disk_space
from training import log as job_log
from training.backend import TrainingBackend
from training.config import ConfigError, TrainConfig, resolve
from training.job import ENDED, Job, Status, read_object, trainer_of
from training.lock_file import OutLock
from training.starting_point import reference, require_elsewhere
from training.trash import move_to_trash

__all__ = ["ConfigError", "Job", "JobBusy", "JobManager"]

GRACE = 30.0  # seconds between SIGTERM and SIGKILL: an iteration and a checkpoint, also on a busy machine
ROUND = 5.0  # seconds between looks at the logs of running jobs
log = logging.getLogger(__name__)


class JobBusy(Exception):
    """The job's state does not allow this now (HTTP 409)."""


def _has_weights(run: Run) -> bool:
    try:
        run.describe()
    except NotFound:
        return False
    return True


def _how_it_ended(status: Status, run: Run, code: int | None) -> tuple[str, str | None]:
    """Return state and error of a trainer that has ended without a result.json."""
    if status.killed:
        return "stopped", f"it did not end within {GRACE:g} s and was killed; work since its last checkpoint is lost"
    if status.stopping:
        return "stopped", None
    last = job_log.last_lines(run.log)
    last = f"; its last words: {last}" if last else ""
    if code is None:
        return "lost", f"it ended without saying how: killed, or while no server looked{last}"
    if code < 0:
        with contextlib.suppress(ValueError):
            memory = ", perhaps because memory ran out" if code == -signal.SIGKILL else ""
            return "failed", f"killed by {signal.Signals(-code).name}{memory}{last}"
    return "failed", f"exit code {code}{last}"


class JobManager:
    """The jobs in out/. All methods may be called from any thread."""

    def __init__(
        self,
        workspace: Workspace,
        backend: TrainingBackend,
        max_jobs: int = 1,
        grace: float = GRACE,
        allow: Callable[[registry.ModelReference], None] = lambda start: None,
    ):
        """Take hold of out/, find the jobs in it again, and begin to watch. Raises OutInUse.

        `allow` raises for a model that a job may not start from.
        """
        self._allow = allow
        self._workspace, self._backend, self._max_jobs, self._grace = workspace, backend, max_jobs, grace
        self._out = OutLock(workspace.out)
        self._lock = threading.RLock()
        self._active: dict[str, Status] = {}  # queued and running, by name
        self._deadlines: dict[str, float] = {}  # by the monotonic clock, of jobs that were asked to end
        self._closed = False
        with self._lock:
            for run in workspace.runs():
                status = Status.read(run)
                if status is not None and status.state not in ENDED:
                    self._active[run.name] = status
            self._look()
        self._watcher = threading.Thread(target=self._watch, name="jobs", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Stop watching and give out/ free; running jobs go on."""
        self._closed = True
        self._backend.wake()
        self._watcher.join()
        self._out.release()

    # ---- what there is

    def list(self) -> Sequence[Job]:
        """Return all jobs, oldest first."""
        positions = self._positions()
        runs = [run for run in self._workspace.runs() if run.status.exists() or run.config.exists()]
        return sorted((Job(run, positions.get(run.name)) for run in runs), key=lambda job: job.status.created)

    def get(self, name: object) -> Job:
        """Return a job. Raises BadName, NotFound."""
        run = self._workspace.run(check_name("job", name))
        if not run.exists() or not (run.status.exists() or run.config.exists()):
            raise NotFound(f"there is no job {run.name}")
        return Job(run, self._positions().get(run.name))

    def counts(self) -> dict[str, int]:
        """Return how many jobs run and how many wait, without reading a file."""
        with self._lock:
            states = [status.state for status in self._active.values()]
        return {state: states.count(state) for state in ("running", "queued")}

    def log_tail(self, name: object) -> str:
        """Return the end of a job's log, at most 64 KiB."""
        return job_log.tail(self.get(name).run.log)

    def follow_log(self, name: object, interval: float = 0.5) -> Iterator[str | None]:
        """Give a job's log as it grows, until the job ends; None when nothing was added for `interval` seconds."""
        run = self.get(name).run
        return job_log.follow(run.log, lambda: run.name in self._active and not self._closed, interval)

    def _queue(self) -> Sequence[str]:
        waiting = [(status.order, name) for name, status in self._active.items() if status.state == "queued"]
        return [name for _, name in sorted(waiting)]

    def _positions(self) -> dict[str, int]:
        with self._lock:
            return {name: position for position, name in enumerate(self._queue(), start=1)}

    # ---- what users ask for

    def create(self, config: TrainConfig) -> Job:
        """Start a job, or queue it. Raises ConfigError, StorageError, JobBusy; then nothing was changed."""
        run = self._workspace.run_from_output_dir(config.output_dir)
        resolved = resolve(config, registry.pretrained_names(self._workspace))
        self._check(resolved)
        with self._lock:
            self._require_idle(run)
            if run.folder.is_symlink() or (run.folder.exists() and not run.exists()):
                raise BadName(f"{run.relative} is not a folder")
            if _has_weights(run) and not config.overwrite:
                raise JobBusy(f"{run.relative} holds a trained model: resume it, delete it, or set overwrite")
            require_elsewhere(resolved, run)
            require_space(self._workspace.out, disk_space.needed(resolved))
            if _has_weights(run):
                move_to_trash(run)
            run.folder.mkdir(parents=True, exist_ok=True)
            for leftover in (run.status, run.log, run.metrics, run.samples):
                leftover.unlink(missing_ok=True)
            write_json(run.config, resolved.given())
            self._enqueue(run, Status("queued", time.time()))
        return self.get(run.name)

    def stop(self, name: object) -> Job:
        """End a job: a waiting one leaves the queue, a running one saves first. One that has ended stays as it is."""
        job = self.get(name)
        with self._lock:
            status = self._active.get(job.name)
            if status is None and job.status.state == "running":  # trained by hand: from here on it is ours
                status = self._active[job.name] = job.status
            if status is not None and status.state == "queued":
                self._finish(job.run, status, "stopped", None)
            elif status is not None and status.identity is not None and not status.stopping:
                status.stopping = True
                self._deadlines[job.name] = time.monotonic() + self._grace
                self._save(job.run, status)
                self._backend.terminate(status.identity)
        self._backend.wake()
        return self.get(name)

    def resume(self, name: object, max_iters: int | None = None) -> Job:
        """Go on with a job that has ended, from its newest whole checkpoint, or from its start if there is none.

        `max_iters` may be raised. Raises NotFound, ConfigError, StorageError, JobBusy.
        """
        job = self.get(name)
        with self._lock:
            self._require_idle(job.run)
            config = TrainConfig.parse(read_object(job.run.config))
            manifest = job.run.manifest(job.run.checkpoint)
            reached = read_object(job.run.result).get("iter_num") or read_object(manifest).get("iter_num") or 0
            last = config.max_iters if max_iters is None else max_iters
            if last is not None and last <= reached:
                raise ConfigError(f"max_iters is {last}; {job.name} has {reached} iterations behind it: give more")
            require_space(self._workspace.out, disk_space.of_resumed(job.run))
            resume = any(path.exists() for path in (job.run.checkpoint, job.run.previous))
            write_json(job.run.config, config.given() | {"max_iters": last})
            self._enqueue(job.run, Status("queued", job.status.created, resume=resume))
        return self.get(name)

    def delete(self, name: object) -> None:
        """Move the folder of a job that does not run to out/.trash. Raises NotFound, JobBusy."""
        job = self.get(name)
        with self._lock:
            if job.name in self._active and self._active[job.name].state == "queued":
                del self._active[job.name]
            self._require_idle(job.run)
            move_to_trash(job.run)

    # ---- refusals

    def _require_idle(self, run: Run) -> None:
        status = self._active.get(run.name)
        if status is not None:
            what = "is stopping; try again in a moment" if status.stopping else f"is {status.state}; stop it first"
            raise JobBusy(f"{run.relative} has a job that {what}")
        if trainer_of(run) is not None:
            raise JobBusy(f"{run.relative} is being trained by a process that this server did not start")

    def require_dataset_unused(self, name: str) -> None:
        """Raise JobBusy while a running or waiting job trains on the dataset."""
        wanted = datasets.ALIASES.get(name, name)
        with self._lock:
            active = list(self._active)
        for job in active:
            used = str(read_object(self._workspace.run(job).config).get("dataset"))
            if datasets.ALIASES.get(used, used) == wanted:
                raise JobBusy(f"the dataset {wanted} is in use by the job {job}; stop it first")

    def _check(self, config: TrainConfig) -> None:
        """Refuse, before anything is written, what the trainer would refuse after a while."""
        source = datasets.dataset(self._workspace, config.dataset)
        name = config.tokenizer or "auto"
        if config.init_from not in ("scratch", "resume"):
            start = reference(config, self._workspace)
            self._allow(start)
            offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
            if start.kind == "pretrained" and offline:
                hub.fetch(start.id, self._workspace)  # finds it here, or refuses
            beside = None if start.path is None else (start.path if start.path.is_dir() else start.path.parent)
            if beside is not None and (beside / "tokenizer.json").exists():
                name = tokenizer.load(beside / "tokenizer.json").name
            elif start.kind == "pretrained":
                name = "gpt2"
        elif config.init_from == "resume":
            raise ConfigError(f"init_from is resume; POST /api/jobs/<name>/resume goes on with {config.output_dir}")
        source.check(name, config.window or config.block_size)

    # ---- what the lock's holder does

    def _enqueue(self, run: Run, status: Status) -> None:
        status.order = 1 + max((other.order for other in self._active.values()), default=0)
        status.write(run)
        self._active[run.name] = status
        self._start_waiting()
        self._backend.wake()

    def _save(self, run: Run, status: Status) -> None:
        """Write a status that must not fail on a full disk: the trainer's own files say the same, if slower."""
        try:
            status.write(run)
        except (OSError, StorageError) as error:
            log.error("the status of %s could not be written: %s", run.name, error)

    def _finish(self, run: Run, status: Status, state: str, error: str | None, code: int | None = None) -> None:
        status.state, status.error, status.exit_code = state, error, code
        status.finished, status.identity = time.time(), None
        self._active.pop(run.name, None)
        self._deadlines.pop(run.name, None)
        self._save(run, status)
        log.info("job %s: %s%s", run.name, state, f" ({error})" if error else "")

    def _start_waiting(self) -> None:
        running = sum(status.state == "running" for status in self._active.values())
        for name in self._queue()[: max(0, self._max_jobs - running)]:
            self._start(self._workspace.run(name), self._active[name])

    def _start(self, run: Run, status: Status) -> None:
        status.identity = trainer_of(run)  # a server that died at this very point has started it already
        if status.identity is None:
            run.result.unlink(missing_ok=True)
            sweep_temporary(run.folder)
            config = read_object(run.config)
            fetched = config.get("model_type") if config.get("init_from") == "pretrained" else config.get("init_from")
            downloads = fetched in registry.PRETRAINED and registry.local_folder(self._workspace, str(fetched)) is None
            try:
                status.identity = self._backend.start(run, status.resume, downloads)
            except OSError as error:
                self._finish(run, status, "failed", f"the trainer could not be started: {error.strerror}")
                return
        status.state, status.started = "running", time.time()
        self._save(run, status)

    def _end(self, run: Run, status: Status) -> None:
        assert status.identity is not None
        other = trainer_of(run)
        if other is not None and other != status.identity:
            status.identity = other
            self._save(run, status)
            return
        code = self._backend.exit_code(status.identity)
        self._backend.kill(status.identity)  # children that it left behind
        result = read_object(run.result)
        if result.get("state") in ENDED:
            state, error, code = result["state"], result.get("error"), result.get("exit_code")
        else:
            state, error = _how_it_ended(status, run, code)
        self._finish(run, status, state, error, code)

    def _look(self) -> None:
        """See which trainers have ended, end those whose grace is over, and start who waits."""
        for name, status in tuple(self._active.items()):
            run = self._workspace.run(name)
            if status.state != "running":
                continue
            if status.identity is None or not self._backend.alive(status.identity):
                self._end(run, status)
            elif time.monotonic() >= self._deadlines.get(name, float("inf")):
                status.killed = True
                self._deadlines[name] = time.monotonic() + 1
                self._backend.kill(status.identity)
            else:
                job_log.cap(run.log)
        self._start_waiting()

    # ---- the watcher

    def _watch(self) -> None:
        while not self._closed:
            with self._lock:
                running = [status.identity for status in self._active.values() if status.identity is not None]
                rest = [deadline - time.monotonic() for deadline in self._deadlines.values()]
            self._backend.wait(running, min([ROUND, *rest]) if running else None)
            try:
                with self._lock:
                    if not self._closed:
                        self._look()
            except Exception:  # a job must not end the watching of all others
                log.exception("a look at the jobs failed")
                time.sleep(1)
