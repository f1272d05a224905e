"""JobManager: the queue of training jobs, and the only writer of their status.json.

    create, resume ─► queued ─► running ─► succeeded | failed | stopped | lost
                         └─────── stop ──────► stopped

The run folder is the truth: a restarted server reads it and finds its jobs again, running or waiting. In memory
are only the active ones, a JobQueue. One lock guards it; a watcher thread sleeps until a trainer ends or somebody
wakes it. What a job needs before it may start is in admission.py, how it ended in ending.py.
"""

import logging
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from storage import datasets
from storage.checkpoint_files import bring_back
from storage.errors import NotFound, StorageError
from storage.files import check_name, disk_errors_explained, sweep_temporary, write_json
from storage.runs import Run, Workspace
from storage.trash import empty_trash, move_to_trash
from training import admission, disk_space
from training import log as job_log
from training.backend import TrainingBackend
from training.config import ConfigError, TrainConfig
from training.ending import could_not_start, how_it_ended
from training.hardware import memory_kills
from training.job import ENDED, Job, JobBusy, Place, Status, is_job, read_object, trainer_of
from training.job_queue import JobQueue
from training.lock_file import OutLock
from training.resumption import further
from training.starting_point import base_run, settled
from training.status_writer import StatusWriter

__all__ = ["ConfigError", "Job", "JobBusy", "JobManager"]

GRACE = 30.0  # seconds between SIGTERM and SIGKILL: an iteration and a checkpoint, also on a busy machine
ROUND = 5.0  # seconds between looks at the logs of running jobs
log = logging.getLogger(__name__)


class JobManager:
    """The jobs in out/. All methods may be called from any thread."""

    def __init__(
        self,
        workspace: Workspace,
        backend: TrainingBackend,
        max_jobs: int = 1,
        grace: float = GRACE,
        allow: admission.Allow = admission.allow_all,
    ):
        """Take hold of out/, find the jobs in it again, and begin to watch. Raises OutInUse.

        `allow` raises for a model that a job may not start from.
        """
        self._allow = allow
        self._workspace, self._backend, self._max_jobs, self._grace = workspace, backend, max_jobs, grace
        self._out = OutLock(workspace.out)
        for folder in (workspace.out, workspace.data):
            empty_trash(folder)
        sweep_temporary(workspace.out)  # what a server that was killed was about to note there
        self._lock, self._closed = threading.RLock(), False
        self._queue, self._statuses = JobQueue(), StatusWriter()
        self._in_hand: set[str] = set()  # idle runs whose kept checkpoint is being read, for which nobody has to wait
        self._deadlines: dict[str, float] = {}  # by the monotonic clock, of jobs that were asked to end
        with self._lock:
            for run in workspace.runs():
                status = Status.read(run)
                if status is not None and status.state not in ENDED:
                    self._queue.put(run.name, status)
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
        places = self._places()
        runs = filter(is_job, self._workspace.runs())
        return sorted((self._job(run, places) for run in runs), key=lambda job: job.status.created)

    def get(self, name: object) -> Job:
        """Return a job. Raises BadName, NotFound, and NotLoadable for a folder that cannot be read."""
        run = self._workspace.run(check_name("job", name))
        if not run.exists() or not is_job(run):
            raise NotFound(f"there is no job {run.name}{self._workspace.nearest(run.name)}")
        return self._job(run, self._places())

    def _job(self, run: Run, places: Mapping[str, Place]) -> Job:
        return Job(run, places.get(run.name), self._statuses.kept(run))

    def counts(self) -> dict[str, int]:
        """Return how many jobs run and how many wait, without reading a file."""
        with self._lock:
            return {state: self._queue.count(state) for state in ("running", "queued")}

    def log_tail(self, name: object) -> str:
        """Return the end of a job's log, at most 64 KiB. Raises NotLoadable."""
        return job_log.tail(self.get(name).run.log)

    def follow_log(self, name: object, interval: float = 0.5) -> Iterator[str | None]:
        """Give a job's log as it grows, until the job ends; None when nothing was added for `interval` seconds."""
        run = self.get(name).run
        return job_log.follow(run.log, lambda: run.name in self._queue and not self._closed, interval)

    def _places(self) -> dict[str, Place]:
        with self._lock:
            return self._queue.places(self._max_jobs)

    # ---- what users ask for

    def create(self, config: TrainConfig, priority: int = 0) -> Job:
        """Start a job, or queue it: before those of lower priority, behind those of the same.

        Raises ConfigError, StorageError, JobBusy; then nothing was changed.
        """
        run = self._workspace.run_from_output_dir(config.output_dir)
        resolved = settled(config, self._workspace)
        admission.check(resolved, self._workspace, run, self._allow)
        with self._lock:
            self._require_idle(run)
            admission.require_folder(run)
            if (replaces := admission.has_weights(run)) and not config.overwrite:
                ways = "resume it, delete it, set overwrite, or choose another output_dir"
                raise JobBusy(f"{run.relative} holds a trained model: {ways}")
            if replaces:
                self._require_unneeded(run)
            admission.require_room(self._workspace, disk_space.needed(resolved))
            with disk_errors_explained(run.relative):
                kept = move_to_trash(run.folder) if replaces else None
                try:
                    self._set_up(run, resolved, Status("queued", time.time(), priority=priority))
                except (OSError, StorageError):
                    if kept is not None:
                        kept.rename(run.folder)
                    raise
        return self.get(run.name)

    def _set_up(self, run: Run, config: TrainConfig, status: Status) -> None:
        """Make the folder of a new job and queue it; a folder that cannot be filled does not stay."""
        new = not run.folder.exists()
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            for leftover in (run.status, run.log, run.metrics, run.samples):
                leftover.unlink(missing_ok=True)
            write_json(run.config, config.given())
            self._enqueue(run, status)
        except (OSError, StorageError):
            if new:
                shutil.rmtree(run.folder, ignore_errors=True)
            raise

    def set_priority(self, name: object, priority: int) -> Job:
        """Move a waiting job in the queue. Raises NotFound, StorageError, and JobBusy for a job that does not wait."""
        job = self.get(name)
        with self._lock:
            status = self._queue.get(job.name)
            if status is None or status.state != "queued":
                raise JobBusy(
                    f"{job.run.relative} has a job that is {job.state}; only a waiting one has a place to change"
                )
            before, status.priority = status.priority, priority
            try:
                with disk_errors_explained(job.run.relative):
                    self._statuses.write(job.run, status)
            except StorageError:
                status.priority = before
                raise
        return self.get(name)

    def stop(self, name: object) -> Job:
        """End a job: a waiting one leaves the queue, a running one saves first. One that has ended stays as it is."""
        job = self.get(name)
        with self._lock:
            status = self._queue.get(job.name)
            if status is None and job.status.state == "running":  # trained by hand: from here on it is ours
                status = job.status
                self._queue.put(job.name, status)
            if status is not None and status.state == "queued":
                self._finish(job.run, status, "stopped", None)
            elif status is not None and status.identity is not None and not status.stopping:
                status.stopping = True
                self._deadlines[job.name] = time.monotonic() + self._grace
                self._statuses.save(job.run, status)
                self._backend.terminate(status.identity)
        self._backend.wake()
        return self.get(name)

    def resume(self, name: object, max_iters: int | None = None, iter_num: int | None = None) -> Job:
        """Go on with a job that has ended, from its newest whole checkpoint, or from its start if there is none.

        With `iter_num` it goes back to the checkpoint that is kept of that iteration. `max_iters` may be raised.
        Raises NotFound, ConfigError, StorageError, JobBusy.
        """
        job = self.get(name)
        with self._lock:
            self._require_idle(job.run)
            config = further(job.run, max_iters, iter_num)
            admission.require_room(self._workspace, disk_space.of_resumed(job.run, config))
            self._in_hand.add(job.name)
        try:
            with disk_errors_explained(job.run.relative):
                if iter_num is not None:
                    bring_back(job.run.folder, iter_num)
                with self._lock:
                    self._in_hand.discard(job.name)
                    self._require_idle(job.run)
                    write_json(job.run.config, config.given())
                    self._enqueue(job.run, job.resumed(keeps_result=iter_num is None))
        except BaseException:
            self._in_hand.discard(job.name)
            raise
        return self.get(name)

    def delete(self, name: object) -> None:
        """Move the folder of a job that does not run to out/.trash. Raises NotFound, StorageError, JobBusy."""
        job = self.get(name)
        with self._lock:
            status = self._queue.get(job.name)
            if status is None or status.state != "queued":
                self._require_idle(job.run)
            self._require_unneeded(job.run)
            with disk_errors_explained(job.run.relative):
                move_to_trash(job.run.folder)
            self._queue.remove(job.name)
            self._statuses.forget(job.run)

    # ---- refusals

    def _require_idle(self, run: Run) -> None:
        status = self._queue.get(run.name)
        if status is not None:
            what = "is stopping; try again in a moment" if status.stopping else f"is {status.state}; stop it first"
            raise JobBusy(f"{run.relative} has a job that {what}")
        if run.name in self._in_hand:
            raise JobBusy(f"{run.relative} is about to be resumed; try again in a moment")
        if trainer_of(run) is not None:
            raise JobBusy(f"{run.relative} is being trained by a process that this server did not start")

    def _require_unneeded(self, run: Run) -> None:
        """Raise JobBusy while a job has yet to read the weights of the run: one without a checkpoint of its own."""
        for name, _ in self._queue:
            other = self._workspace.run(name)
            if base_run(read_object(other.config)) == run.name and not other.has_checkpoint:
                raise JobBusy(f"{run.relative} is what the job {name} starts from; stop it first")

    def require_dataset_unused(self, name: str) -> None:
        """Raise JobBusy while a running or waiting job trains on the dataset."""
        wanted = datasets.ALIASES.get(name, name)
        with self._lock:
            active = [*self._in_hand, *(job for job, _ in self._queue)]
        for job in active:
            used = str(read_object(self._workspace.run(job).config).get("dataset"))
            if datasets.ALIASES.get(used, used) == wanted:
                raise JobBusy(f"the dataset {wanted} is in use by the job {job}; stop it first")

    # ---- what the lock's holder does

    def _enqueue(self, run: Run, status: Status) -> None:
        status.order = self._queue.next_order()
        self._statuses.write(run, status)
        self._queue.put(run.name, status)
        self._start_waiting()
        self._backend.wake()

    def _finish(self, run: Run, status: Status, state: str, error: str | None, code: int | None = None) -> None:
        status.state, status.error, status.exit_code = state, error, code
        status.finished, status.identity = time.time(), None
        self._queue.remove(run.name)
        self._deadlines.pop(run.name, None)
        self._statuses.save(run, status)
        log.info("job %s: %s%s", run.name, state, f" ({error})" if error else "")

    def _start_waiting(self) -> None:
        free = max(0, self._max_jobs - self._queue.count("running"))
        for name, status in [(name, self._queue.get(name)) for name in self._queue.waiting()[:free]]:
            assert status is not None
            self._start(self._workspace.run(name), status)

    def _start(self, run: Run, status: Status) -> None:
        status.identity = trainer_of(run)  # a server that died at this very point has started it already
        if status.identity is None:
            try:
                run.result.unlink(missing_ok=True)
                sweep_temporary(run.folder)
                status.memory_kills = memory_kills()
                downloads = admission.downloads(read_object(run.config), self._workspace)
                status.identity = self._backend.start(run, status.resume, downloads)
            except (OSError, StorageError) as error:
                self._finish(run, status, "failed", could_not_start(error))
                return
        status.state, status.started = "running", time.time()
        self._statuses.save(run, status)

    def _end(self, run: Run, status: Status) -> None:
        assert status.identity is not None
        other = trainer_of(run)
        if other is not None and other != status.identity:
            status.identity = other
            self._statuses.save(run, status)
            return
        code = self._backend.exit_code(status.identity)
        self._backend.kill(status.identity)  # children that it left behind
        memory_ran_out = memory_kills() > status.memory_kills
        self._finish(run, status, *how_it_ended(run, status, code, self._grace, memory_ran_out))

    def _look(self) -> None:
        """See which trainers have ended, end those whose grace is over, and start who waits."""
        self._statuses.save_kept()
        for name, status in self._queue:
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
                running = [status.identity for _, status in self._queue if status.identity is not None]
                rest = [deadline - time.monotonic() for deadline in self._deadlines.values()]
            self._backend.wait(running, min([ROUND, *rest]) if running or self._statuses else None)
            try:
                with self._lock:
                    if not self._closed:
                        self._look()
            except Exception:  # a job must not end the watching of all others
                log.exception("a look at the jobs failed")
                time.sleep(1)
