"""Generation: our engine against transformers' `generate`, on the same random GPT-2 124M weights, in one run.

    .venv/bin/python -m bench.bench_generate [--dtype bf16,fp32,int8] [--rounds 3] [--small]

One request and 16 at once; prompts of 64 tokens, 128 new ones, greedy, end-of-text ignored. Measured are the
time to the first token, tokens per second after it (decode) and tokens per second over all (16 at once).
transformers runs fp32 and bf16 with its KV cache, the 16 as one static batch, which is its best case.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.measure import Figure, machine, rounds, table
from inference.engine import Engine
from inference.sequence import SamplingParams
from model import GPT, GPTConfig
from storage.registry import ModelReference
from storage.runs import Workspace

PROMPT, NEW = 64, 128


@dataclass
class RandomTokenizer:
    """A tokenizer of which the engine only needs a size: the benchmark speaks in token ids."""

    n_vocab: int
    eot: int | None = None
    fingerprint: str = "0" * 16


@dataclass
class Loaded:
    model: GPT
    tokenizer: Any


def our_engine(model: GPT, dtype: str, threads: int) -> Engine:
    def load(_reference: ModelReference, _workspace: Workspace) -> Any:
        copy = GPT(model.config)
        copy.load_state_dict(model.state_dict())
        return Loaded(copy.eval(), RandomTokenizer(model.config.vocab_size))

    engine = Engine(Workspace(Path(".")), device="cpu", dtype=dtype, threads=threads, loader=load)
    engine.load(ModelReference("random", "folder", None, "random"))
    return engine


def ours(engine: Engine, prompts: list[list[int]], new: int) -> tuple[float, float, float]:
    """Return first-token seconds (the median of the requests), decode tokens/s and total tokens/s."""
    served = engine.served()
    assert served is not None
    params = SamplingParams(max_new_tokens=new, temperature=0.0, ignore_eos=True)
    start = time.perf_counter()
    handles = [engine.submit(served, ids, params) for ids in prompts]
    counts = [sum(1 for _ in handle) for handle in handles]
    seconds = time.perf_counter() - start
    assert counts == [new] * len(prompts), counts
    firsts = [engine.request(handle.id)["first_token_seconds"] for handle in handles]  # type: ignore[index]
    first = sorted(firsts)[len(firsts) // 2]
    return first, len(prompts) * (new - 1) / max(seconds - max(firsts), 1e-9), len(prompts) * new / seconds


def as_transformers(model: GPT, dtype: torch.dtype) -> Any:
    """Return GPT2LMHeadModel with the same weights; its Conv1D keeps linear weights transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    peer = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head
        )
    )
    turned = ("c_attn.weight", "c_fc.weight", "c_proj.weight")
    state = {name: w.t() if name.endswith(turned) else w for name, w in model.state_dict().items()}
    peer.load_state_dict(state)
    return peer.to(dtype).eval()


def theirs(peer: Any, prompts: list[list[int]], new: int) -> tuple[float, float, float]:
    """Return the same three figures of transformers; the first token's is a run of one token."""
    ids = torch.tensor(prompts)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        start = time.perf_counter()
        peer.generate(ids, max_new_tokens=1, **options)
        first = time.perf_counter() - start
        start = time.perf_counter()
        peer.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)
        seconds = time.perf_counter() - start
    return first, len(prompts) * (new - 1) / max(seconds - first, 1e-9), len(prompts) * new / seconds


def measure(contestants: dict[str, Callable[..., tuple[float, float, float]]], count: int, n: int, new: int) -> None:
    """Print one table per figure for `count` requests at once."""
    prompts = torch.randint(0, 50257, (count, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
    for run in contestants.values():
        run(prompts, 4)  # warm
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contestants}

    def once(name: str) -> float:
        seen[name].append(contestants[name](prompts, new))
        return seen[name][-1][1]

    _, others = rounds({name: partial(once, name) for name in contestants}, n)
    ours_name = next(iter(contestants))
    for i, (title, unit, digits) in enumerate(
        (("first token", "ms", 1), ("decode", "tokens/s", 0), ("all", "tokens/s", 0))
    ):
        scale = 1000.0 if i == 0 else 1.0
        figures = {name: Figure([x[i] * scale for x in rows]) for name, rows in seen.items()}
        print(table(f"{count} request{'s' if count > 1 else ''}: {title}", unit, figures, ours_name, digits))
    print(f"({n} rounds; others used {others:.2f} cores meanwhile)\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bf16,fp32,int8", help="ours, separated by commas; the first is compared")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a small model, to try the benchmark itself")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    size = {"n_layer": 2, "n_head": 4, "n_embd": 128} if args.small else {}
    model = GPT(GPTConfig(**size, activation="gelu_new")).eval()
    print(f"{machine()}; {model.num_params() / 1e6:.1f} M parameters, {args.threads} threads\n")
    engines: dict[str, Engine] = {}
    contestants: dict[str, Callable[..., tuple[float, float, float]]] = {}
    for dtype in args.dtype.split(","):
        engines[dtype] = our_engine(model, dtype, args.threads)
        served = engines[dtype].served()
        assert served is not None
        contestants[f"ours {dtype} ({served.runner})"] = partial(ours, engines[dtype])
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        contestants[f"transformers {name}"] = partial(theirs, as_transformers(model, kind))
    for count in (1, 16):
        measure(contestants, count, args.rounds, NEW)
    for engine in engines.values():
        engine.close(0.0)


if __name__ == "__main__":
    main()
