"""Seeded requests on the native runner: the same tokens alone, in any company, in any order, cached or not."""

import random
from pathlib import Path

import pytest
import torch
from test_engine import FakeTokenizer, drain, reference

from inference.build import build_runner
from inference.engine import Engine
from inference.native_runner import NativeRunner
from inference.sequence import SamplingParams
from model import GPT, GPTConfig

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=160, vocab_size=61)
REASON = NativeRunner.unsupported(CONFIG, "fp32")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


class Loaded:
    """A small random model, as a loader returns it."""

    def __init__(self, ref, workspace):
        torch.manual_seed(5)
        self.model, self.tokenizer, self.reference = GPT(CONFIG).eval(), FakeTokenizer(), ref


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Return requests of every kind of sampling; half of the prompts begin alike."""
    rng = random.Random(3)
    stem, made = [rng.randrange(60) for _ in range(70)], []
    kinds = [{"top_k": 0}, {"top_k": 5}, {"top_p": 0.8, "top_k": 0}, {"top_p": 0.9, "top_k": 20}, {"min_p": 0.1}]
    kinds += [{"repetition_penalty": 1.3}, {"presence_penalty": 0.5, "logprobs": 3}, {"temperature": 0.0}]
    for seed, kind in enumerate(kinds * 2):
        prompt = stem[: rng.randint(1, 70)] if seed % 2 else [rng.randrange(60) for _ in range(rng.randint(1, 70))]
        asked = {"temperature": 1.2, "max_new_tokens": rng.randint(1, 40), "seed": seed, **kind}
        made.append((prompt, SamplingParams(**asked)))
    return made


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_seeded_request_gives_the_same_tokens_alone_in_any_batch_and_in_any_order(dtype: str) -> None:
    asked, rng = requests(), random.Random(1)
    outcomes = []
    for slots, threads, prefill in ((1, 1, 512), (5, 2, 9), (16, 2, 64)):
        engine = Engine(
            Path("."), loader=Loaded, build=build_runner, device="cpu", dtype=dtype, slots=slots, threads=threads,
            prefill_tokens=prefill,
        )  # fmt: skip
        try:
            served = engine.load(reference())
            for alone in (True, False):
                order, found = rng.sample(range(len(asked)), len(asked)), {}
                for k in order:
                    found[k] = engine.submit(served, *asked[k])
                    if alone:
                        found[k] = [drain(found[k])[0]]
                outcomes.append([found[k][0] if alone else drain(found[k])[0] for k in range(len(asked))])
            assert served.runner == "native" and engine.info()["cache_saved"] > 0
        finally:
            engine.close(0.0)
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert len({tuple(ids) for ids in outcomes[0]}) > len(asked) // 2
