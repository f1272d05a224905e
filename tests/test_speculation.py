"""Speculation: what is drafted and when, that it never changes a token, and that wrong drafts cost next to nothing."""

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import (
    EOT,
    VOCAB,
    FakeRunner,
    FakeTokenizer,
    drain,
    greedy,
    loader,
    naive,
    reference,
    torch_runner,
    until,
)  # fmt: skip

from inference.build import build_runner
from inference.engine import Engine
from inference.native_runner import NativeRunner
from inference.scheduler import Share, Step
from inference.sequence import Failure, Finished, FinishReason, SamplingParams, Sequence, Token
from inference.slots import BLOCK
from inference.speculation import CREDIT, PRICE, ROWS, Drafter, Speculation, most_drafting
from model import GPT, GPTConfig

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=160, vocab_size=VOCAB)
REASON = NativeRunner.unsupported(SHAPE, "fp32")
native = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def decoding(prompt: list[int], output: list[int], limit: int = 1000, **params: Any) -> Sequence:
    """Return a sequence whose last token is the next to be computed."""
    asked = SamplingParams(**{"max_new_tokens": limit, "temperature": 0.0, **params})
    made = Sequence(prompt, asked, output_limit=limit, output_ids=output)
    made.computed = len(prompt) + len(output) - 1
    return made


# --- what is drafted ---


def test_a_draft_is_what_followed_the_last_time() -> None:
    assert Drafter(decoding([1, 2, 3, 4, 5, 1, 2, 6, 7, 8, 9, 1], [2])).draft() == [6, 7, 8, 9]


def test_six_tokens_alike_say_more_than_the_last_two() -> None:
    ids = [1, 2, 3, 4, 5, 6, 70, 71, 72, 73, 5, 6, 80, 1, 2, 3, 4, 5]
    assert Drafter(decoding(ids, [6])).draft() == [70, 71, 72, 73]


def test_a_draft_goes_round_in_a_loop_past_the_end_of_the_text() -> None:
    assert Drafter(decoding([9, 1, 2, 3, 1, 2], [3])).draft() == [1, 2, 3, 1]


def test_nothing_is_drafted_where_nothing_is_alike_or_the_text_is_short() -> None:
    assert Drafter(decoding([1, 2, 3, 4], [5])).draft() == []
    assert Drafter(decoding([1], [1])).draft() == []


def test_a_draft_knows_of_what_was_generated_meanwhile() -> None:
    sequence = decoding([1, 2, 3], [4])
    drafter = Drafter(sequence)
    assert drafter.draft() == []
    sequence.output_ids += [50, 51, 1, 2]
    assert drafter.draft()[:3] == [3, 4, 50]


def test_a_draft_leaves_room_for_the_token_that_comes_without_one() -> None:
    assert Drafter(decoding([1, 2] * 4, [1, 2], limit=5)).draft() == [1, 2]
    assert Drafter(decoding([1, 2] * 4, [1, 2], limit=3)).draft() == []


def test_a_draft_stays_in_the_block_of_the_row_before_it() -> None:
    assert Drafter(decoding([1, 2] * (BLOCK // 2 - 1), [1])).draft() == [2]
    assert Drafter(decoding([1, 2] * (BLOCK // 2 - 1), [1, 2])).draft() == []


def test_drafts_grow_while_they_are_right_and_shrink_when_they_are_not() -> None:
    drafter = Drafter(decoding([1, 2] * 10, [1]))
    sizes = []
    for right in (4, 8, ROWS - 1, 0, 3, 0):
        sizes.append(len(drafter.draft()))
        drafter.learn(sizes[-1], right)
    assert sizes == [4, 8, ROWS - 1, ROWS - 1, 5, 3]


# --- what wrong drafts cost ---


def wrong_drafts(tokens: int) -> list[int]:
    """Return how many tokens were drafted at each step of a sequence whose drafts are never right."""
    drafter, sizes = Drafter(decoding([1, 2] * 10, [1], limit=10**6)), []
    for _ in range(tokens):
        sizes.append(len(drafter.draft()))
        if sizes[-1] > 0:
            drafter.learn(sizes[-1], 0)
    return sizes


def test_wrong_drafts_stop_soon_and_are_tried_again_more_and_more_seldom() -> None:
    sizes = wrong_drafts(5000)
    assert sum(sizes[:100]) * PRICE <= 2 * CREDIT
    tries = [i for i, size in enumerate(sizes) if size > 0]
    gaps = [gap for a, b in pairwise(tries) if (gap := b - a) > 1]
    assert gaps == sorted(gaps) and gaps[-1] > 200
    assert sum(sizes[1000:]) * PRICE < 0.01 * 4000


def test_drafts_that_pay_again_make_the_next_pause_short_again() -> None:
    drafter = Drafter(decoding([1, 2] * 10, [1], limit=10**6))

    def wait() -> int:
        waited = 0
        while drafter.draft() == []:
            waited += 1
        return waited

    def fail() -> int:
        while drafter.draft():
            drafter.learn(ROWS - 1, 0)
        return wait() + 1

    assert [fail() for _ in range(3)] == [8, 16, 32]
    drafter.learn(4, 4)
    assert fail() == 8


def test_rows_to_spare_are_shared_and_there_are_none_with_many_sequences() -> None:
    speculation = Speculation(ROWS)
    crowd = [decoding([1, 2] * 10, [1]) for _ in range(4)]
    for sequence in crowd:
        speculation.drafts([sequence])
        speculation.learn(sequence, 4, 4)
    assert [len(draft) for draft in speculation.drafts(crowd).values()] == [2] * 4
    assert (speculation.drafted, speculation.accepted) == (16, 16)
    assert speculation.drafts(crowd * (ROWS // 4)) == {}
    assert Speculation(0).drafts(crowd) == {}


def test_of_a_small_model_only_a_few_sequences_draft_beside_each_other() -> None:
    crowd = [decoding([1, 2] * 10, [1]) for _ in range(4)]
    small, large = Speculation(most_drafting(10**6)), Speculation(most_drafting(124 * 10**6))
    assert len(small.drafts(crowd[:3])) == 3 and small.drafts(crowd) == {}
    assert len(large.drafts(crowd)) == 4


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.8},
        {"logit_bias": ((3, 1.0),)},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"min_tokens": 5},
    ],
    ids=str,
)
def test_only_a_sequence_that_takes_the_greatest_logit_drafts(params: dict[str, Any]) -> None:
    assert Speculation(ROWS).drafts([decoding([1, 2] * 10, [1], **params)]) == {}


# --- a step with drafts ---


def test_a_step_wants_the_logits_of_every_row_of_a_draft() -> None:
    step = Step()
    step.add(decoding([5, 6], [7]), 3, 1, [8, 9])
    step.add(decoding([5, 6], [7]), 4, 1)
    assert (step.tokens, step.slots, step.positions) == ([7, 8, 9, 7], [3, 3, 3, 4], [2, 3, 4, 2])
    assert step.want == [0, 1, 2, 3] and (step.decoding, step.prefilled) == (2, 0)


@pytest.mark.parametrize(
    ("chosen", "accepted"),
    [([8, 9, 10], 3), ([8, 5, 10], 2), ([5, 9, 10], 1), ([8, None, 10], 2), ([EOT, 9, 10], 1)],
    ids=str,
)
def test_what_follows_a_wrong_draft_never_happened(chosen: list[int | None], accepted: int) -> None:
    sequence = decoding([5, 6], [7])
    tokens = [None if token_id is None else Token(token_id) for token_id in chosen]
    step = Step()
    step.add(sequence, 0, 1, [8, 9])
    step.advance()
    assert step.shares[0].accept(tokens) == tokens[:accepted]
    assert sequence.computed == 2 + accepted


def test_a_drafted_token_that_ends_the_text_is_the_last_one() -> None:
    sequence = decoding([5, 6], [7])
    sequence.stop_ids, sequence.computed = frozenset({EOT}), 5
    share = Share(sequence, 3, True, 0, 3, [EOT, 9])
    assert share.accept([Token(EOT), Token(9), Token(10)]) == [Token(EOT)] and sequence.computed == 3


# --- the engine ---


class LoopRunner(FakeRunner):
    """Goes round in a loop of five tokens; its rows are independent."""

    independent = True

    def rows(self, tokens: list[int], slots: list[int], positions: list[int], want: list[int]) -> torch.Tensor:
        super().rows(tokens, slots, positions, want)
        logits = torch.zeros(len(want), VOCAB)
        for row, i in enumerate(want):
            logits[row, (tokens[i] + 1) % 5] = 9.0
        return logits


@pytest.fixture
def engine_of() -> Iterator[Callable[..., tuple[Engine, Any]]]:
    """Return a maker of engines on a given runner, or builder, with a model loaded; it returns that, too."""
    engines: list[Engine] = []

    def make(runner: Any, **options: Any) -> tuple[Engine, Any]:
        build = runner if callable(runner) else lambda model, asked: (runner, "a test")
        engines.append(Engine(Path("."), **{"loader": loader, "build": build, "device": "cpu", **options}))
        return engines[-1], engines[-1].load(reference())

    yield make
    for engine in engines:
        engine.close(0.0)


Make = Callable[..., tuple[Engine, Any]]


def test_text_that_repeats_takes_few_steps(engine_of: Make) -> None:
    runner = LoopRunner()
    engine, served = engine_of(runner)
    ids, end = drain(engine.submit(served, [0, 1, 2], greedy(40)))
    assert ids == [(3 + i) % 5 for i in range(40)] and end.reason == FinishReason.LENGTH
    until(lambda: engine.info()["tokens"] == 40)  # they are counted after they were handed out
    info = engine.info()
    assert runner.steps < 16
    assert info["drafted_tokens"] >= info["accepted_tokens"] > 25


def test_speculation_can_be_turned_off(engine_of: Make) -> None:
    runner = LoopRunner()
    engine, served = engine_of(runner, speculation=False)
    assert drain(engine.submit(served, [0, 1, 2], greedy(40)))[0] == [(3 + i) % 5 for i in range(40)]
    assert runner.steps >= 40 and engine.info()["drafted_tokens"] == 0


def test_a_runner_whose_rows_depend_on_the_step_never_drafts(engine_of: Make) -> None:
    engine, served = engine_of(torch_runner)
    drain(engine.submit(served, [1, 2] * 8, greedy(30, ignore_eos=True)))
    assert engine.info()["drafted_tokens"] == 0


def test_nothing_is_drafted_beside_a_prompt(engine_of: Make) -> None:
    runner = LoopRunner()
    engine, served = engine_of(runner, prefill_tokens=3)
    runner.gate.clear()
    jobs = [engine.submit(served, [0, 1, 2] * 4, greedy(30)), engine.submit(served, [4, 3] * 10, greedy(20))]
    runner.gate.set()
    for job in jobs:
        drain(job)
    for _, slots, positions in runner.seen:
        prompt = any(slot == 1 and position < 20 for slot, position in zip(slots, positions, strict=True))
        assert not prompt or slots.count(0) <= 3, "more than a piece of the prompt or one decoded token"
    assert engine.info()["accepted_tokens"] > 0


def test_a_step_that_fails_is_tried_alone_without_its_draft(engine_of: Make) -> None:
    runner = LoopRunner()
    failed: list[int] = []

    def fail(step: int) -> bool:
        rows = len(runner.seen[-1][0])
        if rows > 1 and runner.seen[-1][2][0] > 10 and len(failed) < 3:
            failed.append(rows)
        return bool(failed) and failed[-1] == rows and rows > 1

    runner.fail = fail
    engine, served = engine_of(runner)
    assert drain(engine.submit(served, [0, 1, 2], greedy(40)))[0] == [(3 + i) % 5 for i in range(40)]
    assert failed


def test_a_drafted_row_that_is_no_number_ends_its_sequence_after_the_tokens_before(engine_of: Make) -> None:
    class Poisoned(LoopRunner):
        def rows(self, tokens: list[int], slots: list[int], positions: list[int], want: list[int]) -> torch.Tensor:
            logits = super().rows(tokens, slots, positions, want)
            for row, i in enumerate(want):
                if positions[i] == 30:
                    logits[row, 0] = float("nan")
            return logits

    engine, served = engine_of(Poisoned())
    ids, end = drain(engine.submit(served, [0, 1, 2], greedy(40)))
    assert ids == [(3 + i) % 5 for i in range(28)]
    assert end == Finished(FinishReason.ERROR, Failure.NOT_A_NUMBER)
    assert engine.info()["accepted_tokens"] > 0


def test_a_stop_token_inside_a_draft_ends_the_text(engine_of: Make) -> None:
    engine, served = engine_of(LoopRunner())
    drain(engine.submit(served, [0, 1, 2], greedy(40)))
    prompt = [0, 1, 2, 3, 4] * 3
    for stop, n in ((4, 5), (2, 3)):
        ids, end = drain(engine.submit(served, prompt, greedy(20, stop_token_ids=frozenset({stop}))))
        assert ids == [0, 1, 2, 3, 4][:n] and end.reason == FinishReason.STOP
    assert engine.info()["accepted_tokens"] > 0


def rambling() -> GPT:
    """Return a small random GPT that hardly sees positions, so that its text runs in loops and leaves them again."""
    torch.manual_seed(0)
    model = GPT(SHAPE)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
        model.transformer["wpe"].weight.mul_(0.1)
    return model.eval()


def rambling_loader(ref: Any, workspace: Any) -> Any:
    return SimpleNamespace(model=rambling(), tokenizer=FakeTokenizer(), reference=ref)


def repeating(rng: random.Random, most: int) -> list[int]:
    """Return a prompt that says things again."""
    stem = [rng.randrange(VOCAB) for _ in range(rng.randint(2, 8))]
    return (stem * most)[: rng.randint(1, most)]


jobs_of = st.lists(
    st.tuples(
        st.integers(0, 10**6),  # of the prompt
        st.integers(1, 60),  # new tokens
        st.integers(0, 6),  # steps to wait before it joins
        st.one_of(st.none(), st.integers(0, 30)),  # cancelled after so many tokens
        st.booleans(),  # sampled
    ),
    min_size=1,
    max_size=8,
)


@native
@settings(max_examples=15, deadline=None)
@given(jobs=jobs_of, slots=st.integers(1, 4), prefill=st.integers(1, 40))
def test_any_schedule_gives_the_naive_tokens_with_drafts(jobs: list[Any], slots: int, prefill: int) -> None:
    options: dict[str, Any] = {"slots": slots, "prefill_tokens": prefill, "dtype": "fp32", "device": "cpu"}
    engine = Engine(Path("."), loader=rambling_loader, build=build_runner, **options)
    try:
        served, model, found = engine.load(reference()), rambling(), []
        for seed, n, wait, leave, sampled in jobs:
            target = engine.info()["steps"] + wait
            until(lambda target=target: engine.info()["steps"] >= target or engine.info()["running"] == 0)
            prompt = repeating(random.Random(seed), 100)
            params = SamplingParams(max_new_tokens=n, seed=1) if sampled else greedy(n)
            found.append((prompt, n, leave, sampled, engine.submit(served, prompt, params)))
        for prompt, n, leave, sampled, generation in found:
            ids = []
            for token in generation:
                ids.append(token.token_id)
                if leave is not None and len(ids) > leave:
                    generation.cancel()
            expected = ids if sampled else naive(model, prompt, n)
            assert ids == expected[: len(ids)] and (
                generation.finish_reason == "cancelled" or len(ids) == len(expected)
            )
        until(lambda: engine.info()["running"] == engine.info()["waiting"] == 0)
    finally:
        engine.close(0.0)


def outcomes(engine: Engine, served: Any) -> list[tuple[list[Token], list[int]]]:
    """Return the events of requests of all kinds, and of each one that goes on from its text, cached tokens with it."""
    rng, made = random.Random(4), []
    for turn in range(6):
        kinds = ({"temperature": 0.0}, {"temperature": 0.0, "logprobs": 2}, {"temperature": 1.2, "seed": turn})
        prompts = [repeating(rng, 40) for _ in kinds]
        limits = [rng.randint(1, 80) for _ in kinds]
        running = [
            engine.submit(served, prompt, SamplingParams(max_new_tokens=n, ignore_eos=True, **kind))
            for prompt, n, kind in zip(prompts, limits, kinds, strict=True)
        ]
        for prompt, generation in zip(prompts, running, strict=True):
            tokens = list(generation)
            longer = engine.submit(served, prompt + [t.token_id for t in tokens], greedy(30, ignore_eos=True))
            made.append((tokens, drain(longer)[0]))
    return made


@native
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_tokens_and_their_probabilities_are_the_same_with_drafts_and_without(dtype: str, engine_of: Make) -> None:
    found = []
    for on in (True, False):
        engine, served = engine_of(build_runner, loader=rambling_loader, dtype=dtype, speculation=on, slots=4)
        found.append(outcomes(engine, served))
        assert served.runner == "native" and (engine.info()["accepted_tokens"] > 200) == on
        assert engine.info()["cache_saved"] > 0
    assert found[0] == found[1]
