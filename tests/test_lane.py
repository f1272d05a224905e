"""A lane: what one loaded model does in a step, here on a clock that only the model moves."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from inference import lane as lanes
from inference.admission import Admission
from inference.lane import Lane
from inference.sequence import SamplingParams, Sequence

DECODE, PER_TOKEN = 0.020, 0.001  # seconds of a step, and of each prompt token in it


class TimedRunner:
    """A model whose steps take the time that a small CPU needs."""

    name, device, dtype, slots, block_size, vocab_size = "timed", "cpu", "fp32", 8, 2048, 16
    position_bytes, last_argmax, independent = 4, None, False

    def __init__(self) -> None:
        self.now, self.steps = 0.0, []

    def rows(self, tokens: list[int], slots: list[int], positions: list[int], want: list[int]) -> torch.Tensor:
        prompt = len(tokens) - len(set(slots)) if len(tokens) > len(set(slots)) else 0
        seconds = DECODE + PER_TOKEN * prompt
        self.now += seconds
        self.steps.append((len(tokens), seconds))
        return torch.zeros(len(want), self.vocab_size)

    def copy(self, source: int, target: int, length: int) -> None: ...

    def release(self, slot: int) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> TimedRunner:
    made = TimedRunner()
    monkeypatch.setattr(lanes, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def lane(runner: TimedRunner) -> Lane:
    served: Any = SimpleNamespace(vocab_size=16, tokenizer=SimpleNamespace(n_vocab=16))
    return Lane(served, runner, Admission(64, 10**6), prefill_tokens=2048)


def join(lane: Lane, prompt: int, n: int) -> Sequence:
    params = SamplingParams(max_new_tokens=n, temperature=0.0)
    sequence = Sequence([0] * prompt, params, output_limit=n)
    sequence.cache_scope = sequence.id  # so that each computes its whole prompt
    lane.admission.enter(sequence)
    lane.add(sequence)
    return sequence


def test_a_prompt_of_1000_tokens_holds_running_streams_up_by_about_one_step(runner: TimedRunner) -> None:
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
    assert max(mixed) <= 2.2 * DECODE and len(mixed) <= 60


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
