"""The prefill budget, on machines that are made up: how long steps last, and that prompts come through."""

import random
from collections.abc import Callable
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.budget import AIM, FIRST, LEAST, LEAST_EMBEDDED, SHORTEST, STEADY, PrefillBudget

Machine = Callable[[int, int, int], float]  # rows that decode, prompt tokens, the position of the first -> milliseconds

BOUND = 2.0  # ordinary steps, which no stream shall wait longer than


def even(rows: int, tokens: int, position: int) -> float:
    return 5 + 0.2 * rows + 0.5 * tokens


def shared(rows: int, tokens: int, position: int) -> float:
    """A small CPU: reading the weights hides the first rows, and tokens read their prompt's cache once more."""
    return max(5.0, 0.55 * (rows + tokens)) + 0.03 * rows * rows**0.5 + (1 + position / 600 if tokens else 0.0)


def flat(rows: int, tokens: int, position: int) -> float:
    """A GPU: a thousand tokens cost as much as a step."""
    return 5 + 0.005 * tokens


def tiled(tile: float) -> Machine:
    return lambda rows, tokens, position: max(5.0, 5 * tile * ceil((rows + tokens) / 12))


def prefill(
    budget: PrefillBudget,
    machine: Machine,
    rows: int,
    noise: Callable[[int], float] = lambda step: 1.0,
    prompt: int = 1000,
) -> list[tuple[int, float]]:
    """Run a prompt beside so many streams; return each step's prompt tokens, and the ordinary steps that it took."""
    for step in range(-9, 0):
        budget.observe(rows, 0, machine(rows, 0, 0) * noise(step) / 1e3)
    steps, position = [], 0
    while position < prompt:
        tokens = min(budget.beside(rows), prompt - position)
        milliseconds = machine(rows, tokens, position) * noise(len(steps))
        budget.observe(rows, tokens, milliseconds / 1e3)
        steps.append((tokens, milliseconds / machine(rows, 0, 0)))
        position += tokens
        assert len(steps) <= 2 * prompt
    return steps


def of_large_model() -> PrefillBudget:
    """Return a budget that has seen what a prompt alone takes: a second for each of its tokens."""
    budget = PrefillBudget(most=512)
    budget.observe(0, 64, 64.0)
    return budget


@pytest.mark.parametrize("rows", [1, 4, 15])
@pytest.mark.parametrize("machine", [even, shared, flat])
def test_no_stream_waits_more_than_two_ordinary_steps_while_a_prompt_is_computed(machine: Machine, rows: int) -> None:
    budget = of_large_model()
    for _ in range(3):  # the first one finds the width, the next ones begin with it
        assert max(lasted for _, lasted in prefill(budget, machine, rows)) <= BOUND


@pytest.mark.parametrize("rows", [1, 4, 15])
@pytest.mark.parametrize("machine", [even, shared])
def test_prompts_get_nearly_all_that_streams_can_spare(machine: Machine, rows: int) -> None:
    budget = of_large_model()
    prefill(budget, machine, rows)
    lasted = sorted(lasted for tokens, lasted in prefill(budget, machine, rows) if tokens)
    assert AIM - 0.15 < lasted[len(lasted) // 2] < AIM + 0.05


def test_where_tokens_cost_nothing_a_step_soon_carries_all_it_may() -> None:
    budget = of_large_model()
    tokens = [tokens for tokens, _ in prefill(budget, flat, 1, prompt=20000) if tokens]
    assert 512 in tokens[:30] and set(tokens[30:-1]) <= {512}


@given(tile=st.floats(0.05, 1.0), rows=st.integers(1, 16))
def test_where_rows_come_in_tiles_one_tile_too_many_is_seldom_tried(tile: float, rows: int) -> None:
    lasted = [lasted for _, lasted in prefill(of_large_model(), tiled(tile), rows)]
    assert max(lasted) <= max(AIM + tile, BOUND) + 1e-9
    assert sum(each > BOUND for each in lasted) <= 1 + len(lasted) / 8


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.sampled_from([1, 4, 15]), machine=st.sampled_from([even, shared, flat]))
def test_steps_that_vary_by_some_percent_stay_below_two(seed: int, rows: int, machine: Machine) -> None:
    rng = random.Random(seed)
    lasted = [lasted for _, lasted in prefill(of_large_model(), machine, rows, lambda _: rng.uniform(0.95, 1.05))]
    assert sum(each > BOUND for each in lasted) <= 0.02 * len(lasted) and max(lasted) < BOUND + 0.15


@given(odd=st.integers(-9, 60), times=st.floats(2.0, 20.0), rows=st.sampled_from([1, 4, 15]))
def test_a_step_that_the_machine_has_held_up_makes_no_other_longer(odd: int, times: float, rows: int) -> None:
    steps = prefill(of_large_model(), shared, rows, lambda step: times if step == odd else 1.0)
    assert all(lasted <= BOUND for step, (_, lasted) in enumerate(steps) if step != odd)


def test_where_tokens_come_to_cost_more_one_step_is_too_long() -> None:
    lasted = prefill(of_large_model(), lambda rows, tokens, at: 8 + (0.5 if at < 400 else 1.0) * tokens, 15)
    assert sum(each > BOUND for _, each in lasted) == 1


def test_on_a_machine_that_gets_twice_as_slow_prompts_soon_get_their_share_again() -> None:
    steps = prefill(of_large_model(), even, 4, lambda step: 1.0 if step < 40 else 2.0, prompt=2000)
    assert all(tokens >= 5 or not tokens for tokens, _ in steps[40 + 4 * STEADY : -1])


def test_a_token_a_step_goes_on_however_much_it_costs() -> None:
    steps = prefill(of_large_model(), lambda rows, tokens, position: 5 + 50 * tokens, 1, prompt=100)
    assert {tokens for tokens, _ in steps} == {0, 1} and len(steps) <= 100 * (1 + 1 / STEADY) + 1


def test_an_ordinary_step_is_measured_first_and_after_some_with_prompts_and_for_other_numbers_of_rows() -> None:
    budget = of_large_model()
    assert budget.beside(4) == 0
    steps = prefill(budget, even, 4)
    assert [step for step, (tokens, _) in enumerate(steps) if not tokens][:3] == [
        STEADY,
        2 * STEADY + 1,
        3 * STEADY + 2,
    ]
    budget.observe(4, 0, 0.006)
    assert budget.beside(2) == budget.beside(6) == 0 < min(budget.beside(3), budget.beside(5))


def test_fewer_streams_have_shorter_steps_in_which_fewer_tokens_fit() -> None:
    budget = of_large_model()
    prefill(budget, shared, 15)
    assert all(lasted <= BOUND for _, lasted in prefill(budget, shared, 1))


def test_a_step_of_other_rows_tells_nothing_of_what_these_can_spare() -> None:
    budget = of_large_model()
    budget.observe(15, 0, 0.012)
    budget.observe(15, 1, 0.013)
    budget.observe(1, 1, 0.004)  # requests that have come together, after the streams
    budget.observe(15, 2, 0.014)
    assert budget.beside(15) == 3


def test_the_end_of_a_prompt_does_not_widen_what_the_next_one_gets() -> None:
    budget = of_large_model()
    prefill(budget, even, 4)
    budget.observe(4, 0, even(4, 0, 0) / 1e3)
    width = budget.beside(4)
    for _ in range(5):
        budget.observe(4, 1, even(4, 1, 0) / 1e3)
    assert budget.beside(4) == width


def test_with_nobody_to_hold_up_a_step_carries_half_a_second() -> None:
    budget = PrefillBudget(most=512)
    assert budget.alone() == FIRST
    budget.observe(0, 10, 0.1)  # a slow machine: 10 ms a token
    assert budget.alone() == 50
    budget.observe(0, 10**6, 1.0)
    assert budget.alone() == 512 and PrefillBudget(most=4).alone() == 4


def test_a_step_that_embeds_lasts_as_long_as_one_that_decodes_or_carries_as_many_as_cost_nearly_the_same() -> None:
    budget = PrefillBudget(most=512)
    assert budget.embedding(decoding=True) == LEAST_EMBEDDED
    budget.observe(0, 1000, 0.1)
    budget.observe(3, 0, 0.005)
    assert (budget.embedding(decoding=True), budget.embedding(decoding=False)) == (50, 512)
    assert PrefillBudget(most=4).embedding(decoding=True) == 4


def test_where_ordinary_steps_are_short_those_with_prompts_may_last_longer_than_two() -> None:
    budget = PrefillBudget(most=512)

    def small(rows: int, tokens: int, position: int) -> float:
        return 0.4 + 0.1 * tokens

    steps = prefill(budget, small, 4)
    most = max(tokens for tokens, _ in steps)
    assert AIM * SHORTEST * 0.8 < small(4, most, 0) / 1e3 <= BOUND * SHORTEST


def test_beside_short_steps_a_few_tokens_are_computed_whatever_holds_steps_up() -> None:
    budget = PrefillBudget(most=512)
    budget.observe(4, 0, 0.0005)
    for _ in range(STEADY):
        assert budget.beside(4) == LEAST
        budget.observe(4, LEAST, 0.05)
    budget.observe(4, 0, 0.0005)
    assert budget.beside(4) == LEAST


def test_a_small_models_prompts_do_not_dribble_where_others_hold_up_its_steps() -> None:
    rng = random.Random(1)
    steps = prefill(
        PrefillBudget(most=512),
        lambda rows, tokens, position: 0.4 + 0.02 * tokens + rng.choice([0, 0.3, 1.5]),
        8,
        prompt=4000,
    )
    assert len(steps) < 4000 / 40
