"""Divergence: a run goes back to its last good checkpoint with a lower rate, says so, and does not try for ever."""
# ruff: noqa: F811 (a fixture imported is a fixture shadowed)

import math

import pytest
import torch
from test_train import place, same_weights, stop_at  # noqa: F401

import train
from storage.runs import Workspace
from training import metrics
from training.job import Job
from training.outcome import Diverged
from training.roll_back import RollBacks


def spoil_once(monkeypatch, iteration: int) -> None:
    """Make a weight NaN before one iteration, the first time that it comes."""
    update, spoilt = train.Trainer.update, []

    def updated(self):
        if self.iter_num == iteration and not spoilt:
            spoilt.append(True)
            with torch.no_grad():
                self.model.lm_head.weight[0] = math.nan
        return update(self)

    monkeypatch.setattr(train.Trainer, "update", updated)


def test_a_run_goes_back_to_its_checkpoint_with_half_the_rate_and_succeeds(place, monkeypatch, capsys):
    place.train("straight", schedule="constant", warmup_iters=0)
    spoil_once(monkeypatch, 9)
    assert place.train("a", schedule="constant", warmup_iters=0) == 0
    note = "rolled back to iteration 6, with 1/2 of learning_rate from here on: the loss is nan at iteration 9"
    assert place.result("a")["note"] == note and note in capsys.readouterr().out
    rates = [row["learning_rate"] for row in metrics.read(place.run("a").metrics) if "learning_rate" in row]
    assert len(rates) == 12 and set(rates[:6]) == {2 * rate for rate in rates[6:]}
    assert place.losses("a")[:7] == place.losses("straight")[:7]
    assert place.state("a")["roll_backs"]["count"] == 1


def test_the_note_is_in_the_metrics_and_in_the_job_while_it_runs(place, monkeypatch):
    spoil_once(monkeypatch, 9)
    place.train("a")
    rows = metrics.read(place.run("a").metrics)
    assert [row["iter_num"] for row in rows if "note" in row] == [6, 12]
    place.run("a").result.unlink()
    assert Job(place.run("a")).describe()["note"].startswith("rolled back to iteration 6")


def test_before_the_first_checkpoint_a_run_starts_again_from_its_initial_weights(place, monkeypatch):
    place.train("straight")
    spoil_once(monkeypatch, 3)
    assert place.train("a") == 0
    assert "rolled back to iteration 0" in place.result("a")["note"]
    first = [next(row for row in place.losses(name) if row[1] is not None) for name in ("a", "straight")]
    assert first[0][1] == first[1][1], "the first loss is that of the same weights"


def test_a_run_resumed_after_a_roll_back_is_bitwise_the_uninterrupted_one(place, monkeypatch):
    with monkeypatch.context() as patch:
        spoil_once(patch, 9)
        place.train("straight", max_iters=20, dropout=0.1)
    with monkeypatch.context() as patch:
        spoil_once(patch, 9)
        stop_at(patch, 14)
        place.train("stopped", max_iters=20, dropout=0.1)
    place.train("stopped", init_from="resume")
    assert place.losses("stopped") == place.losses("straight")
    assert same_weights(place.state("stopped"), place.state("straight"))
    assert place.result("stopped")["note"] == place.result("straight")["note"]


def test_a_run_killed_right_after_a_roll_back_keeps_the_lower_rate(place, monkeypatch):
    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        spoil_once(patch, 9)
        patch.setattr(train.Report, "rolled_back", lambda *args: (_ for _ in ()).throw(Killed))
        patch.setattr(train.Outcome, "__exit__", lambda self, kind, error, trace: kind is Killed)
        place.train("a")
    assert place.state("a")["roll_backs"]["count"] == 1
    assert place.train("a", init_from="resume") == 0 and "with 1/2 of" in place.result("a")["note"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_absurd_rate_recovers_or_fails_with_the_reason(place, optimizer):
    code = place.train("a", learning_rate=10.0, max_iters=60, optimizer=optimizer, grad_clip=0)
    said = place.result("a")["error"] or place.result("a")["note"] or ""
    assert code in (0, 1) and (code == 0 or "lower learning_rate" in said)
    if place.run("a").checkpoint.exists():
        assert all(p.isfinite().all() for p in place.state("a")["model"].values())


# ---- what counts as divergence


def losses_after(usual: list[float], *later: float) -> RollBacks:
    seen = RollBacks(vocab_size=64)
    for i, loss in enumerate([*usual, *later]):
        seen.see(i, loss)
    return seen


def test_several_losses_far_above_the_usual_ones_and_above_guessing_are_a_divergence():
    with pytest.raises(Diverged, match=r"the loss is 6\.000 at iteration 24, far above 2\.000 for 5 iterations"):
        losses_after([2.0] * 20, *[6.0] * 5)


@pytest.mark.parametrize("later", [[6.0] * 4 + [2.0] + [6.0] * 4, [4.0] * 50, [2.9] * 50], ids=str)
def test_a_bad_batch_a_loss_below_guessing_and_a_slow_rise_are_none(later):
    assert losses_after([2.0] * 20, *later).count == 0


def test_a_start_far_above_guessing_is_none():
    assert losses_after([9.0] * 20, 9.5, 9.8, 8.0).spikes == 0


def test_what_a_checkpoint_holds_makes_the_same_judgement():
    seen, resumed = losses_after([2.0] * 20, *[6.0] * 4), RollBacks(vocab_size=64)
    resumed.restore(seen.state())
    with pytest.raises(Diverged, match="far above"):
        resumed.see(24, 6.0)


def test_a_checkpoint_from_within_a_rise_is_passed_over(place):
    place.train("a")
    state = place.state("a")
    rising = state | {"roll_backs": state["roll_backs"] | {"spikes": 2}}
    train.checkpoints.save_checkpoint(place.run("a").checkpoint, rising | {"iter_num": 15})
    assert train.last_good(place.run("a"))["iter_num"] == 12
    assert train.last_good(Workspace(place.workspace.root).run("b")) is None
