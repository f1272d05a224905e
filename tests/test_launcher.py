"""Runs on several devices: one command starts the processes, and whatever ends one of them, no work is lost."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from live_server import alive, until
from test_train import ROOT, TINY, Place

from learning.launcher import cause, ended, threads_each
from storage import checkpoints
from training import metrics
from training.config import ConfigError, TrainConfig, resolve
from training.hardware import require_devices
from training.job import Job, ranks_of
from training.rank import FOLDER, LAUNCHER, NOTE, Rank

FIELDS = TINY | {"max_iters": 120, "eval_interval": 20, "eval_iters": 1, "sample_tokens": 0, "learning_rate": 1e-3}
TWO = {"nproc_per_node": 2}


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


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
def test_a_killed_process_takes_all_back_to_the_last_checkpoint_and_the_losses_are_those_of_one_process(place):
    with trainer(place, "two", **TWO) as launcher:
        until(lambda: reached(place, "two", 25))
        first = ranks_of(place.run("two"))
        os.kill(first[1]["process_id"], signal.SIGKILL)
        assert launcher.wait(90) == 0, log(place, "two")
    place.train("one", **FIELDS)
    assert same_losses(place, "two", "one") and place.result("two")["state"] == "succeeded"
    notes = [row["note"] for row in metrics.read(place.run("two").metrics) if "note" in row]
    assert notes == ["process 1 of the 2 from 0 to 1 was killed by SIGKILL; restart 1 of 3"]
    assert Job(place.run("two")).describe()["note"] == notes[0] and notes[0] in log(place, "two")
    assert [row["rank"] for row in first] == [0, 1] and ranks_of(place.run("two")) != first


@pytest.mark.timeout(120)
def test_a_request_to_stop_saves_once_loses_no_iteration_and_a_resumed_run_goes_on(place):
    with trainer(place, "two", **TWO, max_iters=100_000) as launcher:
        until(lambda: reached(place, "two", 5))
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) == 0, log(place, "two")
    result, state = place.result("two"), place.state("two")
    assert result["state"] == "stopped" and result["iter_num"] == state["iter_num"] == losses(place, "two")[-1][0]
    end = state["iter_num"] + 10
    with trainer(place, "two", init_from="resume", max_iters=end) as launcher:
        assert launcher.wait(60) == 0, log(place, "two")
    place.train("one", **FIELDS | {"max_iters": end, "lr_decay_iters": 100_000, "warmup_iters": 50})
    assert same_losses(place, "two", "one") and len(losses(place, "two")) == end


@pytest.mark.timeout(120)
def test_nothing_outlives_a_killed_launcher(place):
    with trainer(place, "two", **TWO, max_iters=100_000) as launcher:
        until(lambda: reached(place, "two", 3))
        pids = [row["process_id"] for row in ranks_of(place.run("two"))]
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
            os.kill(ranks_of(place.run("two"))[0]["process_id"], signal.SIGKILL)
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
    ],
)
def test_what_processes_cannot_share_is_refused_before_anything_starts(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        resolve(TrainConfig.parse(TINY | {"output_dir": "out/a"} | fields))
    assert resolve(TrainConfig.parse(TINY | {"output_dir": "out/a", "gradient_accumulation_steps": 3} | TWO))


def test_each_process_needs_a_gpu_of_its_own():
    require_devices("cuda", 2, 2)
    require_devices("auto", 2, 0)
    require_devices("cpu", 9, 1)
    for device, there in (("cuda", 1), ("auto", 1), ("cuda", 0)):
        with pytest.raises(ConfigError, match=f"nproc_per_node is 2, and this machine has {there} GPUs"):
            require_devices(device, 2, there)


def test_a_rank_is_what_torchrun_says_and_what_our_launcher_adds(tmp_path):
    assert Rank.of({}) == Rank() and Rank().world == 1
    said = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert Rank.of(said) == Rank(3, 4, 1, 2)
    ours = Rank.of(said | {LAUNCHER: "77", FOLDER: str(tmp_path), NOTE: ""})
    assert (ours.launcher, ours.folder, ours.note) == (77, tmp_path, None)


def test_the_process_that_was_killed_is_to_blame_and_not_those_that_missed_it():
    assert cause({0: 1, 1: -9}) == (1, -9) and cause({2: 1, 1: 2}) == (1, 2)
    assert ended(1, -15, 2) == "process 1 of the 2 from 0 to 1 was killed by SIGTERM"


def test_processes_share_the_threads_out(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert [threads_each(n) for n in (1, 2, 4, 8)] == [6, 3, 1, 1]


def test_a_job_of_one_process_shows_no_ranks(place):
    place.train("one", max_iters=1)
    assert ranks_of(place.run("one")) == []
    (place.run("one").folder / "trainer.json").write_text(json.dumps({"ranks": "nonsense"}))
    assert ranks_of(place.run("one")) == []
