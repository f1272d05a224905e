"""A trainer that is killed at any moment: what it saved is whole, and what it goes on to is the same, bit by bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import until
from test_train import ROOT, TINY, Place, same_weights

from storage import checkpoints
from storage.runs import Run

FIELDS = TINY | {"max_iters": 400, "eval_interval": 10, "eval_iters": 1, "sample_tokens": 0, "dropout": 0.1}


def killed_after(place: Place, name: str, seconds: float, resume: bool) -> bool:
    """Run train.py and kill it `seconds` after its first new checkpoint; say whether it had ended before."""
    fields = {"init_from": "resume"} if resume else FIELDS
    command = [sys.executable, "train.py", *place.argv(name, **fields)]
    manifest = place.run(name).manifest(place.run(name).checkpoint)
    before = manifest.stat().st_mtime_ns if manifest.exists() else 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as trainer:
        while trainer.poll() is None and not (manifest.exists() and manifest.stat().st_mtime_ns > before):
            time.sleep(0.005)
        time.sleep(seconds)
        ended = trainer.poll() is not None
        trainer.kill()
    return ended


@pytest.mark.timeout(1800)
@pytest.mark.fault("F5", "SIGKILL at a random moment, then resume, again and again")
@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_ends_bitwise_as_one_never_killed(tmp_path, kills, record_property):
    place, moments = Place(tmp_path), random.Random(1)
    subprocess.run([sys.executable, "train.py", *place.argv("straight", **FIELDS)], cwd=ROOT, check=True)
    reached = []
    for i in range(kills):
        if killed_after(place, "killed", moments.uniform(0, 0.1), resume=i > 0):
            break
        checkpoints.newest_valid(place.run("killed"), print)
        state = place.state("killed") if checkpoints.damage(place.run("killed").checkpoint) is None else None
        assert state is not None, "the checkpoint in place is whole after every kill"
        reached.append(state["iter_num"])
    resume = [sys.executable, "train.py", *place.argv("killed", init_from="resume")]
    if reached[-1] < FIELDS["max_iters"]:
        subprocess.run(resume, cwd=ROOT, check=True)
    record_property("found", f"{len(reached)} of {len(reached)} resumes bitwise: every loss and the last weights")
    assert reached == sorted(reached) and place.losses("killed") == place.losses("straight")
    assert same_weights(place.state("killed"), place.state("straight"))


class ForkingTrainer:
    """The process of forking_trainer.py, and the trainer that it runs now."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("forking_trainer.py")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, str(script)], cwd=ROOT, text=True, **pipes)

    def start(self, argv: list[str]) -> int:
        print(json.dumps(argv), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def trainer() -> Iterator[ForkingTrainer]:
    made = ForkingTrainer()
    yield made
    made.close()


def being_written(run: Run) -> set[str]:
    """Return the temporary files of checkpoints, also what a killed trainer left."""
    return {name for name in os.listdir(run.folder) if name.startswith(".ckpt.pt.") and name.endswith(".tmp")}


def kill_while_it_saves(trainer: ForkingTrainer, run: Run, argv: list[str], saves: int, moment: float) -> bool:
    """Start a trainer and kill it `moment` seconds into its next save but `saves`; say whether that was cut short."""
    run.folder.mkdir(exist_ok=True)
    left = being_written(run)
    pid = trainer.start(argv)
    for i in range(saves + 1):
        until(lambda: being_written(run) - left, pause=0.002)
        if i < saves:
            until(lambda: not being_written(run) - left, pause=0.002)
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)
    assert trainer.wait() == signal.SIGKILL
    return bool(being_written(run) - left)


def require_whole(run: Run, place: Place) -> int:
    """Return the iteration of the checkpoint in place, which must be whole."""
    problems: list[str] = []
    assert checkpoints.newest_valid(run, problems.append) == run.checkpoint and problems == []
    return place.state(run.name)["iter_num"]


@pytest.mark.timeout(1800)
@pytest.mark.fault("F1", "SIGKILL while a checkpoint is being written, on a slow disk")
@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_a_trainer_killed_while_it_saves_loses_no_checkpoint_and_goes_on_at_its_step(
    tmp_path, trainer, kills, record_property
):
    place, moments = Place(tmp_path), random.Random(1)
    fields = FIELDS | {"eval_interval": 2, "max_iters": 60 + 5 * kills}
    trainer.start(place.argv("straight", **fields))
    assert trainer.wait() == 0
    run, reached, cut_short = place.run("killed"), [0], 0
    for i in range(kills):
        argv = place.argv("killed", **({"init_from": "resume"} if i > 0 else fields))
        cut_short += kill_while_it_saves(trainer, run, argv, saves=1 + (i % 3 == 0), moment=moments.uniform(0, 0.08))
        reached.append(require_whole(run, place))
        assert reached[-1] > reached[-2], "each life keeps what it has saved"
    trainer.start(place.argv("killed", init_from="resume"))
    assert trainer.wait() == 0 and not [name for name in os.listdir(run.folder) if name.endswith(".tmp")]
    found = f"{kills} of {kills} whole, {cut_short} saves cut short; resumed at its step each time, bitwise; swept"
    record_property("found", found)
    assert cut_short >= kills / 2
    assert place.losses("killed") == place.losses("straight")
    assert same_weights(place.state("killed"), place.state("straight"))
