"""A lane: what one loaded model does in a step, here on a clock that only the model moves."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain_runner import PlainRunner

from inference import lane as lanes
from inference.admission import Admission
from inference.lane import Lane
from inference.sequence import SamplingParams, Sequence

DECODE, PER_TOKEN = 0.020, 0.001  # seconds of a step, and of each prompt token in it


class TimedRunner(PlainRunner):
    """A model whose steps take the time that a small CPU needs."""

    name, slots, block_size, vocab_size = "timed", 8, 2048, 16

    def __init__(self) -> None:
        self.beats: list[float] = []
        self.now, self.steps, self.broken, self.failed_after = 0.0, [], False, 0.0

    def rows(self, tokens: list[int], slots: list[int], positions: list[int], want: list[int]) -> torch.Tensor:
        prompt = len(tokens) - len(set(slots)) if len(tokens) > len(set(slots)) else 0
        seconds = DECODE + PER_TOKEN * prompt
        self.now += seconds
        self.steps.append((len(tokens), seconds))
        if self.broken:
            self.now += self.failed_after
            raise RuntimeError("a fault that was asked for")
        return torch.zeros(len(want), self.vocab_size)

    def hidden(self, *step: list[int]) -> torch.Tensor:
        return self.rows(*step)[:, :4]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> TimedRunner:
    made = TimedRunner()
    monkeypatch.setattr(lanes, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def lane(runner: TimedRunner) -> Lane:
    served: Any = SimpleNamespace(vocab_size=16, tokenizer=SimpleNamespace(n_vocab=16))
    return Lane(served, runner, Admission(64, 10**6), prefill_tokens=2048, beat=lambda: runner.beats.append(runner.now))


def join(lane: Lane, prompt: int, n: int) -> Sequence:
    params = SamplingParams(max_new_tokens=n, temperature=0.0)
    sequence = Sequence([0] * prompt, params, output_limit=n)
    sequence.cache_scope = sequence.id  # so that each computes its whole prompt
    lane.admission.enter(sequence)
    lane.add(sequence)
    return sequence


def test_a_prompt_of_1000_tokens_makes_no_running_stream_wait_more_than_two_ordinary_steps(runner: TimedRunner) -> None:
    it = lane(runner)
    for _ in range(4):
        join(it, 20, 500)
    for _ in range(30):
        it.step()
    long = join(it, 1000, 5)
    before = len(runner.steps)
    while not long.output_ids:
        it.step()
    mixed = [seconds for _, seconds in runner.steps[before + 1 :]]
    assert max(mixed) < 2 * DECODE and len(mixed) <= 90


def test_with_nobody_to_hold_up_a_prompt_goes_in_steps_of_half_a_second(runner: TimedRunner) -> None:
    it = lane(runner)
    alone = join(it, 1000, 2)
    while not alone.output_ids:
        it.step()
    assert max(seconds for _, seconds in runner.steps) <= 0.55 and len(runner.steps) <= 5


def test_sixteen_prompts_at_once_are_computed_together(runner: TimedRunner) -> None:
    it = lane(runner)
    join(it, 200, 1)
    while it.busy:
        it.step()
    before = len(runner.steps)
    burst = [join(it, 50, 2) for _ in range(8)]
    it.step()
    assert [len(s.output_ids) for s in burst] == [1] * 8 and len(runner.steps) == before + 1


@pytest.mark.parametrize("embeds", [False, True])
def test_a_step_that_fails_slowly_and_is_tried_share_by_share_is_no_stall(runner: TimedRunner, embeds: bool) -> None:
    it = lane(runner)
    for _ in range(8):
        join(it, 20, 5).embeds = embeds
    runner.broken, runner.failed_after = True, 6.0
    while it.busy:
        it.step()
    assert runner.now > 8 * 6.0
    moments = [*runner.beats, runner.now]
    assert max(later - earlier for earlier, later in pairwise(moments)) < 7.0
