"""The time-to-loss benchmark: what it keeps of a training, and what it makes of two curves."""

import sys

import pytest
import torch

from bench.bench_time_to_loss import SHAPE, Point, loss, reached, verdict, watched
from bench.nanogpt_recipe import Model
from model import GPT

THEIRS = [Point(250, 20.0, 30.0, 2.4), Point(500, 40.0, 60.0, 1.9)]


def test_a_watcher_keeps_each_checkpoint_that_took_its_place(tmp_path):
    script = (
        "import os, time\n"
        f"for i in range(3):\n    open('{tmp_path}/new', 'w').write(str(i)); os.replace('{tmp_path}/new', "
        f"'{tmp_path}/ckpt.pt')\n    while not os.path.exists(f'{tmp_path}/kept/{{i}}.pt'): time.sleep(0.01)"
    )
    found = watched([sys.executable, "-c", script], tmp_path / "ckpt.pt", tmp_path / "kept", threads=1)
    assert [path.read_text() for *_, path in found] == ["0", "1", "2"]
    for clock in (0, 1):
        assert [point[clock] for point in found] == sorted(point[clock] for point in found)


def test_a_training_that_fails_is_an_error_with_its_last_words(tmp_path):
    with pytest.raises(RuntimeError, match="no such data"):
        watched(
            [sys.executable, "-c", "raise SystemExit('no such data')"],
            tmp_path / "ckpt.pt",
            tmp_path / "kept",
            threads=1,
        )


def test_the_recipes_model_is_ours_in_names_and_arithmetic():
    torch.manual_seed(0)
    theirs, ours = Model(), GPT(SHAPE)
    ours.load_state_dict(theirs.state_dict())
    idx = torch.randint(65, (2, 65))
    x, y = idx[:, :-1], idx[:, 1:].contiguous()
    torch.testing.assert_close(ours(x, y)[1], theirs(x, y))


def test_the_loss_is_the_mean_over_windows_that_do_not_overlap():
    torch.manual_seed(0)
    model, val = GPT(SHAPE), torch.randint(65, (64 * 3 + 7,)).numpy()
    expected = torch.stack(
        [model(*(torch.tensor(val[a + s : a + s + 64])[None] for s in (0, 1)))[1] for a in (0, 64, 128)]
    )
    assert loss(model.state_dict(), val) == pytest.approx(expected.mean().item(), rel=1e-5)


def test_the_verdict_divides_times_to_the_same_loss():
    ours = [Point(100, 5.0, 8.0, 2.0), Point(200, 8.0, 15.0, 1.8), Point(250, 10.0, 19.0, 1.7)]
    assert reached(ours, 1.9) == ours[1]
    said = verdict([THEIRS], [ours])
    assert (
        "ours is 5.00 (5.00-5.00) times as fast, in CPU time 4.00 (4.00-4.00); aim 5: holds" in said
        and "1.700 and 2.400 at 250" in said
    )
    assert "does not hold" in verdict([THEIRS], [[Point(200, 8.1, 1.0, 1.8)]])


def test_a_loss_that_is_never_reached_is_said():
    assert verdict([THEIRS], [[Point(100, 5.0, 5.0, 2.0)]]) == "run 0: ours never reached 1.9000; it ended at 2.0000\n"
