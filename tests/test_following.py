"""The step that a runner begins by itself: what it is told, and that tokens are the same whatever is asked for next."""

import random
import time
from typing import Any

import pytest
import torch
from live_server import until
from test_lookahead import At, CountingRunner, outcome
from test_native_runner import DTYPES, REASON, SHAPES, instructions, model_of  # noqa: F401

from inference.native_runner import NativeRunner

MODEL = SHAPES["as GPT-2"]
V = MODEL.vocab_size
Rows = tuple[list[int], list[int], list[int], list[int]]
native = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def next_of(step: Rows, after: list[int], greatest: list[int]) -> Rows:
    """Return the rows that follow a step's rows `after`."""
    _, slots, positions, _ = step
    return (
        [greatest[i] for i in after],
        [slots[i] for i in after],
        [positions[i] + 1 for i in after],
        [*range(len(after))],
    )


def schedule(plain: NativeRunner, draw: random.Random) -> list[tuple[Rows, torch.Tensor, list[int], list[int]]]:
    """Return greedy steps with their logits, where the greatest are, and which rows go on."""
    steps = []
    step: Rows = ([draw.randrange(V) for _ in range(6)], [*range(6)], [0] * 6, [*range(6)])
    while step[0]:
        logits, greatest = plain.rows(*step).clone(), plain.last_argmax
        stay = [i for i, position in enumerate(step[2]) if position < 95 and draw.random() < 0.99]
        steps.append((step, logits, greatest, stay))
        step = next_of(step, stay, greatest)
    return steps


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_the_same_whatever_is_asked_for_after_a_step_that_others_may_follow(dtype, instructions):  # noqa: F811
    model, draw = model_of(MODEL), random.Random(5)
    plain = NativeRunner(model, slots=8, dtype=dtype, threads=1)
    other: Rows = ([1], [6], [0], [0])
    of_other, followed = plain.rows(*other).clone(), 0
    for threads in (2, 3, 2, 3):
        steps, begun = schedule(plain, draw), False
        runner = NativeRunner(model, slots=8, dtype=dtype, threads=threads)
        for number, (step, expected, greatest, stay) in enumerate(steps):
            below = draw.choice((V, V, V, 150))
            follows = runner.follow(stay, *next_of(step, stay, greatest)[1:3], below)
            assert begun or not follows
            time.sleep(draw.choice((0, 0, 2e-5, 1e-4, 1e-3)))
            if draw.random() < 0.1:
                runner.copy(7, 7, 1)
            logits = runner.rows(*step)
            assert runner.last_argmax == greatest and (follows or torch.equal(logits, expected))
            begun = draw.random() < 0.9 and number + 1 < len(steps)
            if begun:
                runner.begin(*steps[number + 1][0])
            followed += begun and follows
            match draw.randrange(12):
                case 0:
                    begun = False
                    assert torch.equal(runner.rows(*other), of_other)
                case 1:
                    assert runner.draw(torch.eye(4), [2], [(0.5, 1.0, 1.0, 0.0, 1.0)], [None]) == [2]
                case 2:
                    runner.release(7)
        runner.close()
    assert followed > 20


def begun(dtype: str, below: int = V) -> tuple[NativeRunner, torch.Tensor, Rows, list[int]]:
    """Return a runner with a step computed that another may follow, its logits, its rows and its tokens."""
    runner = NativeRunner(model_of(MODEL), slots=3, dtype=dtype, threads=2)
    step: Rows = ([7, 8], [0, 2], [0, 0], [0, 1])
    greatest = (runner.rows(*step), runner.last_argmax)[1]
    follows = False
    while not follows:  # it was over before it was told what follows
        runner.begin(*step)
        follows = runner.follow([0, 1], [0, 2], [1, 1], below)
        logits = runner.rows(*step)
    assert runner.last_argmax == greatest
    return runner, logits, next_of(step, [0, 1], greatest), greatest


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_begins_without_being_asked_for(dtype):
    runner, logits, following, _ = begun(dtype)
    expected = NativeRunner(model_of(MODEL), slots=3, dtype=dtype, threads=1)
    expected.rows([7, 8], [0, 2], [0, 0], [0, 1])
    wanted = expected.rows(*following)
    until(lambda: torch.equal(logits, wanted))  # the same memory
    runner.begin(*following)
    assert torch.equal(runner.rows(*following), wanted) and runner.last_argmax == expected.last_argmax


@native
def test_it_does_not_where_a_token_is_none_of_the_text():
    most = max(begun("int8")[3])
    runner, logits, following, greatest = begun("int8", most)
    before = logits.clone()
    time.sleep(0.02)
    assert torch.equal(logits, before) and before.argmax(1).tolist() == greatest
    assert runner.rows(*following).isfinite().all()


@native
def test_what_cannot_follow_is_refused_and_nothing_follows_nothing():
    runner = NativeRunner(model_of(MODEL), slots=3, dtype="fp32", threads=2)
    assert not runner.follow([0], [0], [0], V)  # nothing was begun
    step: Rows = ([7, 8], [0, 2], [0, 0], [0, 1])
    expected = runner.rows(*step).clone()
    wrong: list[Any] = [
        ([], [], [], V),
        ([2], [0], [1], V),
        ([-1], [0], [1], V),
        ([0], [3], [1], V),
        ([0], [0], [96], V),
        ([0], [0], [1], V + 1),
        ([0, 1, 1], [0, 1, 2], [1, 1, 1], V),
    ]
    for following in wrong:
        runner.begin(*step)
        assert not runner.follow(*following)
        assert torch.equal(runner.rows(*step), expected)
    assert NativeRunner(model_of(MODEL), slots=3, dtype="fp32", threads=1).follow is None


@native
def test_a_runner_may_go_while_a_step_follows():
    for _ in range(10):
        runner, *_ = begun("bf16")
        runner.close()


class FollowingRunner(CountingRunner):
    """Notes what it was told to follow, and then gives logits that are not valid."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[list[int], list[int], list[int], int]] = []
        self.follows = False

    def follow(self, *following: Any) -> bool:
        self.told.append(following)
        self.follows = True
        return True

    def rows(self, *step: list[int]) -> torch.Tensor:
        follows, self.follows = self.follows, False
        return super().rows(*step) * (0.0 if follows else 1.0)


def test_a_lane_says_what_follows_and_reads_no_logits_of_what_is_followed() -> None:
    at = At(FollowingRunner())
    a, b = at.join(1, 5), at.join(7, 3)
    at.finish()
    assert outcome(a)[0] == [2, 3, 4, 5, 6] and outcome(b)[0] == [8, 9, 10]
    after = [told[0] for told in at.runner.told]
    assert after == [[0, 1], [0, 1], [0], [0]] and [told[3] for told in at.runner.told] == [32] * 4
    assert [told[1:3] for told in at.runner.told] == [step[1:3] for step in at.runner.begun]


def test_a_lane_says_nothing_where_someone_is_about_to_enter_or_a_row_is_drawn() -> None:
    at = At(FollowingRunner())
    at.quiet = False
    at.join(1, 4)
    at.steps(2)
    at.quiet = True
    at.join(7, 4, temperature=1.0, logit_bias=((9, 100.0),))
    at.steps(3)
    assert at.runner.told == []


def test_a_token_that_stands_for_no_text_is_looked_at_with_its_logits() -> None:
    at = At(FollowingRunner())
    at.lane.vocab_size = 5
    at.runner.follow = lambda *following: False  # what a runner says of a step that is over
    a = at.join(1, 6)
    at.finish()
    assert outcome(a)[0][:3] == [2, 3, 4] and all(token < 5 for token in a.output_ids)
