"""Runs on several devices: one command starts the processes, and whatever ends one of them, no work is lost."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from live_server import Process, alive, make_root, until
from test_train import ROOT, TEXT, TINY, Place, same_weights

from learning.launcher import cause, ended, threads_each
from storage import checkpoints
from storage.files import temporary_beside
from storage.runs import Workspace
from training import admission, hardware, metrics
from training.config import ConfigError, TrainConfig, resolve
from training.hardware import require_devices
from training.job import Job, Status, ranks_of
from training.process import children, signal_session
from training.rank import FOLDER, LAUNCHER, NOTE, Rank

FIELDS = TINY | {"max_iters": 80, "eval_interval": 20, "eval_iters": 1, "sample_tokens": 0, "learning_rate": 1e-3}
TWO = {"nproc_per_node": 2}
SHARD = TWO | {"shard": "true", "sample_tokens": 4}


@pytest.fixture
def place(tmp_path) -> Iterator[Place]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield Place(tmp_path)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def trainer(place: Place, name: str, **fields) -> Iterator[subprocess.Popen]:
    """Start train.py; whatever is left of it ends with the test."""
    command = [sys.executable, "train.py", *place.argv(name, **(fields if "init_from" in fields else FIELDS | fields))]
    with open(place.workspace.root / f"{name}.log", "a") as log:
        child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        yield child
    finally:
        child.kill()  # what it has started ends with it
        child.wait()


def log(place: Place, name: str) -> str:
    return (place.workspace.root / f"{name}.log").read_text()


def reached(place: Place, name: str, iteration: int) -> bool:
    return metrics.last(place.run(name).metrics).get("iter_num", -1) >= iteration


def losses(place: Place, name: str) -> list[tuple[int, float]]:
    return [(r["iter_num"], r["loss"]) for r in metrics.read(place.run(name).metrics) if "loss" in r]


def same_losses(place: Place, one: str, other: str) -> bool:
    numbers, others = zip(*losses(place, one), strict=True), zip(*losses(place, other), strict=True)
    (iterations, a), (same_iterations, b) = numbers, others
    return iterations == same_iterations and a == pytest.approx(b, abs=1e-4)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fields", [TWO, pytest.param(SHARD, marks=pytest.mark.slow)], ids=["copies", "shards"])
def test_a_killed_process_takes_all_back_to_the_last_checkpoint_and_the_losses_are_those_of_one_process(place, fields):
    with trainer(place, "two", **fields) as launcher:
        until(lambda: reached(place, "two", 25))
        first = ranks_of(place.run("two"))
        half, written = (temporary_beside(path) for path in (place.run("two").checkpoint, place.run("two").status))
        half.touch(), written.touch()  # of the killed process, and of a server that is writing at this moment
        os.kill(first[1], signal.SIGKILL)
        assert launcher.wait(90) == 0, log(place, "two")
    assert written.exists() and not half.exists()
    place.train("one", **FIELDS)
    assert same_losses(place, "two", "one") and place.result("two")["state"] == "succeeded"
    notes = [row["note"] for row in metrics.read(place.run("two").metrics) if "note" in row]
    assert notes == ["process 1 of the 2 from 0 to 1 was killed by SIGKILL; restart 1 of 3"]
    assert Job(place.run("two")).describe()["note"] == notes[0] and notes[0] in log(place, "two")
    assert len(first) == 2 and ranks_of(place.run("two")) != first


@pytest.mark.timeout(120)
def test_shards_make_the_losses_and_the_checkpoint_of_one_process_which_goes_on_with_it(place):
    batch = {"batch_size": 2, "gradient_accumulation_steps": 2, "eval_iters": 3, "max_iters": 40, "lr_decay_iters": 60}
    with trainer(place, "two", **SHARD | batch) as launcher:
        assert launcher.wait(90) == 0, log(place, "two")
    place.train("one", **FIELDS | batch)
    assert same_losses(place, "two", "one")
    one, two = metrics.last(place.run("one").metrics), metrics.last(place.run("two").metrics)
    assert two["val_loss"] == pytest.approx(one["val_loss"], abs=1e-4)
    one, two = place.state("one"), place.state("two")
    assert one.keys() == two.keys() and list(one["model"]) == list(two["model"])
    for name, weight in one["model"].items():
        assert torch.allclose(weight, two["model"][name], atol=1e-4)
    assert [m["exp_avg"].shape for m in one["optimizer"]["state"].values()] == [
        m["exp_avg"].shape for m in two["optimizer"]["state"].values()
    ]
    for name in ("one", "two"):
        assert place.train(name, init_from="resume", max_iters=60, nproc_per_node=1, shard="false") == 0
    assert same_losses(place, "two", "one") and len(losses(place, "two")) == 60


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_request_to_stop_saves_once_loses_no_iteration_and_a_resumed_run_goes_on(place):
    schedule = {"lr_decay_iters": 100_000, "warmup_iters": 50}
    with trainer(place, "two", **TWO | schedule, max_iters=100_000) as launcher:
        until(lambda: reached(place, "two", 5))
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) == 0, log(place, "two")
    result, state = place.result("two"), place.state("two")
    assert result["state"] == "stopped" and result["iter_num"] == state["iter_num"] == losses(place, "two")[-1][0]
    end = state["iter_num"] + 10
    with trainer(place, "two", init_from="resume", max_iters=end) as launcher:
        assert launcher.wait(60) == 0, log(place, "two")
    place.train("one", **FIELDS | schedule | {"max_iters": end})
    assert same_losses(place, "two", "one") and len(losses(place, "two")) == end


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("fields", [TWO, SHARD], ids=["copies", "shards"])
def test_a_resumed_run_of_several_processes_repeats_the_bits_of_one_never_stopped(place, fields):
    fields = fields | {"dropout": 0.1, "lr_decay_iters": 40, "warmup_iters": 2}
    for name, more in (("straight", fields | {"max_iters": 40}), ("resumed", fields | {"max_iters": 20})):
        with trainer(place, name, **more) as launcher:
            assert launcher.wait(60) == 0, log(place, name)
    with trainer(place, "resumed", init_from="resume", max_iters=40) as launcher:
        assert launcher.wait(60) == 0, log(place, "resumed")
    assert place.losses("straight") == place.losses("resumed") and len(place.losses("straight")) == 41
    assert same_weights(place.state("straight"), place.state("resumed"))


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("seconds", [0, 2, 4])
def test_a_request_to_stop_before_the_first_iteration_ends_all_at_once(place, seconds):
    with trainer(place, "two", **TWO, max_iters=100_000) as launcher:
        until(lambda: children(launcher.pid))
        time.sleep(seconds)  # somewhere on the way to the first iteration, or a little after it
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) == 0, log(place, "two")  # the agent would be patient for longer
    assert not place.run("two").result.exists() or place.result("two")["state"] == "stopped"


@pytest.mark.timeout(120)
def test_nothing_outlives_a_killed_launcher(place):
    with trainer(place, "two", **TWO, max_iters=100_000) as launcher:
        until(lambda: reached(place, "two", 3))
        pids = ranks_of(place.run("two"))
        assert all(alive(pid) for pid in pids)
        launcher.kill()
        until(lambda: not any(alive(pid) for pid in pids))
    assert checkpoints.damage(place.run("two").checkpoint) is None or not place.run("two").checkpoint.exists()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_run_whose_processes_are_killed_too_often_fails_and_says_so(place):
    with trainer(place, "two", **TWO, max_restarts=1, max_iters=100_000) as launcher:
        for restart in range(2):
            until(lambda r=restart: reached(place, "two", 25 + 40 * r))
            os.kill(ranks_of(place.run("two"))[0], signal.SIGKILL)
            until(lambda: launcher.poll() is not None or "restart 1 of 1" in log(place, "two"))
        assert launcher.wait(60) == 1
    result = place.result("two")
    assert result["error"] == "process 0 of the 2 from 0 to 1 was killed by SIGKILL, and restarts are used up"
    assert result["state"] == "failed" and result["iter_num"] == place.state("two")["iter_num"] >= 20


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"nproc_per_node": 0}, "nproc_per_node is 0"),
        ({"nproc_per_node": 65}, "nproc_per_node is 65"),
        ({"nproc_per_node": 3}, "batch_size 4 or gradient_accumulation_steps 1 must be a multiple of it"),
        ({"nproc_per_node": 2, "device": "cuda:1"}, "several processes need cuda, cpu or auto"),
        ({"nproc_per_node": 2, "max_restarts": -1}, "max_restarts is -1"),
        ({"shard": True}, "give nproc_per_node, at least 2"),
        ({"nproc_per_node": 2, "shard": True, "optimizer": "muon"}, "it needs whole matrices; use adamw"),
        ({"nproc_per_node": 2, "shard": True, "dtype": "fp16"}, "use bf16 or fp32"),
        ({"nproc_per_node": 2, "shard": True, "compile": True}, "compile is True, which does not go with shard"),
    ],
)
def test_what_processes_cannot_share_is_refused_before_anything_starts(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        resolve(TrainConfig.parse(TINY | {"output_dir": "out/a"} | fields))
    assert resolve(TrainConfig.parse(TINY | {"output_dir": "out/a", "gradient_accumulation_steps": 3} | TWO))


def test_a_finished_run_is_neither_touched_nor_told_of_as_ours(place, capsys):
    assert place.train("a") == 0
    before = place.run("a").result.read_bytes()
    assert place.train("a", **TWO) == 2 and "holds a trained model" in capsys.readouterr().err
    assert place.run("a").result.read_bytes() == before


def test_each_process_needs_a_gpu_of_its_own():
    require_devices("cuda", 2, 2)
    require_devices("auto", 2, 0)
    require_devices("cpu", 9, 1)
    for device, there in (("cuda", 1), ("auto", 1), ("cuda", 0)):
        with pytest.raises(ConfigError, match=f"nproc_per_node is 2, and this machine has {there} GPUs"):
            require_devices(device, 2, there)


def test_a_server_counts_the_gpus_without_torch_and_refuses_a_job_that_wants_more(place, monkeypatch):
    monkeypatch.setattr(hardware, "GPUS", place.workspace.root)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert hardware.gpus() == len(list(place.workspace.root.iterdir())) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.gpus() == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    config = resolve(TrainConfig.parse(TINY | {"output_dir": "out/a", "device": "auto"} | TWO))
    with pytest.raises(ConfigError, match="nproc_per_node is 2, and this machine has 1 GPUs"):
        admission.check(config, place.workspace, place.run("a"))
    admission.check(config.model_copy(update={"device": "cpu"}), place.workspace, place.run("a"))


def test_a_rank_is_what_torchrun_says_and_what_our_launcher_adds(tmp_path):
    assert Rank.of({}) == Rank() and Rank().world == 1
    said = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert Rank.of(said) == Rank(3, 4, 1, 2)
    ours = Rank.of(said | {LAUNCHER: "77", FOLDER: str(tmp_path), NOTE: ""})
    assert (ours.launcher, ours.folder, ours.note) == (77, tmp_path, None)


def test_the_process_that_was_killed_is_to_blame_and_not_those_that_missed_it():
    assert cause({0: 1, 1: -9}) == (1, -9) and cause({2: 1, 1: 2}) == (2, 1) and cause({1: -9, 0: -9}) == (1, -9)
    assert cause({0: -15, 1: 1}) == (1, 1) and cause({0: -6, 1: -11}) == (1, -11)
    assert ended(1, -15, 2) == "process 1 of the 2 from 0 to 1 was killed by SIGTERM"


def test_processes_share_the_threads_out(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert [threads_each(n) for n in (1, 2, 4, 8)] == [6, 3, 1, 1]


def test_a_job_of_one_process_shows_no_ranks(place):
    place.train("one", max_iters=1)
    assert ranks_of(place.run("one")) == []
    (place.run("one").folder / "trainer.json").write_text(json.dumps({"ranks": "nonsense"}))
    assert ranks_of(place.run("one")) == []


# ---- through the server


PATIENCE = 90  # a job yields to everybody: on a busy machine its processes take long to start


@pytest.fixture
def root(tmp_path) -> Iterator[Path]:
    (tmp_path / "data" / "sums").mkdir(parents=True)
    (tmp_path / "data" / "sums" / "sums.txt").write_text(TEXT)
    yield make_root(tmp_path)
    status = Status.read(Workspace(tmp_path).run("two"))
    if status is not None and status.identity is not None:  # a test that failed would leave its job behind
        signal_session(status.identity, signal.SIGKILL)


@contextlib.contextmanager
def served(root) -> Iterator[Process]:
    server = Process(root, "--slots", "2", "--threads", "1")
    try:
        yield server
    finally:
        server.end()


def train(server: Process, **fields):
    return server.post("/api/train", FIELDS | TWO | {"output_dir": "out/two"} | fields)


def job(server: Process) -> dict:
    return server.get("/api/jobs/two").json()


@pytest.mark.timeout(200)
def test_a_job_on_several_devices_shows_its_ranks_and_stops_with_all_of_them_by_http(root):
    with served(root) as server:
        refused = train(server, nproc_per_node=3)
        assert refused.status_code == 400 and "must be a multiple of it" in refused.json()["error"]
        started = train(server, max_iters=100_000)
        assert started.status_code == 200, started.json()
        until(lambda: job(server)["iter_num"] >= 5, PATIENCE)
        found = job(server)
        pids = found["ranks"]
        assert len(pids) == 2 and found["process_id"] not in pids
        assert found["process_id"] == started.json()["process_id"] and all(alive(pid) for pid in pids)
        assert os.getpriority(os.PRIO_PROCESS, pids[1]) >= 10
        server.post("/api/jobs/two/stop", {})
        until(lambda: job(server)["state"] != "running")
        found = job(server)
        assert (found["state"], found["ranks"]) == ("stopped", []) and not any(alive(pid) for pid in pids)
        saved = torch.load(root / "out" / "two" / "ckpt.pt", weights_only=True)["iter_num"]
        assert found["iter_num"] == saved == metrics.last(root / "out" / "two" / "metrics.jsonl")["iter_num"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_on_several_devices_outlives_the_server_and_goes_on_after_a_stop(root):
    with served(root) as server:
        assert train(server, max_iters=100_000).status_code == 200
        until(lambda: job(server)["iter_num"] >= 3, PATIENCE)
        before, worker = job(server), server.worker()
        server.child.kill()
        os.kill(worker, signal.SIGKILL)
    with served(root) as server:
        found = job(server)
        assert found["state"] == "running" and found["ranks"] == before["ranks"]
        assert found["process_id"] == before["process_id"]
        server.post("/api/jobs/two/stop", {})
        until(lambda: job(server)["state"] == "stopped")
        reached = job(server)["iter_num"]
        server.post("/api/jobs/two/resume", {"max_iters": reached + 20})
        until(lambda: job(server)["state"] not in ("queued", "running"), PATIENCE)
        assert job(server)["state"] == "succeeded", (root / "out" / "two" / "train.log").read_text()[-3000:]
        rows = [row["iter_num"] for row in metrics.read(root / "out" / "two" / "metrics.jsonl") if "loss" in row]
        assert rows == list(range(1, reached + 21))
