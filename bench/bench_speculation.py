"""Speculation: decoding with drafts and without, taking turns in one run, on texts that repeat and texts that do not.

    .venv/bin/python -m bench.bench_speculation [--dtype int8] [--rounds 3] [--requests 1,4,16] [--texts edits,code]

GPT-2 124M's shapes, and a position table that makes the model write a given text whatever came before: so the text can
be source code, prose, random tokens, or the prompt once more with 3 % of its tokens changed, in tokens of a BPE made of
Python's library. `own` is the bundled model and the text that it writes itself. The prompt's keys and values are in
the cache, so that what is timed is decoding. One engine does both, and must give the same tokens.
"""

import argparse
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch

from bench.contestant import ROOT
from bench.measure import Figure, machine, ratio, rounds
from bench.reference_model import random_model
from inference.engine import Engine
from inference.sequence import SamplingParams
from inference.speculation import most_drafting
from model import GPT
from storage.checkpoints import open_model
from storage.registry import ModelReference
from storage.runs import Workspace
from storage.tokenizer import Tokenizer, train_bpe

PROMPT, NEW = 192, 128  # tokens
LOUD = 40.0  # times a token's embedding: what a position adds, so that nothing else decides the next token
CHANGED = 0.03  # of the tokens in `edits`: another one, one more or one less


@dataclass
class Text:
    """What a model is to write, and the tokens that it follows."""

    model: GPT | Any
    tokenizer: Tokenizer
    prompt: list[int]
    new: int


def edited(ids: list[int], rng: random.Random, vocab_size: int) -> list[int]:
    """Return tokens with a few replaced, put in or left out."""
    found = []
    for token_id in ids:
        kind = rng.random() / CHANGED
        if kind < 2 / 3:
            found.append(rng.randrange(vocab_size))
        if kind > 1 / 3:
            found.append(token_id)
    return found


def texts(tokenizer: Tokenizer, code: str, prose: str) -> dict[str, list[int]]:
    """Return PROMPT + NEW tokens of each kind, the first ones to be the prompt."""
    rng, length = random.Random(1), PROMPT + NEW

    def part(text: str) -> list[int]:
        ids = tokenizer.encode(text)
        start = rng.randrange(len(ids) - length)
        return ids[start : start + length]

    source = part(code)[:PROMPT]
    again = edited(source, rng, tokenizer.n_vocab)
    return {
        "edits": (source + again)[:length],
        "code": part(code),
        "prose": part(prose),
        "random": [rng.randrange(tokenizer.n_vocab) for _ in range(length)],
    }


def let_write(model: GPT, ids: list[int]) -> None:
    """Make the token after each position the one of `ids`."""
    wte, wpe = model.transformer["wte"].weight, model.transformer["wpe"].weight
    with torch.no_grad():
        wpe[: len(ids) - 1] = LOUD * wte[ids[1:]]


def scripted(names: list[str], small: bool) -> Iterator[tuple[str, Text]]:
    """Give the texts that are named, each with a model that writes it."""
    library = Path(sysconfig.get_path("stdlib"))
    code = [path.read_text("utf-8", "ignore") for path in sorted(library.glob("*.py"))]
    prose = (library / "pydoc_data" / "topics.py").read_text("utf-8")
    tokenizer = train_bpe([*code, prose], 512 if small else 8192)
    model = random_model(small)
    for name, ids in texts(tokenizer, "\n".join(code), prose).items():
        if name in names:
            let_write(model, ids)
            yield name, Text(model, tokenizer, ids[:PROMPT], NEW)


def bundled() -> Text:
    """Return the bundled model at its own text."""
    folder = ROOT / "models" / "tiny-shakespeare"
    opened = open_model(ModelReference("own", "folder", folder, "own"), Workspace(ROOT))
    return Text(opened.model, opened.tokenizer, opened.tokenizer.encode("First Citizen:\n"), 224)


def engine_of(text: Text, dtype: str, threads: int) -> tuple[Engine, Any]:
    """Return an engine that has the text's model, and the model as it serves."""

    def loader(reference: Any, workspace: Any) -> Any:
        return SimpleNamespace(model=text.model, tokenizer=text.tokenizer, reference=reference)

    engine = Engine(Workspace(ROOT), device="cpu", dtype=dtype, threads=threads, loader=loader)
    return engine, engine.load(ModelReference("bench", "folder", None, "bench"))


def generate(engine: Engine, served: Any, on: bool, text: Text, requests: int, seen: set[tuple[int, ...]]) -> float:
    """Return tokens per second of so many requests; `seen` gets what they have written."""
    lane = engine._pool.lane(served)
    if lane is None or served.runner != "native":
        raise RuntimeError(f"the {served.runner} runner never drafts: {served.runner_reason}")
    # the same weights in the same memory: two engines' speeds differ by 3 %
    lane.scheduler.speculation.most = most_drafting(served.parameters) if on else 0
    params = SamplingParams(max_new_tokens=text.new, temperature=0.0, ignore_eos=True)
    start = perf_counter()
    running = [engine.submit(served, text.prompt, params) for _ in range(requests)]
    for generation in running:
        generation.wait_end(600)
    seconds = perf_counter() - start
    seen.update(tuple(token.token_id for token in generation) for generation in running)
    return requests * text.new / seconds


def compare(name: str, text: Text, args: argparse.Namespace) -> Iterator[str]:
    """Give a line of the table for each number of requests. Raises RuntimeError if drafts have changed a token."""
    engine, served = engine_of(text, args.dtype, args.threads)
    seen: set[tuple[int, ...]] = set()
    try:
        generate(engine, served, False, text, 1, seen)  # the prompt into the cache
        for requests in map(int, args.requests.split(",")):
            before = engine.info()
            contestants: dict[str, Callable[[], float]] = {
                str(on): partial(generate, engine, served, on, text, requests, seen) for on in (False, True)
            }
            figures, others = rounds(contestants, args.rounds)
            yield line(name, requests, figures, before, engine.info(), others)
    finally:
        engine.close(0.0)
    if len(seen) != 1:
        raise RuntimeError(f"{name}: drafts have changed the text")


def line(name: str, requests: int, figures: dict[str, Figure], before: Any, after: Any, others: float) -> str:
    """Return a line of the table; half of the tokens came without drafts."""
    off, on = figures["False"], figures["True"]
    tokens, drafted, accepted = (after[key] - before[key] for key in ("tokens", "drafted_tokens", "accepted_tokens"))
    return (
        f"| {name} | {requests} | {off.text()} | {on.text()} | {ratio(on, off)} x "
        f"| {2 * drafted / tokens:.2f} | {2 * accepted / tokens:.2f} | {others:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", default="1,4,16")
    parser.add_argument("--texts", default="edits,code,prose,random,own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a small model, to try the benchmark itself")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{machine()}\n\n**{args.dtype}**, tokens/s\n")
    print("| text | requests | without | with drafts | | drafted a token | accepted a token | cores used by others |")
    print("|---|---|---|---|---|---|---|---|")
    names = args.texts.split(",")
    for name, text in scripted(names, args.small):
        for row in compare(name, text, args):
            print(row, flush=True)
    if "own" in names:
        for row in compare("own", bundled(), args):
            print(row, flush=True)


if __name__ == "__main__":
    main()
