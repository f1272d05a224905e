"""The scheduler: who gets a slot, what a step carries, and how much of a prompt at a time."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.scheduler import LOGPROB_PREFILL, Scheduler, Step
from inference.sequence import SamplingParams, Sequence
from inference.slots import Slots


def sequence(prompt: int = 3, limit: int = 5, **params: bool) -> Sequence:
    made = Sequence(list(range(prompt)), SamplingParams(max_new_tokens=limit, **params), output_limit=limit)
    made.cache_scope = made.id
    return made


def scheduler_of(slots: int, prefill_tokens: int) -> Scheduler:
    """Return a scheduler whose sequences find nothing in the cache: each is alone in its scope."""
    return Scheduler(Slots(slots, slots * 1024, lambda *_: None, lambda *_: None), prefill_tokens)


def compute(scheduler: Scheduler, step: Step) -> None:
    """Do what the engine does with a step, on a machine that takes as long for each: samples are the token 7."""
    step.advance()
    scheduler.budget.observe(step.decoding, step.prefilled, 0.004)
    for share in step.shares:
        if share.samples:
            share.sequence.output_ids.append(7)


def next_step(scheduler: Scheduler) -> Step:
    scheduler.admit(0.0)
    step = scheduler.next_step()
    assert step is not None
    return step


def test_slots_are_given_in_the_order_of_arrival_and_the_lowest_free_one_first() -> None:
    scheduler = scheduler_of(slots=2, prefill_tokens=9)
    a, b, c = (sequence() for _ in range(3))
    for s in (a, b, c):
        scheduler.add(s)
    assert scheduler.admit(0.0) == [a, b] and (a.slot, b.slot, c.slot) == (0, 1, None)
    scheduler.remove(a)
    assert a.slot is None and scheduler.admit(0.0) == [c] and c.slot == 0


def test_a_step_carries_prompts_whole_and_wants_their_last_row() -> None:
    scheduler = scheduler_of(slots=2, prefill_tokens=9)
    scheduler.add(sequence(3))
    scheduler.add(sequence(2))
    step = next_step(scheduler)
    assert (step.tokens, step.slots, step.positions) == ([0, 1, 2, 0, 1], [0, 0, 0, 1, 1], [0, 1, 2, 0, 1])
    assert step.want == [2, 4] and step.decoding == 0


def test_decoding_sequences_take_part_in_every_step_beside_a_prompt_in_pieces() -> None:
    scheduler = scheduler_of(slots=2, prefill_tokens=4)
    short, long = sequence(2), sequence(10)
    scheduler.add(short)
    compute(scheduler, next_step(scheduler))
    scheduler.add(long)
    shapes = []
    while long.in_prefill:
        step = next_step(scheduler)
        shapes.append((step.decoding, len(step.tokens), len(step.want)))
        compute(scheduler, step)
    # beside a first token the whole budget; beside a stream none, to see how long that lasts, then more and more
    assert shapes == [(1, 5, 1), (1, 1, 1), (1, 2, 1), (1, 3, 1), (1, 4, 2)]


def test_decoding_sequences_come_in_the_order_of_their_slots() -> None:
    scheduler = scheduler_of(slots=3, prefill_tokens=100)
    a, b, c, d = (sequence(2, limit=50) for _ in range(4))
    for s in (a, b, c):
        scheduler.add(s)
    compute(scheduler, next_step(scheduler))
    scheduler.remove(a)
    scheduler.add(d)
    compute(scheduler, next_step(scheduler))
    assert next_step(scheduler).slots == [0, 1, 2] and d.slot == 0


def test_the_budget_of_a_step_is_shared_by_prompts_in_their_order() -> None:
    scheduler = scheduler_of(slots=3, prefill_tokens=5)
    for size in (3, 4, 4):
        scheduler.add(sequence(size))
    assert [share.count for share in next_step(scheduler).shares] == [3, 2]


def test_prompt_scores_want_every_row_but_the_one_after_the_prompt() -> None:
    scheduler = scheduler_of(slots=2, prefill_tokens=100)
    scheduler.add(sequence(4, limit=0, prompt_logprobs=True))
    scheduler.add(sequence(4, limit=1, prompt_logprobs=True))
    step = next_step(scheduler)
    assert step.want == [0, 1, 2, 4, 5, 6, 7]
    assert [(s.scores, s.samples) for s in step.shares] == [(3, False), (3, True)]


def test_prompt_scores_come_in_small_pieces_since_each_row_has_a_vocabulary_of_logits() -> None:
    scheduler = scheduler_of(slots=1, prefill_tokens=1000)
    scheduler.budget.observe(0, 1000, 0.001)
    scheduler.add(sequence(300, prompt_logprobs=True))
    step = next_step(scheduler)
    assert len(step.tokens) == len(step.want) == LOGPROB_PREFILL


def test_a_waiting_sequence_can_be_removed() -> None:
    scheduler = scheduler_of(slots=1, prefill_tokens=9)
    a, b = sequence(), sequence()
    scheduler.add(a)
    scheduler.add(b)
    scheduler.remove(a)
    assert scheduler.admit(0.0) == [b]
    scheduler.remove(b)
    assert not scheduler.busy and scheduler.next_step() is None


def test_removing_a_stranger_is_an_error() -> None:
    with pytest.raises(ValueError):
        scheduler_of(slots=1, prefill_tokens=9).remove(sequence())


def test_requests_that_come_together_do_not_wait_for_the_second_tokens_of_the_first() -> None:
    scheduler = scheduler_of(slots=3, prefill_tokens=40)
    scheduler.budget.observe(0, 1000, 0.99)
    for _ in range(3):
        scheduler.add(sequence(40))
    steps = []
    for _ in range(4):
        step = next_step(scheduler)
        steps.append((step.decoding, len(step.tokens)))
        compute(scheduler, step)
    assert steps == [(0, 40), (1, 41), (2, 2), (2, 3)]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=8),
    slots=st.integers(1, 4),
    prefill=st.integers(1, 20),
)
def test_any_schedule_computes_every_position_once_and_in_order(
    sizes: list[tuple[int, int, int]], slots: int, prefill: int
) -> None:
    scheduler = scheduler_of(slots, prefill)
    coming = sorted(((join, sequence(p, n)) for p, n, join in sizes), key=lambda x: x[0])
    everyone = [s for _, s in coming]
    for turn in range(1000):
        for _, s in [x for x in coming if x[0] <= turn]:
            scheduler.add(s)
        coming = [x for x in coming if x[0] > turn]
        scheduler.admit(0.0)
        step = scheduler.next_step()
        if step is None:
            if not coming:
                break
            continue
        assert len(step.tokens) == len(step.slots) == len(step.positions) <= prefill + slots
        expected = [(x.sequence.slot, x.sequence.computed + j) for x in step.shares for j in range(x.count)]
        assert list(zip(step.slots, step.positions, strict=True)) == expected
        compute(scheduler, step)
        for share in step.shares:
            if len(share.sequence.output_ids) >= share.sequence.output_limit:
                scheduler.remove(share.sequence)
    assert all(len(s.output_ids) == s.output_limit and s.slot is None for s in everyone)


def test_scheduling_needs_no_torch() -> None:
    code = "import sys, inference.scheduler, inference.backend, inference.admission; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=30).returncode == 0


def test_owners_who_wait_get_the_same_number_of_slots_and_each_in_its_order() -> None:
    scheduler = scheduler_of(4, 16)
    for n, owner in enumerate("aaaaaabbbc"):
        scheduler.add(Sequence([1], SamplingParams(max_new_tokens=4), output_limit=4, id=f"{owner}{n}", owner=owner))
    assert [s.id for s in scheduler.admit(0.0)] == ["a0", "b6", "c9", "a1"]
    scheduler.remove(scheduler.running[2])
    assert [s.id for s in scheduler.admit(0.0)] == ["b7"], "b holds one slot, a two"
    for _ in range(2):
        scheduler.remove(scheduler.running[0])
    assert [s.id for s in scheduler.admit(0.0)] == ["a2", "b8"]


def test_an_owner_alone_takes_every_slot() -> None:
    scheduler = scheduler_of(4, 16)
    for n in range(5):
        scheduler.add(Sequence([1], SamplingParams(max_new_tokens=4), output_limit=4, id=str(n), owner="a"))
    assert [s.id for s in scheduler.admit(0.0)] == ["0", "1", "2", "3"]
