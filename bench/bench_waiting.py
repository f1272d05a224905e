"""Waiting: how long running streams wait for their next token while the engine computes a long prompt beside them.

    .venv/bin/python -m bench.bench_waiting [--dtype bf16,int8] [--streams 1,4,15] [--rounds 5] [--prompt 1000]
    .venv/bin/python -m bench.bench_waiting --churn 15 [--apart 40] [--prompt 64] [--new 64] [--seconds 10]

GPT-2 124M with random weights, in an engine without HTTP. In each round so many streams run alone for a while, then a
prompt comes, and they go on alone. Gaps between tokens are told in ordinary steps: the median gap of the same streams
without the prompt, before and after, since steps get longer with the streams. A machine that others use, or a virtual
one, has long gaps of its own: those without the prompt are beside those with it.

With `--churn` so many clients each send request after request, and begin some milliseconds apart.
"""

import argparse
import math
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench.measure import Figure, Noise, machine
from bench.ours import engine_of
from bench.reference_model import WORK, model_folder, prompts
from inference.engine import Engine
from inference.sequence import Generation, SamplingParams

STREAM = 64  # tokens of a stream's own prompt
WARM, ALONE = 10, 50  # tokens of a stream that do not count, and alone before the prompt and after
BOUND = 2.0  # ordinary steps


@dataclass
class Gaps:
    """What one number of streams has waited, in all rounds: in ordinary steps, but for the milliseconds."""

    ordinary_ms: Figure = field(default_factory=Figure)
    without: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    first_token_ms: Figure = field(default_factory=Figure)

    def row(self, name: str) -> str:
        """Return a line of the table."""
        over = sum(gap > BOUND for gap in self.beside) / len(self.beside) * 100
        return (
            f"| {name} | {self.ordinary_ms.text(1)} | {percentile(self.without, 99):.2f}, {max(self.without):.2f} "
            f"| {median(self.beside):.2f} | {percentile(self.beside, 99):.2f}, {max(self.beside):.2f} "
            f"| {over:.1f} % of {len(self.beside)} | {self.first_token_ms.text()} |"
        )


def percentile(values: list[float], percent: float) -> float:
    """Return the least of the values that `percent` of them do not exceed."""
    return sorted(values)[max(0, -int(-len(values) * percent // 100) - 1)]


class Prompt:
    """The prompt that comes beside the streams, and when it came and had its first token."""

    def __init__(self, engine: Engine, served: Any, ids: list[int]):
        self._engine, self._served, self._ids = engine, served, ids
        self.came = self.ended = math.inf
        self.first_token_ms = 0.0

    def come(self) -> None:
        """Submit it, and follow it in a thread of its own."""
        self.came = time.perf_counter()
        handle = self._engine.submit(self._served, self._ids, tokens(1))
        threading.Thread(target=self._follow, args=(handle,)).start()

    def _follow(self, handle: Generation) -> None:
        if len(list(handle)) != 1:
            raise RuntimeError("the prompt has ended without a token")
        self.first_token_ms = 1e3 * self._engine.request(handle.id)["first_token_seconds"]  # type: ignore[index]
        self.ended = time.perf_counter()


def tokens(count: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, temperature=0.0, ignore_eos=True)


def stamps(stream: Generation, prompt: Prompt) -> list[float]:
    """Return when a stream's tokens came: some alone, those beside the prompt, some alone."""
    times: list[float] = []
    left = WARM + ALONE
    for _ in stream:
        times.append(time.perf_counter())
        if len(times) == WARM + ALONE:
            prompt.come()
        left -= prompt.ended < math.inf
        if left == 0:
            return times
    raise RuntimeError("the streams have ended before the prompt did")


def one_round(engine: Engine, served: Any, streams: int, length: int, seed: int, gaps: Gaps) -> None:
    """Run so many streams and a prompt beside them; add what is seen of it."""
    prompt = Prompt(engine, served, prompts(1, length, served.vocab_size, -seed)[0])
    room = tokens(served.block_size - STREAM)
    running = [engine.submit(served, ids, room) for ids in prompts(streams, STREAM, served.vocab_size, seed)]
    times = stamps(running[0], prompt)
    for stream in running:
        stream.cancel()
    for stream in running:
        stream.wait_end(60)
    pairs = list(pairwise(times))[WARM:]
    alone = [after - before for before, after in pairs if after <= prompt.came or before > prompt.ended]
    ordinary = median(alone)
    gaps.ordinary_ms.samples.append(1e3 * ordinary)
    gaps.without += [gap / ordinary for gap in alone]
    gaps.beside += [(b - a) / ordinary for a, b in pairs if b > prompt.came and a <= prompt.ended]
    gaps.first_token_ms.samples.append(prompt.first_token_ms)


def touch_cache(engine: Engine, served: Any, slots: int, length: int) -> None:
    """Fill the slots once, so that the cache has its memory: the first touch would be in the gaps."""
    full = [engine.submit(served, ids, tokens(1)) for ids in prompts(slots, length, served.vocab_size, -1)]
    for generation in full:
        generation.wait_end(600)


def waiting(folder: Path, dtype: str, streams: list[int], rounds: int, length: int, threads: int) -> dict[int, Gaps]:
    """Return the gaps of each number of streams, which take turns within each round."""
    slots = max(streams) + 1
    engine, served = engine_of(folder, dtype, threads, slots=slots)
    found = {count: Gaps() for count in streams}
    try:
        touch_cache(engine, served, slots, length)
        for number in range(rounds):
            for count, gaps in found.items():
                one_round(engine, served, count, length, 100 * number + count, gaps)
    finally:
        engine.close(0.0)
    return found


def churn(folder: Path, dtype: str, args: argparse.Namespace) -> str:
    """Let clients send request after request for a while; return a line of the table."""
    engine, served = engine_of(folder, dtype, args.threads, slots=args.churn)
    first = prompts(args.churn, args.prompt, served.vocab_size, 0)
    seen: list[tuple[float, list[float]]] = []  # when a request came, and its tokens

    def client(number: int) -> None:
        time.sleep(number * args.apart / 1e3)
        seed, ids = 10**6 * (1 + number), first[number]
        while (came := time.perf_counter()) < end:
            generation = engine.submit(served, ids, tokens(args.new))
            seed, ids = seed + 1, prompts(1, args.prompt, served.vocab_size, seed)[0]
            seen.append((came, [time.perf_counter() for _ in generation]))

    try:
        touch_cache(engine, served, args.churn, 512)
        begin = time.perf_counter()
        end = begin + args.seconds
        clients = [threading.Thread(target=client, args=(number,)) for number in range(args.churn)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
    finally:
        engine.close(0.0)
    rate = sum(len(times) for _, times in seen) / (max(times[-1] for _, times in seen) - begin)
    waited = [1e3 * (times[0] - came) for came, times in seen if came > begin + args.seconds / 5]
    gaps = [1e3 * (b - a) for _, times in seen for a, b in pairwise(times)]
    return (
        f"| {dtype}, {args.prompt} + {args.new}, {args.apart:g} ms apart | {rate:.0f} | {median(waited):.0f} "
        f"| {percentile(waited, 95):.0f} | {median(gaps):.1f} | {percentile(gaps, 99):.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bf16,int8")
    parser.add_argument("--streams", default="1,4,15")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, help="its tokens: 1000, with --churn 64")
    parser.add_argument("--churn", type=int, default=0, help="clients that send request after request")
    parser.add_argument("--apart", type=float, default=40.0, help="milliseconds from one's first request to the next's")
    parser.add_argument("--new", type=int, default=64, help="tokens that clients ask for")
    parser.add_argument("--seconds", type=float, default=10.0, help="for which clients send")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a small model, to try the benchmark itself")
    args = parser.parse_args()
    folder, streams = model_folder(WORK, args.small), list(map(int, args.streams.split(",")))
    args.prompt = args.prompt or (64 if args.churn else 1000)
    print(f"{machine()}\n")
    if args.churn:
        print("| precision, request | tokens/s | first token, ms: median | p95 | gap, ms: median | p99 |")
        print("|---|---|---|---|---|---|")
        for dtype in args.dtype.split(","):
            print(churn(folder, dtype, args), flush=True)
        return
    print(
        "| precision, streams | ordinary step, ms | without the prompt: p99, worst | beside it: median | p99, worst "
        f"| beyond {BOUND:g} | its first token, ms |\n|---|---|---|---|---|---|---|"
    )
    noise = Noise()
    for dtype in args.dtype.split(","):
        for count, gaps in waiting(folder, dtype, streams, args.rounds, args.prompt, args.threads).items():
            print(gaps.row(f"{dtype}, {count}"), flush=True)
    print(f"\n(others used {noise.cores():.2f} cores)")


if __name__ == "__main__":
    main()
