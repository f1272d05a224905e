"""The native step alone, without engine and sampling: decode at several numbers of rows, prefill of several prompts.

    .venv/bin/python -m bench.bench_native [--dtype bf16,int8] [--rounds 5] [--threads 2] [--small]

GPT-2 124M with random weights. In each round the memory's read limit is measured beside everything else: a decode step
reads all weights once, so its share of the limit says what is left to win. Prefill is bound by arithmetic; its figure
is the time to the logits of each prompt's last token.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from bench.measure import Figure, Noise, machine, read_bandwidth
from bench.reference_model import decode_bytes, prompts, random_model
from inference.native_runner import NativeRunner

CONTEXT, STEPS = 64, 12  # positions before a decode step; steps of one sample
DECODE = (1, 4, 16, 32)  # rows
PREFILL = ((1, 64), (1, 512), (16, 64))  # prompts and their length


def prefill(runner: NativeRunner, ids: list[list[int]]) -> float:
    """Compute prompts of one length in one step; return the seconds."""
    length = len(ids[0])
    slots = [slot for slot in range(len(ids)) for _ in range(length)]
    last = [(i + 1) * length - 1 for i in range(len(ids))]
    tokens, positions = [token for prompt in ids for token in prompt], list(range(length)) * len(ids)
    start = time.perf_counter()
    runner.rows(tokens, slots, positions, last)
    return time.perf_counter() - start


def decode(runner: NativeRunner, rows: int) -> float:
    """Continue `rows` sequences greedily from CONTEXT on; return the seconds of a step."""
    slots, tokens = list(range(rows)), [0] * rows
    start = time.perf_counter()
    for step in range(STEPS):
        at = (tokens, slots, [CONTEXT + step] * rows, slots)
        if runner.greatest is None:
            runner.rows(*at)
        tokens = runner.last_argmax if runner.greatest is None else runner.greatest(*at)
    return (time.perf_counter() - start) / STEPS


def works(runner: NativeRunner, vocabulary: int) -> dict[str, Callable[[], float]]:
    """Return what is timed, by its name in the table."""
    fill = prompts(max(DECODE), CONTEXT, vocabulary, 0)
    prefill(runner, fill)
    found: dict[str, Callable[[], float]] = {f"decode, {rows} rows": partial(decode, runner, rows) for rows in DECODE}
    for count, length in PREFILL:
        ids = prompts(count, length, vocabulary, 1)
        found[f"prefill, {count} x {length}"] = partial(prefill, runner, ids)
    return found


def row(name: str, dtype: str, seconds: Figure, bandwidth: Figure, nbytes: float) -> str:
    """Return a line of the table: milliseconds, tokens/s, and the share of the limit of a step that reads `nbytes`."""
    _, _, size = name.partition(", ")
    tokens = int(size.split()[0]) * (int(size.split()[2]) if " x " in size else 1)
    ms, share = Figure([s * 1e3 for s in seconds.samples]), ""
    if name.startswith("decode"):
        pairs = zip(seconds.samples, bandwidth.samples, strict=True)
        share = f"{Figure([nbytes / 1e9 / s / limit * 100 for s, limit in pairs]).text()} %"
    return f"| {dtype} | {name} | {ms.text(1)} | {tokens / seconds.median:.0f} | {share} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bf16,int8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a small model, to try the benchmark itself")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = random_model(args.small)
    config = model.config
    contestants = {
        (dtype, name): work
        for dtype in args.dtype.split(",")
        for name, work in works(NativeRunner(model, max(DECODE), dtype, args.threads), config.vocab_size).items()
    }
    del model
    seconds, bandwidth, noise = {key: Figure() for key in contestants}, Figure(), Noise()
    for _ in range(args.rounds):
        bandwidth.samples.append(read_bandwidth())
        for key, work in contestants.items():
            seconds[key].samples.append(work())
    print(f"{machine()}; read limit {bandwidth.text(1)} GB/s; others used {noise.cores():.2f} cores\n")
    print("| precision | work | ms | tokens/s | of the read limit |\n|---|---|---|---|---|")
    for (dtype, name), figure in seconds.items():
        print(row(name, dtype, figure, bandwidth, decode_bytes(config, dtype)))


if __name__ == "__main__":
    main()
