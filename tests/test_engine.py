"""The engine: requests that join and leave at any time, loads, limits, failures, and the end."""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_runner import PlainRunner

from inference.build import build_runner
from inference.decode_graphs import EagerGraph
from inference.engine import Engine
from inference.sequence import (
    EngineDown,
    Failure,
    Finished,
    FinishReason,
    Generation,
    LoadInProgress,
    NoModel,
    PromptTooLong,
    QueueFull,
    SamplingParams,
    Token,
)
from inference.torch_runner import TorchRunner
from model import GPT, GPTConfig
from storage.chat_format import TOKENS as CHAT_TOKENS
from storage.errors import NotLoadable
from storage.registry import ModelReference

VOCAB, EOT = 61, 60


@dataclass
class FakeTokenizer:
    """As much of a tokenizer as the engine asks for."""

    n_vocab: int = VOCAB
    eot: int | None = EOT
    fingerprint: str = "0123456789abcdef"
    special_tokens: dict[str, int] = field(default_factory=dict)


def tiny(seed: int = 0, block_size: int = 48) -> GPT:
    """Return a small random GPT whose logits are far enough apart for greedy choices to be clear."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=block_size, vocab_size=VOCAB))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6)
    return model.eval()


class FakeRunner(PlainRunner):
    """Counts: the logits of a row favour its token + 1. Fails, or waits, when told to."""

    name, block_size, vocab_size = "fake", 48, VOCAB

    def __init__(self, slots: int = 4):
        self.slots, self.steps, self.closed = slots, 0, False
        self.fail: Callable[[int], bool] = lambda step: False
        self.gate = threading.Event()
        self.gate.set()
        self.seen: list[tuple[list[int], list[int], list[int]]] = []
        self.torch_threads: list[int] = []  # of each step

    def rows(self, tokens: list[int], slots: list[int], positions: list[int], want: list[int]) -> torch.Tensor:
        assert not self.closed, "a closed runner computes nothing"
        assert self.gate.wait(20), "the test left the gate shut"
        self.steps += 1
        self.torch_threads.append(torch.get_num_threads())
        self.seen.append((list(tokens), list(slots), list(positions)))
        if self.fail(self.steps):
            raise RuntimeError("the test's fault")
        logits = torch.zeros(len(want), VOCAB)
        for row, i in enumerate(want):
            logits[row, (tokens[i] + 1) % VOCAB] = 9.0
        return logits

    def close(self) -> None:
        self.closed = True


@dataclass
class Bench:
    """An engine over fakes; `runners` are those it built, in order."""

    engine: Engine
    runners: list[FakeRunner] = field(default_factory=list)


def reference(name: str = "m") -> Any:
    return ModelReference(name, "trained", None, name)


def loader(ref: Any, workspace: Any) -> Any:
    return SimpleNamespace(model=tiny(), tokenizer=FakeTokenizer(), reference=ref)


def torch_runner(model: GPT, asked: Any) -> tuple[TorchRunner, str]:
    return TorchRunner(model, asked.slots), "a test"


def static_runner(model: GPT, asked: Any) -> tuple[TorchRunner, str]:
    """As on CUDA, but run again instead of replayed."""
    return TorchRunner(model, asked.slots, record=EagerGraph), "a test"


@pytest.fixture
def make() -> Iterator[Callable[..., Engine]]:
    """Return a maker of engines that are closed at the end."""
    engines: list[Engine] = []

    def build(**options: Any) -> Engine:
        engines.append(Engine(Path("."), **{"loader": loader, "build": torch_runner, "slots": 4, **options}))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close(0.0)


@pytest.fixture
def fake(make: Callable[..., Engine]) -> Iterator[Callable[..., Bench]]:
    """Return a maker of engines on fake runners, with a model loaded."""
    all_runners: list[FakeRunner] = []

    def build(slots: int = 4, **options: Any) -> Bench:
        runners: list[FakeRunner] = []

        def runner(model: GPT, asked: Any) -> tuple[FakeRunner, str]:
            runners.append(FakeRunner(slots))
            all_runners.append(runners[-1])
            return runners[-1], "a test"

        bench = Bench(make(build=runner, **options), runners)
        bench.engine.load(reference())
        return bench

    yield build
    for runner in all_runners:
        runner.gate.set()


def drain(generation: Generation) -> tuple[list[int], Finished]:
    """Return the tokens and the last event, which must come within ten seconds and be the last."""
    ids: list[int] = []
    while True:
        event = generation.next(timeout=10)
        assert event is not None, "no event came"
        if isinstance(event, Finished):
            assert generation.next(timeout=0) is None, "something came after the last event"
            return ids, event
        ids.append(event.token_id)


def greedy(n: int = 5, **more: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=n, temperature=0.0, **more)


def submit(bench: Bench, prompt: list[int], params: SamplingParams | None = None) -> Generation:
    served = bench.engine.served()
    assert served is not None
    return bench.engine.submit(served, prompt, greedy() if params is None else params)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Poll until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.002)


def naive(model: GPT, prompt: list[int], n: int, eot: int | None = EOT) -> list[int]:
    return model.generate(torch.tensor([prompt]), n, temperature=0, eot=eot)[0, len(prompt) :].tolist()


# --- exactness ---


@pytest.mark.parametrize(
    "build", [torch_runner, static_runner, build_runner], ids=["torch", "torch as on CUDA", "the best here"]
)
def test_requests_that_join_at_random_times_get_the_tokens_of_the_naive_generate(
    make: Callable[..., Engine], build: Any
) -> None:
    engine, rng = make(build=build, dtype="fp32", device="cpu", prefill_tokens=8), random.Random(1)
    served = engine.load(reference())
    jobs = []
    for _ in range(30):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))]
        n = rng.randint(1, 30)
        jobs.append((prompt, n, engine.submit(served, prompt, greedy(n))))
        time.sleep(rng.choice([0, 0, 0.002, 0.01]))
    model = tiny()
    for prompt, n, generation in jobs:
        ids, end = drain(generation)
        assert ids == naive(model, prompt, n)
        assert end.reason == (FinishReason.STOP if ids[-1] == EOT else FinishReason.LENGTH)


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30),  # prompt
        st.integers(1, 20),  # new tokens
        st.integers(0, 6),  # steps to wait before it joins
        st.one_of(st.none(), st.integers(0, 10)),  # cancelled after so many tokens
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=8, deadline=None)
@given(requests=requests, slots=st.integers(1, 4), prefill=st.integers(1, 40))
def test_any_schedule_gives_the_naive_tokens(requests: list[Any], slots: int, prefill: int) -> None:
    engine = Engine(Path("."), loader=loader, build=torch_runner, slots=slots, prefill_tokens=prefill)
    try:
        served = engine.load(reference())
        jobs = []
        for prompt, n, wait, leave in requests:
            target = engine.info()["steps"] + wait
            until(lambda target=target: engine.info()["steps"] >= target or engine.info()["running"] == 0)
            jobs.append((prompt, n, leave, engine.submit(served, prompt, greedy(n))))
        model = tiny()
        for prompt, n, leave, generation in jobs:
            ids = []
            if leave is not None:
                for token in generation:
                    ids.append(token.token_id)
                    if len(ids) > leave:
                        generation.cancel()
                        break
            ids += [] if generation.finish_reason else drain(generation)[0]
            expected = naive(model, prompt, n)
            assert ids == expected[: len(ids)] and (leave is not None or ids == expected)
        until(lambda: engine.info()["running"] == engine.info()["waiting"] == 0)
    finally:
        engine.close(0.0)


def test_prompts_that_come_in_pieces_give_the_same_tokens(make: Callable[..., Engine]) -> None:
    engine = make(prefill_tokens=3)
    served = engine.load(reference())
    prompt = list(range(40))
    assert drain(engine.submit(served, prompt, greedy(8)))[0] == naive(tiny(), prompt, 8)


def test_a_seeded_request_gives_the_same_tokens_alone_and_in_a_crowd(make: Callable[..., Engine]) -> None:
    engine = make()
    served = engine.load(reference())
    mine = SamplingParams(max_new_tokens=20, temperature=1.0, top_k=20, seed=7, ignore_eos=True)
    other = SamplingParams(max_new_tokens=25, temperature=1.3, top_k=0, top_p=0.9, ignore_eos=True)
    alone = drain(engine.submit(served, [5, 6, 7], mine))[0]
    crowd = [engine.submit(served, [i, i + 1], other) for i in range(6)]
    assert drain(engine.submit(served, [5, 6, 7], mine))[0] == alone
    for generation in crowd:
        drain(generation)


def test_the_sum_of_log_probabilities_is_the_models_loss(make: Callable[..., Engine]) -> None:
    engine = make(prefill_tokens=7)
    served = engine.load(reference())
    prompt = list(range(0, 60, 2))
    generation = engine.submit(served, prompt, greedy(0, prompt_logprobs=True, logprobs=3))
    assert drain(generation) == ([], Finished(FinishReason.LENGTH))
    scores = generation.prompt_logprobs
    assert [t.token_id for t in scores] == prompt[1:] and all(len(t.top) == 3 for t in scores)
    _, loss = tiny()(torch.tensor([prompt[:-1]]), torch.tensor([prompt[1:]]))
    assert -sum(t.logprob for t in scores) / len(scores) == pytest.approx(loss.item(), abs=1e-5)


def test_a_model_with_a_padded_vocabulary_never_gives_an_id_without_text(make: Callable[..., Engine]) -> None:
    def padded(ref: Any, workspace: Any) -> Any:
        return SimpleNamespace(model=tiny(), tokenizer=FakeTokenizer(n_vocab=10, eot=None))

    engine = make(loader=padded)
    served = engine.load(reference())
    assert max(drain(engine.submit(served, [1], greedy(40)))[0]) < 10
    with pytest.raises(ValueError, match="token id 10; ids must be between 0 and 9"):
        engine.submit(served, [10], greedy())


# --- how a sequence ends ---


def test_end_of_text_ends_a_sequence_and_is_its_last_token(fake: Callable[..., Bench]) -> None:
    assert drain(submit(fake(), [EOT - 2], greedy(9))) == ([EOT - 1, EOT], Finished(FinishReason.STOP))


def test_a_chat_models_end_of_turn_ends_a_sequence_unless_ignored(fake: Callable[..., Bench]) -> None:
    bench = fake()
    served = bench.engine.served()
    assert served is not None
    served.tokenizer.special_tokens |= {token: i for i, token in enumerate(CHAT_TOKENS)}  # <|end|> is 3
    assert drain(submit(bench, [1], greedy(9))) == ([2, 3], Finished(FinishReason.STOP))
    assert drain(submit(bench, [1], greedy(4, ignore_eos=True)))[0] == [2, 3, 4, 5]


def test_end_of_text_can_be_ignored(fake: Callable[..., Bench]) -> None:
    assert drain(submit(fake(), [EOT - 1], greedy(3, ignore_eos=True)))[0] == [EOT, 0, 1]


def test_a_stop_token_ends_a_sequence_but_not_before_min_tokens(fake: Callable[..., Bench]) -> None:
    bench = fake()
    assert drain(submit(bench, [1], greedy(9, stop_token_ids=frozenset({3})))) == ([2, 3], Finished(FinishReason.STOP))
    ids, _ = drain(submit(bench, [1], greedy(9, stop_token_ids=frozenset({2}), min_tokens=4)))
    assert 2 not in ids[:4] and len(ids) >= 4


def test_prompt_and_new_tokens_may_fill_the_context_exactly(fake: Callable[..., Bench]) -> None:
    bench = fake()
    for n in (8, 1000):
        ids, end = drain(submit(bench, [0] * 40, greedy(n, ignore_eos=True)))
        assert len(ids) == 8 and end.reason == FinishReason.LENGTH


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(fake: Callable[..., Bench]) -> None:
    bench = fake()
    drain(submit(bench, [0] * 47, greedy(1)))
    with pytest.raises(PromptTooLong, match="maximum context length is 48 tokens, however the prompt has 48 tokens"):
        submit(bench, [0] * 48, greedy(1))


def test_no_new_tokens_end_at_once(fake: Callable[..., Bench]) -> None:
    bench = fake()
    steps = bench.runners[0].steps
    assert drain(submit(bench, [0] * 48, greedy(0))) == ([], Finished(FinishReason.LENGTH))
    assert bench.runners[0].steps == steps


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], greedy(), "prompt_ids is empty"),
        ([VOCAB], greedy(), f"token id {VOCAB}; ids must be between 0 and {VOCAB - 1}"),
        ([-1], greedy(), "prompt_ids has token id -1"),
        ([1], greedy(logit_bias=((99, 1.0),)), "logit_bias has token id 99"),
        ([1], greedy(stop_token_ids=frozenset({99})), "stop_token_ids has token id 99"),
    ],
)
def test_what_no_model_can_compute_is_refused_at_once(
    fake: Callable[..., Bench], prompt: list[int], params: SamplingParams, message: str
) -> None:
    bench = fake()
    with pytest.raises(ValueError, match=message):
        submit(bench, prompt, params)
    assert bench.engine.info()["waiting"] == 0


def test_a_cancelled_request_ends_and_frees_its_slot(fake: Callable[..., Bench]) -> None:
    bench = fake(slots=1)
    first, second = submit(bench, [0], greedy(40)), submit(bench, [1])
    assert first.next(timeout=10) is not None
    first.cancel()
    assert drain(first)[1].reason in (FinishReason.CANCELLED, FinishReason.LENGTH)
    assert drain(second)[0] == [2, 3, 4, 5, 6]


def test_a_waiting_request_can_be_cancelled(fake: Callable[..., Bench]) -> None:
    bench = fake(slots=1)
    bench.runners[0].gate.clear()
    running, waiting = submit(bench, [0]), submit(bench, [1])
    waiting.cancel()
    bench.runners[0].gate.set()
    assert drain(waiting) == ([], Finished(FinishReason.CANCELLED))
    assert drain(running)[1].reason == FinishReason.LENGTH


def test_a_request_that_takes_too_long_ends_with_an_error(fake: Callable[..., Bench]) -> None:
    bench = fake(request_timeout=0.5)  # within which it begins to run
    bench.runners[0].gate.clear()
    running = submit(bench, [0], greedy(40))
    until(lambda: bench.engine.info()["running"] == 1)
    time.sleep(0.51)
    bench.runners[0].gate.set()
    _, end = drain(running)
    assert end.reason == FinishReason.ERROR and "longer than the server allows" in str(end.error)


def test_a_failure_ends_the_sequence_at_fault_and_no_other(make: Callable[..., Engine]) -> None:
    """Sampled text beside one whose rows fail at its third token is that of a run without it."""

    def run(faulty: bool) -> list[list[int]]:
        engine = make(slots=8)
        served = engine.load(reference())
        runner = engine._pool.lane(served).runner
        rows, all_here = runner.rows, threading.Event()

        def failing(tokens: list[int], slots: list[int], positions: list[int], want: list[int]) -> torch.Tensor:
            assert all_here.wait(20)  # none has ended before the one at fault enters, which is to have slot 3
            if faulty and any(slot == 3 and position >= 5 for slot, position in zip(slots, positions, strict=True)):
                raise RuntimeError("the test's fault")
            return rows(tokens, slots, positions, want)

        runner.rows = failing  # type: ignore[method-assign]
        params = [SamplingParams(max_new_tokens=12, temperature=t, seed=k) for k, t in enumerate([0.0, 1.0] * 4)]
        generations = [engine.submit(served, [k, k + 1, k + 2], params[k]) for k in range(8)]
        all_here.set()
        ends = [drain(generation) for generation in generations]
        assert [end.error for _, end in ends if end.reason == FinishReason.ERROR] == [Failure.STEP] * faulty
        return [ids for k, (ids, _) in enumerate(ends) if k != 3]

    assert run(faulty=True) == run(faulty=False)


def test_when_every_step_fails_what_runs_ends_and_the_next_request_works(fake: Callable[..., Bench]) -> None:
    bench = fake(slots=2)
    runner = bench.runners[0]
    runner.fail = lambda step: True
    for generation in [submit(bench, [i]) for i in (0, 1)]:
        assert drain(generation)[1] == Finished(FinishReason.ERROR, Failure.STEP)
    runner.fail = lambda step: False
    assert drain(submit(bench, [2]))[0] == [3, 4, 5, 6, 7]


def test_logits_that_are_not_numbers_end_their_own_sequence_only(fake: Callable[..., Bench]) -> None:
    bench = fake()
    runner, rows = bench.runners[0], bench.runners[0].rows

    def poisoned(tokens: list[int], slots: list[int], positions: list[int], want: list[int]) -> torch.Tensor:
        logits = rows(tokens, slots, positions, want)
        for row, i in enumerate(want):
            if tokens[i] >= 30:
                logits[row, 5] = float("nan")
        return logits

    runner.rows = poisoned  # type: ignore[method-assign]
    bad, good = submit(bench, [28]), submit(bench, [3])
    assert drain(bad) == (
        [29, 30],
        Finished(FinishReason.ERROR, Failure.NOT_A_NUMBER),
    )
    assert drain(good)[0] == [4, 5, 6, 7, 8]
    scored = submit(bench, [30, 31, 32], greedy(0, prompt_logprobs=True))
    assert drain(scored)[1].reason == FinishReason.ERROR


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_sequence_gets_one_last_event_and_gives_its_slot_back(data: st.DataObject) -> None:
    runner = FakeRunner(slots=data.draw(st.integers(1, 3)))
    failing = data.draw(st.sets(st.integers(2, 30), max_size=6))
    runner.fail = lambda step: step in failing
    engine = Engine(Path("."), loader=loader, build=lambda model, asked: (runner, "a test"), prefill_tokens=4)
    try:
        served = engine.load(reference())
        generations = []
        for _ in range(data.draw(st.integers(1, 8))):
            n, size = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 20))
            generations.append(engine.submit(served, [data.draw(st.integers(0, 40))] * size, greedy(n)))
            if data.draw(st.booleans()):
                generations[data.draw(st.integers(0, len(generations) - 1))].cancel()
        for generation in generations:
            drain(generation)
        info = engine.info()
        assert (info["running"], info["waiting"], info["waiting_tokens"]) == (0, 0, 0)
        runner.fail = lambda step: False
        crowd = [engine.submit(served, [1], greedy(3)) for _ in range(runner.slots)]
        assert all(drain(g)[0] == [2, 3, 4] for g in crowd), "a slot was lost"
    finally:
        engine.close(0.0)


# --- limits ---


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(fake: Callable[..., Bench]) -> None:
    bench = fake(slots=1, max_waiting=2)
    bench.runners[0].gate.clear()
    running = submit(bench, [0])
    until(lambda: bench.engine.info()["running"] == 1)
    waiting = [submit(bench, [i]) for i in (1, 2)]
    with pytest.raises(QueueFull, match="2 requests wait; the limit is 2") as refusal:
        submit(bench, [3])
    assert 1 <= refusal.value.retry_after <= 60
    bench.runners[0].gate.set()
    assert [drain(g)[1].reason for g in (running, *waiting)] == [FinishReason.LENGTH] * 3


def test_waiting_prompt_tokens_are_limited_too(fake: Callable[..., Bench]) -> None:
    bench = fake(slots=1, max_waiting_tokens=20)
    bench.runners[0].gate.clear()
    submit(bench, [0])
    until(lambda: bench.engine.info()["running"] == 1)
    submit(bench, [1] * 15)
    with pytest.raises(QueueFull, match="15 prompt tokens wait"):
        submit(bench, [2] * 6)
    submit(bench, [2] * 5)
    bench.runners[0].gate.set()


def test_a_long_prompt_comes_in_pieces_while_others_run(fake: Callable[..., Bench]) -> None:
    bench = fake(prefill_tokens=6)
    runner = bench.runners[0]
    runner.gate.clear()
    streams = [submit(bench, [i], greedy(30)) for i in range(3)]
    long = submit(bench, [7] * 40, greedy(2))
    runner.gate.set()
    for generation in (*streams, long):
        drain(generation)
    for tokens, slots, _ in runner.seen:
        prompts = sum(slots.count(s) for s in set(slots) if slots.count(s) > 1)
        assert prompts <= 6 and len(tokens) <= 6 + 4


# --- loading ---


def test_nothing_is_served_before_a_load(make: Callable[..., Engine]) -> None:
    engine = make()
    assert engine.served() is None and engine.info()["slots"] == 4
    with pytest.raises(NoModel):
        engine.unload()


def test_what_runs_at_a_load_ends_on_the_model_it_began_with(fake: Callable[..., Bench]) -> None:
    bench = fake(slots=2)
    old = bench.engine.served()
    assert old is not None
    bench.runners[0].gate.clear()
    streams = [bench.engine.submit(old, [i], greedy(20)) for i in range(6)]
    loading = threading.Thread(target=bench.engine.load, args=(reference("new"),))
    loading.start()
    until(lambda: len(bench.runners) == 2)
    bench.runners[0].gate.set()
    loading.join(10)
    assert [len(drain(g)[0]) for g in streams] == [20] * 6
    assert bench.engine.served() is not old and drain(submit(bench, [1]))[0] == [2, 3, 4, 5, 6]
    until(lambda: bench.runners[0].closed and bench.engine.info()["models"] == 1)
    with pytest.raises(NoModel):
        bench.engine.submit(old, [1], greedy())


def test_a_failed_load_changes_nothing(make: Callable[..., Engine]) -> None:
    def moody(ref: Any, workspace: Any) -> Any:
        if ref.id == "bad":
            raise OSError("the test's fault")
        return loader(ref, workspace)

    engine = make(loader=moody)
    served = engine.load(reference())
    with pytest.raises(OSError, match="the test's fault"):
        engine.load(reference("bad"))
    assert engine.served() is served and not engine.info()["loading"]
    assert len(drain(engine.submit(served, [1], greedy(3)))[0]) == 3


def test_a_model_is_loaded_in_a_thread_that_ends_whose_helpers_then_take_no_core(make: Callable[..., Engine]) -> None:
    threads: list[threading.Thread] = []

    def noting(ref: Any, workspace: Any) -> Any:
        threads.append(threading.current_thread())
        return loader(ref, workspace)

    def build(model: GPT, asked: Any) -> tuple[TorchRunner, str]:
        threads.append(threading.current_thread())
        return torch_runner(model, asked)

    engine = make(loader=noting, build=build)
    assert len(drain(engine.submit(engine.load(reference()), [1], greedy(3)))[0]) == 3
    assert len(set(threads)) == 1 and threads[0] is not threading.current_thread() and not threads[0].is_alive()


def test_a_model_that_cannot_compute_does_not_replace_one_that_can(make: Callable[..., Engine]) -> None:
    runners: list[FakeRunner] = []

    def build(model: GPT, asked: Any) -> tuple[FakeRunner, str]:
        runners.append(FakeRunner())
        broken = len(runners) == 2
        runners[-1].fail = lambda step: broken
        return runners[-1], "a test"

    engine = make(build=build)
    served = engine.load(reference())
    with pytest.raises(RuntimeError):
        engine.load(reference("broken"))
    assert engine.served() is served and runners[1].closed and not runners[0].closed


def test_a_model_whose_weights_are_no_numbers_is_refused(make: Callable[..., Engine]) -> None:
    def broken(ref: Any, workspace: Any) -> Any:
        model = tiny()
        with torch.no_grad():
            model.lm_head.weight[2, 2] = float("inf")
        return SimpleNamespace(model=model, tokenizer=FakeTokenizer())

    with pytest.raises(NotLoadable, match="m holds weights that are no finite numbers"):
        make(loader=broken).load(reference())


def test_of_racing_loads_exactly_one_wins(make: Callable[..., Engine]) -> None:
    hold, entered, results = threading.Event(), threading.Event(), []

    def slow(ref: Any, workspace: Any) -> Any:
        entered.set()
        assert hold.wait(10)
        return loader(ref, workspace)

    engine = make(loader=slow)

    def load(name: str) -> None:
        try:
            results.append(engine.load(reference(name)).id)
        except LoadInProgress:
            results.append(None)

    threads = [threading.Thread(target=load, args=(f"m{i}",)) for i in range(10)]
    for thread in threads:
        thread.start()
    until(lambda: len(results) == 9)
    hold.set()
    for thread in threads:
        thread.join(10)
    winner = engine.served()
    assert results[:9] == [None] * 9 and winner is not None and results[9] == winner.id


def test_unloading_ends_what_runs_properly_and_closes_the_model(fake: Callable[..., Bench]) -> None:
    bench = fake()
    stream = submit(bench, [0], greedy(20))
    bench.engine.unload()
    assert bench.engine.served() is None and len(drain(stream)[0]) == 20
    until(lambda: bench.runners[0].closed and bench.engine.info()["models"] == 0)


def resident() -> int:
    """Return this process's resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="nothing here tells what a process holds")
@pytest.mark.parametrize("build", [torch_runner, build_runner], ids=["torch", "the best here"])
def test_the_memory_of_an_unloaded_model_goes_back_to_the_system(make: Callable[..., Engine], build: Any) -> None:
    shape = GPTConfig(n_layer=8, n_head=8, n_embd=512, block_size=48, vocab_size=VOCAB)  # 100 MB in float32
    large = lambda ref, w: SimpleNamespace(model=GPT(shape).eval(), tokenizer=FakeTokenizer())  # noqa: E731
    engine, before = make(build=build, dtype="fp32", device="cpu", loader=large), resident()
    drain(engine.submit(engine.load(reference()), [1, 2], greedy(2)))
    taken = resident() - before
    engine.unload()
    assert taken > 80e6
    until(lambda: resident() - before < 0.3 * taken)


def test_a_load_says_how_long_it_took_and_what_memory_the_model_takes(
    make: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        served = make().load(reference())
    assert f"in {served.load_seconds:.1f} s" in caplog.text and f"are {served.memory_bytes / 1e6:.0f} MB" in caplog.text


def test_the_fingerprint_tells_weights_apart(make: Callable[..., Engine]) -> None:
    seeds = iter([0, 0, 1])
    engine = make(loader=lambda ref, w: SimpleNamespace(model=tiny(next(seeds)), tokenizer=FakeTokenizer()))
    first, same, other = (engine.load(reference()) for _ in range(3))
    assert first.fingerprint == same.fingerprint != other.fingerprint and first is not same


@pytest.mark.parametrize("change", [{"name": "other"}, {"dtype": "bf16"}, {"arithmetic": "1"}, {}], ids=str)
def test_the_fingerprint_tells_runners_and_tokenizers_apart(
    make: Callable[..., Engine], change: dict[str, str]
) -> None:
    runners, words = [FakeRunner(), FakeRunner()], [FakeTokenizer(), FakeTokenizer()]
    vars(runners[1]).update(change)
    if not change:
        words[1].fingerprint = "another"
    built, read = iter(runners), iter(words)
    engine = make(
        loader=lambda ref, w: SimpleNamespace(model=tiny(), tokenizer=next(read)),
        build=lambda model, asked: (next(built), "a test"),
    )
    assert engine.load(reference()).fingerprint != engine.load(reference()).fingerprint


def test_torch_has_one_thread_beside_a_runner_that_has_its_own(fake: Callable[..., Bench]) -> None:
    bench = fake(threads=2)
    runner = bench.runners[0]
    for own in (False, True, False):
        runner.own_threads = own
        drain(submit(bench, [0], greedy(1)))
    assert runner.torch_threads[-3:] == [2, 1, 2]


# --- figures and the end ---


@pytest.mark.parametrize(("begin", "spare"), [(None, False), (lambda *step: None, True)])
def test_the_bell_tells_of_spare_time_while_a_step_is_under_way_and_when_nothing_is_to_do(fake, begin, spare):
    bench, heard = fake(), []
    bench.runners[0].begin = begin
    bench.engine.bell.listen(lambda spare: heard.append((bench.engine.info()["running"], spare)))
    drain(submit(bench, [1], greedy(4)))
    until(lambda: (0, True) in heard)
    assert {free for running, free in heard if running} == {spare}


def test_a_request_can_be_asked_for_while_it_waits_runs_and_is_over(fake: Callable[..., Bench]) -> None:
    bench = fake(slots=1)
    bench.runners[0].gate.clear()
    engine, served = bench.engine, bench.engine.served()
    assert served is not None
    generations = [engine.submit(served, [i], greedy(3), request_id=f"r{i}") for i in range(3)]
    until(lambda: engine.info()["running"] == 1)
    states = [engine.request(f"r{i}") for i in range(3)]
    assert [(s["state"], s["position"]) for s in states if s] == [("running", None), ("waiting", 0), ("waiting", 1)]
    with pytest.raises(ValueError, match="request id 'r1' belongs to a request that has not ended"):
        engine.submit(served, [1], greedy(), request_id="r1")
    bench.runners[0].gate.set()
    for generation in generations:
        drain(generation)
    past = engine.request("r2")
    assert past is not None and past["state"] == "finished" and past["finish_reason"] == "length"
    assert past["output_tokens"] == 3 and past["seconds"] >= past["first_token_seconds"] >= past["waited_seconds"]
    assert engine.request("nobody") is None


def test_only_the_last_finished_requests_are_remembered(
    fake: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.admission.KEPT", 3)
    bench = fake()
    generations = [submit(bench, [1], greedy(0)) for _ in range(5)]
    for generation in generations:
        drain(generation)
    known = [bench.engine.request(g.id) is not None for g in generations]
    assert known == [False, False, True, True, True]


def test_the_heart_beats_when_idle_and_stops_when_a_step_hangs(fake: Callable[..., Bench]) -> None:
    bench = fake()
    until(lambda: bench.engine.info()["heartbeat_age"] > 0.3)
    until(lambda: bench.engine.info()["heartbeat_age"] < 0.3)
    bench.runners[0].gate.clear()
    stuck = submit(bench, [0])
    until(lambda: bench.engine.info()["heartbeat_age"] > 0.7)
    bench.runners[0].gate.set()
    drain(stuck)


def test_speed_is_reported(fake: Callable[..., Bench]) -> None:
    bench = fake()
    drain(submit(bench, [0], greedy(20)))
    until(lambda: bench.engine.info()["tokens"] == 20)  # they are counted after they were handed out
    info = bench.engine.info()
    assert info["tokens_per_second"] > 0 and info["steps"] == 20


def test_closing_lets_running_requests_end_and_ends_waiting_ones(fake: Callable[..., Bench]) -> None:
    bench = fake(slots=1)
    runner = bench.runners[0]
    runner.gate.clear()
    running, waiting = submit(bench, [0], greedy(20)), submit(bench, [1])
    until(lambda: bench.engine.info()["running"] == 1)
    closing = threading.Thread(target=bench.engine.close, args=(10.0,))
    closing.start()
    until(lambda: bench.engine._pool.closing)
    with pytest.raises(EngineDown, match="shutting down"):
        submit(bench, [2])
    runner.gate.set()
    assert drain(waiting) == ([], Finished(FinishReason.ERROR, "The server is shutting down."))
    assert len(drain(running)[0]) == 20
    closing.join(10)
    assert runner.closed and not closing.is_alive()


def test_closing_without_patience_ends_what_runs_with_an_error(fake: Callable[..., Bench]) -> None:
    bench = fake()
    rows = bench.runners[0].rows

    def slow(*step: Any) -> torch.Tensor:
        time.sleep(0.1)
        return rows(*step)

    bench.runners[0].rows = slow  # type: ignore[method-assign]
    running = submit(bench, [0], greedy(47, ignore_eos=True))
    assert running.next(timeout=10) is not None
    bench.engine.close(0.0)
    assert drain(running)[1] == Finished(FinishReason.ERROR, "The server is shutting down.")
    bench.engine.close(0.0)  # a second time does no harm


def test_a_load_after_the_end_is_refused_and_its_model_closed(fake: Callable[..., Bench]) -> None:
    bench = fake()
    bench.engine.close(0.0)
    with pytest.raises(EngineDown):
        bench.engine.load(reference())
    assert all(runner.closed for runner in bench.runners)


def test_a_closed_torch_runner_holds_no_weights() -> None:
    runner = TorchRunner(tiny(), slots=2)
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.rows([0], [0], [0], [0])


def test_tokens_come_as_tokens(fake: Callable[..., Bench]) -> None:
    assert list(submit(fake(), [4], greedy(2))) == [Token(5), Token(6)]
