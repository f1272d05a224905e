"""Batches: the same windows in the same order, read while the work before them is still going on."""

import numpy as np
import pytest
import torch

from learning.batches import Batches
from learning.team import Team
from storage.token_files import BEGINS, LEARNED
from training.config import ConfigError, TrainConfig
from training.examples import order_of
from training.rank import Rank

TOKENS = np.arange(100, dtype=np.uint16)


def batches(accumulation=3, mask=None, vocab_size=100):
    fields = {"dataset": "d", "output_dir": "out/a", "batch_size": 2, "gradient_accumulation_steps": accumulation}
    part, config = (TOKENS, mask), TrainConfig.parse(fields)
    return Batches(part, order_of(*part, 9, 1), config, vocab_size, Team(Rank()), torch.device("cpu"))


def inputs(found):
    return [step.inputs for step in found.next()]


def test_the_windows_are_those_of_the_order_and_the_targets_follow_them():
    order, found = order_of(TOKENS, None, 9, 1), batches()
    for _ in range(5):
        steps = list(found.next())
        assert torch.cat([step.inputs for step in steps])[:, 0].tolist() == order.next(6).tolist()
        assert all(torch.equal(step.targets, step.inputs + 1) for step in steps)
        assert [(step.divisor, step.last) for step in steps] == [(3, False), (3, False), (3, True)]


def test_each_step_is_read_before_anything_waits_for_the_one_before(monkeypatch):
    found, events = batches(accumulation=2), []
    batch = found.batch
    monkeypatch.setattr(found, "batch", lambda starts: events.append("read") or batch(starts))
    for _ in range(2):
        for _ in found.next():
            events.append("queued")
        events.append("wait")
    assert events == ["read", "queued", "read", "queued", "read", "wait", "queued", "read", "queued", "read", "wait"]


def test_the_position_knows_nothing_of_what_was_read_ahead():
    straight, first, second = batches(), batches(), batches()
    expected = [inputs(straight) for _ in range(9)]
    for _ in range(4):  # into the second epoch
        inputs(first)
    second.restore(first.state())
    assert straight.order.epoch > 0
    for later in expected[4:]:
        assert all(map(torch.equal, inputs(second), later))


def test_an_iteration_that_was_left_half_way_is_taken_again():
    found = batches()
    before, steps = found.state(), found.next()
    begun = [next(steps).inputs, next(steps).inputs]
    found.restore(before)
    assert all(map(torch.equal, inputs(found), begun))


def test_what_is_only_read_is_no_target_and_steps_count_by_what_is_learned():
    mask = np.zeros(100, dtype=np.uint8)
    mask[::10] |= BEGINS
    mask[5::10] |= LEARNED
    mask[6:50:10] |= LEARNED
    found = batches(accumulation=2, mask=mask)
    for step in found.next():
        learned = torch.from_numpy((mask & LEARNED > 0)[step.inputs.numpy() + 1])
        assert torch.equal(step.targets, (step.inputs + 1).masked_fill(~learned, -1))
        assert step.divisor * learned.sum() == pytest.approx(sum((s.targets >= 0).sum() for s in again(mask)))


def again(mask):
    return list(batches(accumulation=2, mask=mask).next())


def test_a_token_beyond_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="beyond a vocabulary of 50"):
        for _ in range(9):
            inputs(batches(vocab_size=50))
