"""What choosing the next tokens costs beside the step that computes their logits, at 16 requests.

    .venv/bin/python -m bench.bench_sampling [--dtype bf16,int8] [--steps 60] [--threads 2] [--small]

GPT-2 124M with random weights in the native runner. After each decode step the same logits go to every kind of
sampling, by turns in another order, so that none finds them warmer than the others. Random weights make flat
distributions, the hard case where top_p is used without top_k.
"""

import argparse
import time

import torch

from bench.measure import Figure, Noise, machine
from bench.reference_model import prompts, random_model
from inference.native_runner import NativeRunner
from inference.sampling import sample
from inference.sequence import SamplingParams, Sequence

REQUESTS, CONTEXT = 16, 64
KINDS = {
    "greedy": {"temperature": 0.0},
    "top_k 40, top_p 0.9": {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    "top_k 40, top_p 0.9, logprobs 5": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "logprobs": 5},
    "top_k 40, top_p 0.9, repetition 1.2": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2},
    "temperature alone": {"temperature": 0.8, "top_k": 0},
    "top_p 0.9 alone": {"temperature": 0.8, "top_k": 0, "top_p": 0.9},
}


def sequences(knobs: dict[str, float]) -> list[Sequence]:
    """Return one sequence for each request."""
    params = [SamplingParams(max_new_tokens=512, seed=seed, **knobs) for seed in range(REQUESTS)]  # type: ignore[arg-type]
    return [Sequence(list(range(CONTEXT)), p) for p in params]


def measure(runner: NativeRunner, steps: int) -> tuple[Figure, dict[str, Figure]]:
    """Return the milliseconds of steps, and of each kind of sampling."""
    slots = list(range(REQUESTS))
    for slot, ids in enumerate(prompts(REQUESTS, CONTEXT, runner.vocab_size, 0)):
        runner.rows(ids, [slot] * CONTEXT, list(range(CONTEXT)), [])
    step, kinds = Figure(), {name: Figure() for name in KINDS}
    asked = {name: sequences(knobs) for name, knobs in KINDS.items()}
    tokens, order = [0] * REQUESTS, list(KINDS)
    for i in range(steps):
        start = time.perf_counter()
        logits = runner.rows(tokens, slots, [CONTEXT + i] * REQUESTS, slots)
        step.samples.append((time.perf_counter() - start) * 1e3)
        greatest = runner.last_argmax
        order.append(order.pop(0))
        for name in order:
            start = time.perf_counter()
            chosen = sample(logits, asked[name], greatest, runner.draw, runner.logprobs)
            kinds[name].samples.append((time.perf_counter() - start) * 1e3)
            tokens = [token.token_id if token is not None else 0 for token in chosen]
            for sequence, token_id in zip(asked[name], tokens, strict=True):
                sequence.output_ids.append(token_id)
    return step, kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bf16,int8")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a small model, to try the benchmark itself")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as the engine does beside this runner
    model = random_model(args.small)
    noise = Noise()
    print("| precision | sampling | ms | of a step |\n|---|---|---|---|")
    for dtype in args.dtype.split(","):
        step, kinds = measure(NativeRunner(model, REQUESTS, dtype, args.threads), args.steps)
        print(f"| {dtype} | (the step itself) | {step.text(1)} | |")
        for name, figure in kinds.items():
            print(f"| {dtype} | {name} | {figure.text(2)} | {100 * figure.median / step.median:.1f} % |")
    print(f"\n{machine()}; others used {noise.cores():.2f} cores")


if __name__ == "__main__":
    main()
