"""The job manager: one job per folder, in order, found again after a restart, and never somebody else's process."""

import errno
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from fakes import byte_tokenizer

from model import GPT, GPTConfig
from storage.chat_format import with_chat_tokens
from storage.checkpoint_files import sha256_of
from storage.errors import BadName, NoSpace, NotFound, NotWritable, StorageError
from storage.files import temporary_beside, write_json
from storage.runs import Workspace
from training import disk_space, metrics
from training import log as job_log
from training.config import ConfigError, TrainConfig
from training.job import Status
from training.jobs import JobBusy, JobManager
from training.local_backend import LocalBackend
from training.lock_file import OutInUse, OutLock
from training.process import TRAINER, ProcessIdentity, identify


class FakeBackend:
    """Trainers that are only names: they run until a test ends them. A full TrainingBackend."""

    def __init__(self):
        self.running: dict[ProcessIdentity, object] = {}
        self.codes: dict[ProcessIdentity, int] = {}
        self.started, self.asked, self.killed = [], [], []
        self.changed, self.version, self.seen, self.deaf = threading.Condition(), 0, 0, False
        self.error: OSError | None = None

    def start(self, run, resume, downloads):
        if self.error is not None:
            raise self.error
        identity = ProcessIdentity(1000 + len(self.started), 1, "fake")
        self.running[identity] = run
        self.started.append((run.name, resume, downloads))
        return identity

    def alive(self, identity):
        return identity in self.running

    def exit_code(self, identity):
        return self.codes.pop(identity, None)

    def terminate(self, identity):
        self.asked.append(identity)
        if not self.deaf:
            self.end(self.running[identity].name, state="stopped", iter_num=3)

    def kill(self, identity):
        if identity in self.running:
            self.killed.append(identity)
            self._end(identity, -9)

    def wait(self, identities, timeout):
        with self.changed:
            if all(identity in self.running for identity in identities):
                self.changed.wait_for(lambda: self.version != self.seen, timeout)
            self.seen = self.version

    def wake(self):
        with self.changed:
            self.version += 1
            self.changed.notify_all()

    def _end(self, identity, code):
        del self.running[identity]
        self.codes[identity] = code
        self.wake()

    def end(self, name, code=0, **result):
        identity = next(i for i, run in self.running.items() if run.name == name)
        if result:
            write_json(self.running[identity].result, {"exit_code": code, "error": None, **result})
        self._end(identity, code)


class Place:
    """A workspace with a small dataset, and the managers made in it."""

    def __init__(self, root: Path):
        self.workspace, self.backend, self.managers = Workspace(root), FakeBackend(), []
        (root / "data" / "text").mkdir(parents=True)
        (root / "data" / "text" / "a.txt").write_text("to be or not to be\n" * 100)
        (root / "out").mkdir()

    def manager(self, **options) -> JobManager:
        self.managers.append(JobManager(self.workspace, options.pop("backend", self.backend), **options))
        return self.managers[-1]

    def restart(self, **options) -> JobManager:
        self.managers.pop().close()
        return self.manager(**options)

    def checkpoint(self, name: str) -> None:
        self.workspace.run(name).checkpoint.write_bytes(b"weights")

    def model(self, name: str, file: str = "ckpt.pt") -> None:
        shape = GPTConfig(n_layer=1, n_head=1, n_embd=16, block_size=64, vocab_size=300)
        state = {"model": GPT(shape).state_dict(), "model_args": shape.model_args()}
        torch.save(state, self.workspace.run(name).folder / file)


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    yield made
    for manager in made.managers:
        manager.close()


def config(name="a", **fields) -> TrainConfig:
    return TrainConfig.parse({"dataset": "text", "output_dir": f"out/{name}", "model_type": "nano"} | fields)


def wait_until(condition, seconds=80.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for(manager: JobManager, name: str, state: str, seconds=10.0) -> dict:
    wait_until(lambda: manager.get(name).state == state, seconds)
    return manager.get(name).describe()


def places(manager: JobManager) -> dict[str, int]:
    """Return the waiting jobs with their places, the next one first."""
    found = {job.name: job.describe()["queue_position"] for job in manager.list()}
    return {name: at for at, name in sorted((at, name) for name, at in found.items() if at is not None)}


# ---- what must not be lost


@pytest.mark.parametrize("start", ["a", "a/best", "out/a/ckpt.pt"])
def test_a_run_cannot_replace_the_run_it_starts_from(place, start, monkeypatch):
    manager = place.manager(max_jobs=2)
    manager.create(config("a"))
    place.model("a")
    place.model("a", "best.pt")
    place.backend.end("a", state="succeeded", iter_num=20)
    wait_for(manager, "a", "succeeded")
    with pytest.raises(ConfigError, match="out/a is what this training starts from"):
        manager.create(config("a", init_from=start, overwrite=True, learning_rate=1e-3))
    assert place.workspace.run("a").checkpoint.exists()


def test_a_dataset_cannot_go_while_a_job_needs_it(place):
    manager = place.manager()
    manager.create(config("a"))
    with pytest.raises(JobBusy, match="the dataset text is in use by the job a"):
        manager.require_dataset_unused("text")
    manager.require_dataset_unused("other")


def test_a_killed_job_does_not_resume_to_fewer_iterations_than_its_checkpoint_has(place):
    manager = place.manager()
    manager.create(config("a", max_iters=3000))
    place.checkpoint("a")
    run = place.workspace.run("a")
    write_json(run.manifest(run.checkpoint), {"size": 7, "iter_num": 250})
    place.backend.end("a", code=-9)
    wait_for(manager, "a", "failed")
    with pytest.raises(ConfigError, match="max_iters is 200; a has 250 iterations behind it"):
        manager.resume("a", max_iters=200)


def test_a_model_that_may_not_be_used_starts_no_job(place):
    def allow(start):
        raise ConfigError(f"{start.id} is not allowed")

    with pytest.raises(ConfigError, match="gpt2 is not allowed"):
        place.manager(allow=allow).create(config("b", model_type="gpt2"))


# ---- starting


def test_a_job_starts_at_once_and_leaves_its_config_in_the_folder(place):
    job = place.manager().create(config(max_iters=20)).describe()
    assert (job["state"], job["process_id"], job["name"]) == ("running", 1000, "a")
    saved = json.loads((place.workspace.run("a").config).read_text())
    assert saved["max_iters"] == 20 and saved["output_dir"] == "out/a" and saved["n_layer"] == 4
    assert job["config"] == saved and place.backend.started == [("a", False, False)]
    place.workspace.run("a").log.write_text("reading the text\ntokenizing 63%\n")
    assert job["activity"] is None and place.managers[0].get("a").describe()["activity"] == "tokenizing 63%"


def test_more_jobs_than_max_jobs_wait_in_order(place):
    manager = place.manager(max_jobs=2)
    states = [manager.create(config(name)).describe() for name in "abcd"]
    assert [s["state"] for s in states] == ["running", "running", "queued", "queued"]
    assert [s["queue_position"] for s in states] == [None, None, 1, 2] and states[2]["process_id"] is None
    assert [s["queue_reason"] for s in states] == [None, None, *2 * ["max_jobs is 2; running now: a, b"]]
    assert manager.counts() == {"running": 2, "queued": 2}
    place.backend.end("b", state="succeeded", iter_num=5)
    wait_for(manager, "c", "running")
    assert manager.get("d").describe()["queue_position"] == 1
    assert [job.name for job in manager.list()] == ["a", "b", "c", "d"]


def test_a_job_of_higher_priority_goes_first_and_among_equals_who_came_first(place):
    manager = place.manager()
    for name, priority in (("a", 0), ("b", 0), ("c", 5), ("d", 5), ("e", -1)):
        manager.create(config(name), priority)
    assert list(places(manager)) == ["c", "d", "b", "e"], "a runs, and goes on running"
    place.backend.end("a", state="succeeded", iter_num=1)
    wait_for(manager, "c", "running")
    assert list(places(manager)) == ["d", "b", "e"] and manager.get("d").describe()["priority"] == 5


def test_a_waiting_job_can_be_moved_and_keeps_its_place_over_a_restart(place):
    manager = place.manager()
    for name in "abcd":
        manager.create(config(name))
    assert manager.set_priority("d", 1).describe()["queue_position"] == 1
    manager.set_priority("b", -1)
    assert list(places(manager)) == list(places(place.restart())) == ["d", "c", "b"]


def test_only_a_waiting_job_has_a_place_to_change(place):
    manager = place.manager()
    manager.create(config("a"))
    with pytest.raises(JobBusy, match="out/a has a job that is running; only a waiting one"):
        manager.set_priority("a", 1)
    manager.stop("a")
    wait_for(manager, "a", "stopped")
    with pytest.raises(JobBusy, match="stopped"):
        manager.set_priority("a", 1)


@pytest.mark.fault("F20", "fifty racing jobs for one output_dir")
def test_of_fifty_racing_requests_for_one_folder_exactly_one_wins(place):
    manager = place.manager(max_jobs=4)

    def create(_):
        try:
            return manager.create(config()).name
        except JobBusy:
            return None

    with ThreadPoolExecutor(50) as pool:
        results = list(pool.map(create, range(50)))
    assert results.count("a") == 1 and len(place.backend.started) == 1


def test_a_job_that_is_not_there_is_refused_with_the_nearest_name(place):
    manager = place.manager()
    manager.create(config("my_model"))
    with pytest.raises(NotFound, match=r"there is no job my_modle; did you mean my_model[?]$"):
        manager.get("my_modle")
    with pytest.raises(NotFound, match=r"there is no job x$"):
        manager.get("x")


def test_a_folder_with_a_model_is_refused_and_with_overwrite_kept_in_the_trash(place):
    manager = place.manager()
    (place.workspace.out / "a").mkdir()
    place.checkpoint("a")
    with pytest.raises(JobBusy, match="out/a holds a trained model: resume it"):
        manager.create(config())
    manager.create(config(overwrite=True))
    (kept,) = (place.workspace.out / ".trash").iterdir()
    assert (kept / "ckpt.pt").read_bytes() == b"weights" and not place.workspace.run("a").checkpoint.exists()


def test_a_failed_start_is_a_failed_job_and_the_next_one_gets_its_turn(place):
    manager = place.manager()
    place.backend.error = OSError(12, "Cannot allocate memory")
    job = manager.create(config()).describe()
    assert job["state"] == "failed" and job["error"] == "the trainer could not be started: Cannot allocate memory"
    place.backend.error = None
    assert manager.create(config("b")).state == "running"
    assert manager.create(config("a")).state == "queued", "a folder without weights may be used again"


# ---- refusals


REFUSED = {
    "no such dataset": ({"dataset": "nowhere"}, NotFound),
    "a path as output_dir": ({"output_dir": "out/../../x"}, BadName),
    "a foreign model": ({"model_type": "evil/repo"}, ConfigError),
    "resume by create": ({"init_from": "resume"}, ConfigError),
    "a run that is not there": ({"init_from": "nowhere/best", "model_type": None}, NotFound),
    "weights that are not here, offline": ({"model_type": "gpt2-xl"}, StorageError),
    "a package that is not there": ({"wandb": True}, ConfigError),
    "too little text": ({"block_size": 10_000}, StorageError),
}


@pytest.mark.parametrize("fields, error", REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(place, fields, error, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(place.workspace.root / "hub"))
    monkeypatch.setattr("training.trackers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(error):
        place.manager().create(config(**fields))
    assert [entry.name for entry in place.workspace.out.iterdir()] == [".lock"] and not place.backend.started


@pytest.mark.parametrize("value", ["", "my run", "../x", "my_run/ckpt-500", "/etc/passwd", "out/a/b/c/d"])
def test_what_no_model_can_be_called_is_refused_as_init_from(place, value):
    rule = "it must be a pretrained name, a run or a checkpoint: gpt2, my_run, my_run/best, out/my_run/ckpt.pt"
    with pytest.raises(BadName) as caught:
        place.manager().create(config(model_type=None, init_from=value, learning_rate=1e-3))
    assert str(caught.value) == f'init_from is "{value}"; {rule}'


CHAT = '{"messages": [{"role": "user", "content": "1 and %d"}, {"role": "assistant", "content": "are numbers."}]}\n'


def test_adapters_on_chats_need_a_model_that_knows_their_tokens(place):
    (place.workspace.data / "talk").mkdir()
    (place.workspace.data / "talk" / "chat.jsonl").write_text("".join(CHAT % i for i in range(200)))
    base, manager = place.workspace.run("base"), place.manager()
    base.folder.mkdir()
    place.model("base")
    byte_tokenizer().save(base.tokenizer)
    tuning = {"dataset": "talk", "model_type": None, "init_from": "base", "learning_rate": 1e-3}
    adapters = config(**tuning, lora_rank=8)
    with pytest.raises(ConfigError, match="lora_rank is 8, and talk holds chats: adapters cannot learn"):
        manager.create(adapters)
    assert not place.workspace.run("a").folder.exists()
    assert manager.create(config("all", **tuning)).state == "running"
    with_chat_tokens(byte_tokenizer()).save(base.tokenizer)
    assert manager.create(adapters).state == "queued"


@pytest.mark.parametrize(
    "start, fields, sentence",
    [
        ({"init_from": "base"}, {"lora_rank": 16}, "lora_rank is 16; it must be less than the model's width of 16"),
        ({"init_from": "base"}, {"block_size": 65}, "block_size is 65; it must be at most the model's context of 64"),
        ({"model_type": "gpt2"}, {"lora_rank": 768}, "lora_rank is 768; it must be less than the model's width of 768"),
    ],
)
def test_what_the_model_is_too_small_for_is_refused_before_anything_is_written(place, start, fields, sentence):
    place.workspace.run("base").folder.mkdir()
    place.model("base")
    tuning = {"model_type": None, "learning_rate": 1e-3} | start
    with pytest.raises(ConfigError, match=sentence):
        place.manager().create(config(**tuning, **fields))
    assert not place.workspace.run("a").folder.exists()


def test_too_little_disk_space_is_refused_with_both_numbers(place, monkeypatch):
    monkeypatch.setattr(disk_space, "needed", lambda config: 10**18)
    with pytest.raises(NoSpace, match="MB are needed and the disk has"):
        place.manager().create(config())


def test_a_link_in_out_is_never_written_through(place, tmp_path):
    (place.workspace.out / "a").symlink_to(tmp_path)
    with pytest.raises(BadName, match="out/a is not a folder"):
        place.manager().create(config())
    assert not (tmp_path / "train_config.json").exists()


def test_an_unknown_job_is_not_found_and_a_bad_name_is_refused(place):
    manager = place.manager()
    moved = partial(manager.set_priority, priority=1)
    for method in (manager.get, manager.stop, manager.resume, manager.delete, manager.log_tail, moved):
        with pytest.raises(NotFound):
            method("nothing")
        with pytest.raises(BadName):
            method("../etc")


# ---- ending


def test_a_job_ends_as_its_trainer_says(place):
    manager = place.manager()
    manager.create(config())
    metrics.append(
        place.workspace.run("a").metrics, {"iter_num": 10, "loss": 2.5, "val_loss": 2.6, "best_val_loss": 2.6}
    )
    place.backend.end("a", state="succeeded", iter_num=10, best_val_loss=2.6)
    job = wait_for(manager, "a", "succeeded")
    assert job["iteration"] == 10
    assert (job["iter_num"], job["loss"], job["best_val_loss"], job["error"]) == (10, 2.5, 2.6, None)
    assert job["process_id"] is None and job["finished"] >= job["started"]


def test_a_trainer_that_dies_fails_with_its_code_and_last_words(place):
    manager = place.manager()
    manager.create(config())
    place.workspace.run("a").log.write_text(
        'Traceback (most recent):\n  File "/x.py"\n    boom()\nValueError: no good\n'
    )
    place.backend.end("a", code=3)
    assert wait_for(manager, "a", "failed")["error"] == "exit code 3; its last words: ValueError: no good"
    manager.create(config("b"))
    place.backend.end("b", code=-9)
    assert "killed by SIGKILL, perhaps because memory ran out" in wait_for(manager, "b", "failed")["error"]


@pytest.mark.parametrize(
    ("code", "words"),
    [(127, "cannot allocate memory for thread-local data: ABORT"), (-6, "terminate called: std::bad_alloc")],
)
def test_a_trainer_that_a_library_ended_for_memory_failed_out_of_memory(place, code, words):
    manager = place.manager()
    manager.create(config())
    place.workspace.run("a").log.write_text(words + "\n")
    place.backend.end("a", code=code)
    failed = wait_for(manager, "a", "failed")["error"]
    assert failed.startswith("out of memory; lower batch_size") and failed.endswith(words)


def test_a_trainer_that_the_system_ended_for_memory_failed_out_of_memory(place, monkeypatch):
    kills = iter([3, 4])
    monkeypatch.setattr("training.jobs.memory_kills", lambda: next(kills))
    manager = place.manager()
    manager.create(config())
    place.backend.end("a", code=-9)
    assert wait_for(manager, "a", "failed")["error"].startswith("out of memory: the system ended it; lower batch_size")


@pytest.mark.parametrize("number, kind", [(errno.EROFS, NotWritable), (errno.ENOSPC, NoSpace)], ids=["ro", "full"])
def test_on_a_read_only_or_full_disk_a_job_is_refused_and_leaves_no_folder(place, monkeypatch, number, kind):
    def failing(path, obj):
        raise OSError(number, os.strerror(number))

    manager = place.manager()
    monkeypatch.setattr("training.jobs.write_json", failing)
    with pytest.raises(kind, match="out/a could not be written"):
        manager.create(config())
    assert not place.workspace.run("a").folder.exists() and manager.counts() == {"running": 0, "queued": 0}


def no_room(path, obj):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_job_that_ends_on_a_full_disk_is_told_ended_and_noted_when_there_is_room(place, monkeypatch):
    monkeypatch.setattr("training.jobs.ROUND", 0.02)
    manager = place.manager()
    manager.create(config())
    run = place.workspace.run("a")
    with monkeypatch.context() as full:
        full.setattr("training.job.write_json", no_room)
        place.backend.end("a", state="succeeded", iter_num=20)
        assert wait_for(manager, "a", "succeeded")["process_id"] is None
        assert [job.state for job in manager.list()] == ["succeeded"] and Status.read(run).state == "running"
    wait_until(lambda: Status.read(run).state == "succeeded")


def test_a_waiting_job_that_is_stopped_on_a_full_disk_is_stopped_and_can_be_deleted(place, monkeypatch):
    manager = place.manager()
    manager.create(config("a"))
    manager.create(config("b"))
    monkeypatch.setattr("training.job.write_json", no_room)
    assert manager.stop("b").state == "stopped"
    manager.delete("b")
    assert [job.name for job in manager.list()] == ["a"]


def test_stop_asks_and_the_trainer_saves(place):
    manager = place.manager()
    manager.create(config())
    manager.stop("a")
    job = wait_for(manager, "a", "stopped")
    assert job["iter_num"] == 3 and job["error"] is None and not place.backend.killed
    assert manager.stop("a").state == "stopped", "an ended job stays as it is"


def test_a_trainer_that_ignores_the_request_is_killed_after_the_grace(place):
    manager = place.manager(grace=0.1)
    manager.create(config())
    place.backend.deaf = True
    assert manager.stop("a").describe()["stopping"]
    job = wait_for(manager, "a", "stopped")
    assert "was killed" in job["error"] and len(place.backend.killed) == 1


def test_a_waiting_job_leaves_the_queue_when_stopped_or_deleted(place):
    manager = place.manager()
    for name in "abc":
        manager.create(config(name))
    assert manager.stop("b").state == "stopped"
    manager.delete("c")
    place.backend.end("a", state="succeeded", iter_num=1)
    wait_for(manager, "a", "succeeded")
    assert place.backend.started == [("a", False, False)] and manager.counts() == {"running": 0, "queued": 0}


def test_delete_refuses_a_running_job_and_moves_an_ended_one_to_the_trash(place):
    manager = place.manager()
    manager.create(config())
    with pytest.raises(JobBusy, match="running; stop it first"):
        manager.delete("a")
    manager.stop("a")
    wait_for(manager, "a", "stopped")
    manager.delete("a")
    assert list(manager.list()) == [] and len(list((place.workspace.out / ".trash").iterdir())) == 1
    with pytest.raises(NotFound):
        manager.get("a")


@pytest.mark.parametrize("start", ["a", "a/best", "out/a/ckpt.pt"])
def test_a_run_that_a_job_has_yet_to_read_is_neither_deleted_nor_replaced(place, start):
    manager = place.manager()
    manager.create(config("a"))
    place.model("a")
    place.model("a", "best.pt")
    place.backend.end("a", state="succeeded", iter_num=20)
    wait_for(manager, "a", "succeeded")
    manager.create(config("other"))
    manager.create(config("b", init_from=start, learning_rate=1e-3))  # waits for the other
    for change in (lambda: manager.delete("a"), lambda: manager.create(config("a", overwrite=True))):
        with pytest.raises(JobBusy, match="out/a is what the job b starts from; stop it first"):
            change()
    manager.stop("other")
    wait_for(manager, "b", "running")
    with pytest.raises(JobBusy, match="starts from"):
        manager.delete("a")
    place.checkpoint("b")  # from here on it stands for itself
    manager.delete("a")
    assert not place.workspace.run("a").exists() and manager.get("b").state == "running"


def test_a_waiting_job_that_cannot_be_moved_to_the_trash_keeps_its_place(place, monkeypatch):
    manager = place.manager()
    manager.create(config("a"))
    manager.create(config("b"))
    with monkeypatch.context() as patched:
        patched.setattr("training.jobs.move_to_trash", lambda folder: raise_full())
        with pytest.raises(NoSpace, match="out/b"):
            manager.delete("b")
    assert places(manager) == {"b": 1}
    manager.delete("b")
    assert places(manager) == {} and not place.workspace.run("b").exists()


def raise_full():
    raise OSError(errno.ENOSPC, "full")


# ---- resuming


def stopped_job(place, manager, checkpoint=True):
    manager.create(config(max_iters=20))
    if checkpoint:
        place.checkpoint("a")
    manager.stop("a")
    return wait_for(manager, "a", "stopped")


def test_resume_goes_on_from_the_checkpoint_with_more_iterations(place):
    manager = place.manager()
    created = stopped_job(place, manager)["created"]
    job = manager.resume("a", max_iters=50).describe()
    assert job["state"] == "running" and job["max_iters"] == 50 and job["created"] == created
    assert job["config"]["lr_decay_iters"] == 20, "the schedule stays the one the run began with"
    assert place.backend.started[-1] == ("a", True, False)


def test_a_copy_of_a_run_goes_on_in_its_own_folder(place):
    manager = place.manager()
    stopped_job(place, manager)
    shutil.copytree(place.workspace.out / "a", place.workspace.out / "b")
    assert manager.resume("b", max_iters=50).describe()["config"]["output_dir"] == "out/b"
    assert place.backend.started[-1][0] == "b" and manager.get("a").describe()["config"]["output_dir"] == "out/a"


def test_resume_goes_back_to_a_kept_checkpoint(place):
    manager = place.manager()
    stopped_job(place, manager)
    run = place.workspace.run("a")
    kept = run.folder / "ckpt-10.pt"
    kept.write_bytes(b"older weights")
    write_json(run.manifest(kept), {"size": 13, "sha256": sha256_of(kept), "iter_num": 10})
    with pytest.raises(NotFound, match="kept are those of: 10"):
        manager.resume("a", iter_num=7)
    with pytest.raises(ConfigError, match="a has 10 iterations behind it"):
        manager.resume("a", iter_num=10, max_iters=10)
    assert run.checkpoint.read_bytes() == b"weights"
    assert manager.resume("a", iter_num=10).state == "running" and place.backend.started[-1] == ("a", True, False)
    assert run.checkpoint.read_bytes() == b"older weights" and run.previous.read_bytes() == b"weights"


def test_resume_keeps_no_more_checkpoints_than_a_new_run_would(place):
    manager = place.manager()
    manager.create(config(max_iters=20, eval_interval=2, keep_every=5))
    manager.stop("a")
    wait_for(manager, "a", "stopped")
    refusal = "max_iters is 10010; it must be at most 10009: of every 10 iterations one checkpoint is kept"
    with pytest.raises(ConfigError, match=refusal):
        manager.resume("a", max_iters=10_010)
    assert manager.resume("a", max_iters=10_009).describe()["max_iters"] == 10_009


def test_resume_asks_for_room_for_the_checkpoints_that_it_will_keep(place, monkeypatch):
    manager = place.manager()
    manager.create(config(max_iters=20, eval_interval=10, keep_every=1))
    place.checkpoint("a")
    manager.stop("a")
    wait_for(manager, "a", "stopped")
    asked = []
    monkeypatch.setattr("training.admission.require_space", lambda folder, size: asked.append(size))
    (place.workspace.run("a").folder / "ckpt-10.pt").write_bytes(b"weights")
    manager.resume("a", max_iters=40)
    assert asked == [disk_space.OTHER_BYTES + (1 + 3) * len(b"weights")]


def test_nobody_waits_while_a_kept_checkpoint_is_read_and_the_run_stays_as_it_is(place, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()

    def slowly(folder, iter_num):
        reading.set()
        assert go_on.wait(60)

    monkeypatch.setattr("training.jobs.bring_back", slowly)
    manager = place.manager(max_jobs=2)
    stopped_job(place, manager)
    with ThreadPoolExecutor(1) as pool:
        resumed = pool.submit(manager.resume, "a", iter_num=10)
        assert reading.wait(60)
        try:
            assert manager.create(config("b")).state == "running" and manager.counts()["running"] == 1
            for change in (manager.delete, manager.resume, lambda name: manager.create(config(name, overwrite=True))):
                with pytest.raises(JobBusy, match="out/a is about to be resumed; try again in a moment"):
                    change("a")
            with pytest.raises(JobBusy, match="in use by the job a"):
                manager.require_dataset_unused("text")
        finally:
            go_on.set()
        assert resumed.result().state == "running" and place.backend.started[-1] == ("a", True, False)


def test_a_kept_checkpoint_that_cannot_be_read_leaves_the_run_free(place, monkeypatch):
    def fail(folder, iter_num):
        raise OSError(errno.ENOSPC, "No space left on device")

    manager = place.manager()
    stopped_job(place, manager)
    with monkeypatch.context() as patched:
        patched.setattr("training.jobs.bring_back", fail)
        with pytest.raises(NoSpace):
            manager.resume("a", iter_num=10)
    assert manager.get("a").state == "stopped" and manager.resume("a").state == "running"


def test_resume_without_a_checkpoint_starts_again(place):
    manager = place.manager()
    stopped_job(place, manager, checkpoint=False)
    manager.resume("a")
    assert place.backend.started[-1] == ("a", False, False)


def test_resume_refuses_a_running_job_and_one_that_has_nothing_left_to_do(place):
    manager = place.manager()
    manager.create(config(max_iters=20))
    with pytest.raises(JobBusy):
        manager.resume("a")
    place.backend.end("a", state="succeeded", iter_num=20)
    wait_for(manager, "a", "succeeded")
    with pytest.raises(ConfigError, match="max_iters is 20; a has 20 iterations behind it"):
        manager.resume("a")
    with pytest.raises(ConfigError, match="max_iters is -1"):
        manager.resume("a", max_iters=-1)


def test_a_job_that_has_succeeded_is_stopped_before_a_later_goal_and_keeps_its_result(place):
    manager = place.manager()
    stopped_job(place, manager)
    assert not manager.get("a").has_result
    manager.resume("a")
    place.backend.end("a", state="succeeded", iter_num=20)
    wait_for(manager, "a", "succeeded")
    assert manager.resume("a", max_iters=40).has_result
    manager.stop("a")
    job = wait_for(manager, "a", "stopped")
    assert (job["max_iters"], job["has_result"]) == (40, True) and place.restart().get("a").has_result


# ---- restarts


def test_a_restarted_server_finds_running_and_waiting_jobs_again(place):
    manager = place.manager()
    for name in "abc":
        manager.create(config(name))
    again = place.restart()
    assert [again.get(name).state for name in "abc"] == ["running", "queued", "queued"]
    assert [again.get(name).describe()["queue_position"] for name in "bc"] == [1, 2]
    assert len(place.backend.started) == 1, "nothing runs twice"
    place.backend.end("a", state="succeeded", iter_num=1)
    wait_for(again, "b", "running")


def test_a_job_that_ended_while_no_server_ran_gets_its_true_end(place):
    manager = place.manager(max_jobs=2)
    manager.create(config("a"))
    manager.create(config("b"))
    place.managers.pop().close()
    place.backend.end("a", state="succeeded", iter_num=20)
    place.backend.end("b")
    place.backend.codes.clear()  # another server's children: nobody knows their exit codes
    again = place.manager()
    assert again.get("a").describe()["state"] == "succeeded"
    lost = again.get("b").describe()
    assert lost["state"] == "lost" and "without saying how" in lost["error"]


@pytest.mark.fault("F7", "a server dies between a job's start and its note")
def test_a_trainer_whose_start_was_never_recorded_is_adopted_and_not_started_twice(place):
    manager = place.manager()
    manager.create(config("a"))
    manager.create(config("b"))
    place.managers.pop().close()
    me = identify(os.getpid())  # stands for the trainer of b, which holds its folder
    write_json(place.workspace.run("b").folder / TRAINER, me.to_json())
    place.backend.running[me] = place.workspace.run("b")
    again = place.manager(max_jobs=2)
    assert again.get("b").describe()["process_id"] == os.getpid() and len(place.backend.started) == 1


def test_what_a_killed_server_was_about_to_write_in_out_goes_with_the_next_start(place):
    half = temporary_beside(place.workspace.out / ".server.json")
    half.write_text('{"mod')
    place.manager()
    assert not half.exists()


@pytest.mark.fault("F19", "a second manager of one out/")
def test_a_second_server_on_the_same_out_is_refused_by_name(place):
    place.manager()
    with pytest.raises(OutInUse, match=rf"out/.lock is held by another server, process {os.getpid()}"):
        OutLock(place.workspace.out, patience=0.05)


def test_a_full_disk_does_not_keep_a_server_from_holding_out(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    OutLock(tmp_path / "out").release()


def test_a_pipe_in_the_place_of_the_lock_is_refused(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(OutInUse, match=r"\.lock is a pipe or a device, not a file; remove it"):
        OutLock(tmp_path)


def test_a_run_trained_by_hand_is_a_job_too(place):
    run = place.workspace.run("byhand")
    run.folder.mkdir()
    write_json(run.config, {"dataset": "text", "max_iters": 7})
    write_json(run.result, {"state": "succeeded", "iter_num": 7, "exit_code": 0, "finished": 5.0, "error": None})
    job = place.manager().get("byhand").describe()
    assert (job["state"], job["iter_num"], job["finished"]) == ("succeeded", 7, 5.0)


def test_damaged_files_in_a_run_do_not_break_the_list(place):
    for name, content in {"x": b"{", "y": b"[1]", "z": b'{"state": "flying"}'}.items():
        folder = place.workspace.out / name
        folder.mkdir()
        for file in ("status.json", "train_config.json", "result.json", "metrics.jsonl"):
            (folder / file).write_bytes(content)
    assert [job.describe()["state"] for job in place.manager().list()] == ["lost"] * 3


# ---- logs


def test_a_log_is_followed_until_the_job_ends(place):
    manager = place.manager()
    manager.create(config())
    run = place.workspace.run("a")
    run.log.write_bytes(b"first \xc3")
    pieces = manager.follow_log("a", interval=0.01)
    assert next(pieces) == "first " and next(pieces) is None
    with open(run.log, "ab") as f:
        f.write(b"\xa9nd\n")
    assert next(piece for piece in pieces if piece) == "énd\n"
    place.backend.end("a", state="succeeded", iter_num=1)
    assert [piece for piece in pieces if piece] == []


def test_the_tail_of_a_huge_log_is_small_and_quick(place):
    path = place.workspace.root / "train.log"
    with open(path, "wb") as f:
        f.truncate(10 * 2**30)  # 10 GB, nearly all of it a hole
        f.seek(-9, os.SEEK_END)
        f.write(b"the end.\n")
    began = time.process_time()
    text = job_log.tail(path)
    assert text.endswith("the end.\n") and len(text) == 64 * 1024 and time.process_time() - began < 0.2


def test_a_log_over_its_limit_is_cut_under_its_writers_hands(place):
    path = place.workspace.root / "train.log"
    with open(path, "ab", buffering=0) as writer:
        writer.write(b"x" * 3_000_000)
        assert job_log.cap(path, limit=2_000_000) and not job_log.cap(path, limit=2_000_000)
        writer.write(b"more\n")
    data = path.read_bytes()
    assert data.startswith(b"(earlier lines") and data.endswith(b"xmore\n") and len(data) < 1_100_000


# ---- with real trainers


@pytest.mark.timeout(180)  # trainers run at low priority: on a busy machine they wait
def test_a_real_job_outlives_its_server_stops_when_asked_and_goes_on(place):
    first = LocalBackend(place.workspace)
    manager = place.manager(backend=first)
    shape = {"tokenizer": "char", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 2}
    manager.create(config(**shape, max_iters=1_000_000, log_interval=1, eval_interval=1_000_000, threads=1))
    identity = manager.get("a").status.identity
    wait_until(lambda: manager.get("a").describe()["iter_num"] > 0)
    again = place.restart(backend=LocalBackend(place.workspace))  # does not have the trainer as its child
    assert again.get("a").describe()["process_id"] == identity.pid
    again.stop("a")
    stopped = wait_for(again, "a", "stopped", seconds=80)
    assert stopped["error"] is None and stopped["iter_num"] > 0 and stopped["has_checkpoint"]
    assert not first.alive(identity) and first.exit_code(identity) == 0
    again.resume("a", max_iters=stopped["iter_num"] + 5)
    assert wait_for(again, "a", "succeeded", seconds=80)["iter_num"] == stopped["iter_num"] + 5
    rows = [row["iter_num"] for row in metrics.read(place.workspace.run("a").metrics)]
    assert rows == list(range(stopped["iter_num"] + 6)), "no iteration is missing and none came twice"
