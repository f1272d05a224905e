"""The engine: requests that join and leave at any time, loads, limits, failures, and the end."""

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

from inference.engine import Engine
from inference.sequence import (
    Finished,
    FinishReason,
    Generation,
    SamplingParams,
)
from model import GPT, GPTConfig

VOCAB, EOT = 61, 60


@dataclass
class FakeTokenizer:
    """As much of a tokenizer as the engine asks for."""

    n_vocab: int = VOCAB
    eot: int | None = EOT
    fingerprint: str = "0123456789abcdef"


def tiny(seed: int = 0, block_size: int = 48) -> GPT:
    """Return a small random GPT whose logits are far enough apart for greedy choices to be clear."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=block_size, vocab_size=VOCAB))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6)
    return model.eval()


class FakeRunner:
    """Counts: the logits of a row favour its token + 1. Fails, or waits, when told to."""

    name, device, dtype, block_size, vocab_size = "fake", "cpu", "fp32", 48, VOCAB

    def __init__(self, slots: int = 4):
        self.slots, self.steps, self.closed = slots, 0, False
        self.fail: Callable[[int], bool] = lambda step: False
        self.gate = threading.Event()
        self.gate.set()
        self.seen: list[tuple[list[int], list[int], list[int]]] = []

    def rows(self, tokens: list[int], slots: list[int], positions: list[int], want: list[int]) -> torch.Tensor:
        assert not self.closed, "a closed runner computes nothing"
        assert self.gate.wait(20), "the test left the gate shut"
        self.steps += 1
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
    return SimpleNamespace(id=name)


def loader(ref: Any, workspace: Any) -> Any:
    return SimpleNamespace(model=tiny(), tokenizer=FakeTokenizer(), reference=ref)


@pytest.fixture
def make() -> Iterator[Callable[..., Engine]]:
    """Return a maker of engines that are closed at the end."""
    engines: list[Engine] = []

    def build(**options: Any) -> Engine:
        engines.append(Engine(Path("."), **{"loader": loader, "slots": 4, **options}))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close(0.0)


@pytest.fixture
def fake(make: Callable[..., Engine]) -> Callable[..., Bench]:
    """Return a maker of engines on fake runners, with a model loaded."""

    def build(slots: int = 4, **options: Any) -> Bench:
        runners: list[FakeRunner] = []

        def runner(model: GPT, asked: Any) -> tuple[FakeRunner, str]:
            runners.append(FakeRunner(slots))
            return runners[-1], "a test"

        bench = Bench(make(build=runner, **options), runners)
        bench.engine.load(reference())
        return bench

    return build


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


def test_requests_that_join_at_random_times_get_the_tokens_of_the_naive_generate(make: Callable[..., Engine]) -> None:
    engine, rng = make(prefill_tokens=8), random.Random(1)
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


@settings(max_examples=15, deadline=None)
@given(requests=requests, slots=st.integers(1, 4), prefill=st.integers(1, 40))
def test_any_schedule_gives_the_naive_tokens(requests: list[Any], slots: int, prefill: int) -> None:
    engine = Engine(Path("."), loader=loader, slots=slots, prefill_tokens=prefill)
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
