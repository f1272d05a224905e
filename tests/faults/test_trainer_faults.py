"""A trainer that is killed at any moment: what it saved is whole, and what it goes on to is the same, bit by bit."""

import random
import subprocess
import sys
import time

import pytest
from test_train import ROOT, TINY, Place, same_weights

from storage import checkpoints

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
@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_ends_bitwise_as_one_never_killed(tmp_path, kills):
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
    print(f"killed {len(reached)} times, at iterations {reached}: no checkpoint lost")
    assert reached == sorted(reached) and place.losses("killed") == place.losses("straight")
    assert same_weights(place.state("killed"), place.state("straight"))
