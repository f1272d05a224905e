"""The slots: what a sequence finds of its prompt in the cache, whose it is, and how much all of it may take."""

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import VOCAB, FakeRunner, drain, greedy, loader, naive, reference, tiny, torch_runner, until

from inference.build import build_runner
from inference.engine import Engine
from inference.sequence import SamplingParams, Sequence
from inference.slots import BLOCK, LEAST_SHARED, WORTH_WAITING, Slots, shared_length, whole_blocks


class Memory:
    """A runner's slots: notes copies and what was given back."""

    def __init__(self, count: int = 4, positions: int = 10**6):
        self.copied: list[tuple[int, int, int]] = []
        self.released: list[int] = []
        self.slots = Slots(count, positions, lambda *a: self.copied.append(a), self.released.append)

    def run(self, prompt: list[int], output: int = 4, computed: int | None = None, **more: Any) -> Sequence:
        """Let a sequence enter, and note that so many tokens were computed; None: all but the last one."""
        made = sequence(prompt, output, **more)
        assert self.slots.enter(made)
        made.output_ids = [7] * output
        made.computed = len(prompt) + output - 1 if computed is None else computed
        return made

    def keep(self, prompt: list[int], **more: Any) -> None:
        """Let a sequence run to its end."""
        self.slots.leave(self.run(prompt, **more), keep=True)


def sequence(prompt: list[int], output: int = 4, scope: str = "", **params: bool) -> Sequence:
    asked = SamplingParams(max_new_tokens=output, **params)
    return Sequence(prompt, asked, output_limit=output, cache_scope=scope)


def enter(memory: Memory, prompt: list[int], **more: Any) -> Sequence:
    made = sequence(prompt, **more)
    assert memory.slots.enter(made)
    return made


LONG = list(range(100))


@given(st.lists(st.integers(0, 1), max_size=9), st.lists(st.integers(0, 1), max_size=9), st.integers(0, 9))
def test_the_shared_length_is_that_of_a_loop(a: list[int], b: list[int], most: int) -> None:
    expected = 0
    while expected < min(len(a), len(b), most) and a[expected] == b[expected]:
        expected += 1
    assert shared_length(a, b, most) == expected


def test_a_prompt_goes_on_in_the_slot_of_the_one_it_continues() -> None:
    memory = Memory()
    memory.keep(LONG)
    memory.keep([99, 98, 97] * 9)
    following = enter(memory, [*LONG, 7, 7, 7, 5, 5])
    assert (following.slot, following.computed, following.cached_tokens) == (0, 103, 103)
    assert memory.copied == [] and memory.slots.saved == 103


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    memory = Memory()
    memory.keep(LONG)
    assert enter(memory, LONG).computed == 99


def test_a_short_beginning_of_a_long_text_is_copied_so_that_the_text_stays() -> None:
    memory = Memory()
    memory.keep(LONG)
    brief = enter(memory, [*LONG[:20], 55, 55])
    assert (brief.slot, brief.computed) == (1, 20) and memory.copied == [(0, 1, 20)]
    assert enter(memory, [*LONG, 3]).slot == 0, "what was kept is still there"


def test_the_beginning_of_a_running_sequence_is_copied() -> None:
    memory = Memory()
    memory.run(LONG)
    assert enter(memory, [*LONG, 3]).computed == 100 and memory.copied == [(0, 1, 100)]


def test_few_shared_tokens_are_computed_again() -> None:
    memory = Memory()
    memory.keep(LONG)
    assert enter(memory, [*LONG[: LEAST_SHARED - 1], 99, 99]).cached_tokens == 0
    assert enter(memory, [*LONG[:LEAST_SHARED], 99, 99]).cached_tokens == LEAST_SHARED


def test_scopes_do_not_see_each_other_running_or_ended() -> None:
    memory = Memory()
    memory.keep(LONG, scope="a")
    memory.run([5, *LONG], scope="a")
    assert enter(memory, LONG, scope="b").cached_tokens == 0
    assert enter(memory, [5, *LONG], scope="b").cached_tokens == 0
    assert enter(memory, LONG, scope="a").cached_tokens == 99


def test_scores_of_a_prompt_are_always_computed() -> None:
    memory = Memory()
    memory.keep(LONG)
    assert enter(memory, LONG, prompt_logprobs=True).computed == 0


def test_what_a_failed_sequence_has_written_is_not_kept() -> None:
    memory = Memory()
    memory.slots.leave(memory.run(LONG), keep=False)
    assert enter(memory, LONG).cached_tokens == 0


def test_a_sequence_waits_for_one_that_computes_its_beginning_and_then_copies_it() -> None:
    memory = Memory()
    first, second = enter(memory, [*LONG, 1]), enter(memory, [*LONG, 2])
    assert memory.slots.ready(first) and not memory.slots.ready(second)
    first.computed = 99
    assert not memory.slots.ready(second)
    first.computed = 101
    assert memory.slots.ready(second) and second.cached_tokens == 100 and memory.copied == [(0, 1, 100)]


def test_a_sequence_goes_on_alone_when_the_one_it_waits_for_has_gone() -> None:
    memory = Memory()
    first, second = enter(memory, [*LONG, 1]), enter(memory, [*LONG, 2])
    memory.slots.leave(first, keep=False)
    assert memory.slots.ready(second) and second.computed == 0


def test_nobody_waits_for_few_tokens() -> None:
    memory = Memory()
    enter(memory, LONG[: WORTH_WAITING + 1])
    assert not memory.slots.ready(enter(memory, LONG[: WORTH_WAITING + 1]))
    memory = Memory()
    enter(memory, [*LONG[: WORTH_WAITING - 1], 1])
    assert memory.slots.ready(enter(memory, [*LONG[: WORTH_WAITING - 1], 2]))


def test_the_least_recently_used_slot_is_taken() -> None:
    memory = Memory(count=2)
    memory.keep([1] * 20)
    memory.keep([2] * 20)
    enter(memory, [3] * 20)
    assert memory.slots.enter(sequence([1] * 20)) and memory.slots.full and memory.slots.saved == 0


def test_running_sequences_reserve_what_they_may_need_and_the_next_waits() -> None:
    memory = Memory(positions=3 * BLOCK)
    first = enter(memory, [1] * 60, output=BLOCK)
    assert memory.slots.held == 2 * BLOCK and not memory.slots.enter(sequence([2] * 60, output=BLOCK))
    assert memory.slots.enter(sequence([3] * 20, output=20)) and memory.slots.held == 3 * BLOCK
    memory.slots.leave(first, keep=False)
    assert memory.slots.enter(sequence([2] * 60, output=BLOCK))


def test_what_was_kept_longest_gives_way_and_its_memory_goes_back() -> None:
    memory = Memory(positions=3 * BLOCK)
    for first in (1, 2):
        memory.keep([first] * 40)
    assert memory.slots.kept == 2 * BLOCK
    enter(memory, [9] * 60, output=BLOCK)
    assert memory.released == [0] and (memory.slots.kept, memory.slots.held) == (BLOCK, 3 * BLOCK)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 5), blocks=st.integers(4, 8))
def test_the_budget_is_kept_whoever_comes_and_goes_and_an_empty_house_has_room(
    seed: int, count: int, blocks: int
) -> None:
    rng, memory = random.Random(seed), Memory(count, positions=blocks * BLOCK)
    running: list[Sequence] = []
    for _ in range(60):
        new = sequence([rng.randint(0, 1)] * rng.randint(1, 200), output=rng.randint(0, 50), scope=rng.choice("ab"))
        entered = memory.slots.enter(new)
        assert entered or running, "with nobody running there is room for anyone"
        if entered:
            running.append(new)
        assert memory.slots.held <= memory.slots.positions
        for s in running:
            if memory.slots.ready(s):
                s.computed = rng.randint(s.computed, len(s.prompt_ids))
        if (running and rng.random() < 0.6) or not entered:
            memory.slots.leave(running.pop(rng.randrange(len(running))), keep=rng.random() < 0.8)
        assert memory.slots.held <= memory.slots.positions
        assert len({s.slot for s in running}) == len(running)


# --- in the engine ---


@settings(max_examples=10, deadline=None)
@given(data=st.data(), slots=st.integers(1, 4), prefill=st.integers(1, 40), memory=st.sampled_from([None, 1, 2]))
@pytest.mark.parametrize("build", [torch_runner, build_runner], ids=["torch", "the best here"])
def test_any_schedule_of_prompts_that_begin_alike_gives_the_naive_tokens(
    build: Any, data: st.DataObject, slots: int, prefill: int, memory: int | None
) -> None:
    rng, model = random.Random(data.draw(st.integers(0, 10**6))), tiny()
    one = whole_blocks(model.config.block_size) * 2 * 2 * 32 * 4  # bytes of a full sequence in fp32
    limit = None if memory is None else memory * one
    engine = Engine(
        Path("."), loader=loader, build=build, slots=slots, prefill_tokens=prefill, cache_memory=limit, dtype="fp32"
    )
    try:
        served = engine.load(reference())
        stems = [[rng.randrange(VOCAB) for _ in range(rng.randint(LEAST_SHARED, 36))] for _ in range(2)]
        jobs = []
        for _ in range(data.draw(st.integers(2, 12))):
            stem = rng.choice(stems)
            prompt = stem[: rng.randint(1, len(stem))] + [rng.randrange(VOCAB) for _ in range(rng.randint(0, 4))]
            jobs.append((prompt, engine.submit(served, prompt, greedy(7))))
            if rng.random() < 0.4:
                drain(jobs[-1][1])
                jobs[-1] = (prompt, engine.submit(served, prompt, greedy(7)))
            if rng.random() < 0.2:
                engine.submit(served, prompt, greedy(7)).cancel()
        for prompt, generation in jobs:
            assert drain(generation)[0] == naive(model, prompt, 7)
    finally:
        engine.close(0.0)


@pytest.fixture
def engine() -> Any:
    made = Engine(Path("."), loader=loader, build=torch_runner, slots=4)
    yield made
    made.close(0.0)


def test_a_request_tells_how_much_of_its_prompt_was_in_the_cache(engine: Engine) -> None:
    served, prompt = engine.load(reference()), list(range(30))
    for expected in (0, 29):
        generation = engine.submit(served, prompt, greedy(2), request_id="r")
        drain(generation)
        known = engine.request("r")
        assert generation.cached_tokens == expected and known is not None and known["cached_tokens"] == expected
    info = engine.info()
    assert info["cache_saved"] == 29 and info["cache_tokens"] == info["cache_kept"] == BLOCK
    assert info["cache_capacity"] == 4 * BLOCK and info["cache_bytes"] == BLOCK * 2 * 2 * 32 * 4


def test_requests_of_two_scopes_share_nothing(engine: Engine) -> None:
    served, prompt = engine.load(reference()), list(range(30))
    found = []
    for scope in ("a", "b", "a", "b"):
        generation = engine.submit(served, prompt, greedy(2), cache_scope=scope)
        drain(generation)
        found.append(generation.cached_tokens)
    assert found == [0, 0, 29, 29]


def test_sequences_that_come_together_compute_their_beginning_once() -> None:
    runner = FakeRunner(slots=5)
    engine = Engine(Path("."), loader=loader, build=lambda model, asked: (runner, "a test"))
    try:
        served, prompt = engine.load(reference()), list(range(40))
        runner.gate.clear()
        crowd = [engine.submit(served, [7], greedy(2))]
        until(lambda: engine.info()["running"] == 1)
        crowd += [engine.submit(served, prompt, greedy(2)) for _ in range(4)]
        runner.gate.set()
        assert [drain(generation)[0] for generation in crowd] == [[8, 9]] + [[40, 41]] * 4
        assert [generation.cached_tokens for generation in crowd] == [0, 0, 39, 39, 39]
        assert sum(slots.count(2) for _, slots, _ in runner.seen) <= 2
    finally:
        runner.gate.set()
        engine.close(0.0)


def test_cache_memory_without_room_for_one_sequence_refuses_the_model() -> None:
    engine = Engine(Path("."), loader=loader, build=torch_runner, cache_memory=1000)
    try:
        with pytest.raises(ValueError, match=r"cache_memory is 0.0 MiB; m needs 1 MiB for one sequence of 48 tokens"):
            engine.load(reference())
        assert engine.served() is None
    finally:
        engine.close(0.0)
