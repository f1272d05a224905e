"""Generation on a GPU: our engine and transformers in one run, on GPT-2 124M with random weights in bf16.

    .venv/bin/python -m bench.bench_gpu [--rounds 3] [--peer_python PYTHON] [--requests 128]

Prompts of 64 random tokens, 128 new ones, greedy, end-of-text ignored; one request, and many at once, which are one
static batch for transformers. Each has a process of its own and they take turns. The first turn does the whole work
unmeasured, since graphs are recorded in it. It ends with a sentence where there is no GPU; `--device cpu --small`
tries the benchmark itself.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from bench.bench_generate import NEW, Column, Lineup, measure, ours, pairs, transformers
from bench.contestant import Result
from bench.measure import Figure, comparison, machine
from bench.reference_model import WORK, model_folder
from storage.pretrained import load_folder

ONE_AIM, MANY_AIM, PEER_AIM = 2500, 100_000, 5.0  # tokens/s on one H200, the second at 128 requests; times transformers


def columns(requests: int) -> tuple[Column, ...]:
    """Return the columns of the table."""

    def decode(result: Result) -> float:
        return result.decode

    one, many = (1, 64, NEW), (requests, 64, NEW)
    return (
        Column("1 request, tokens/s", one, decode),
        Column(f"{requests} requests, tokens/s", many, decode),
        Column("first token, ms", one, lambda r: r.first * 1e3, 1, True),
        Column(f"of {requests} x 64, ms", many, lambda r: r.first * 1e3, 1, True),
    )


def verdict(title: str, figure: Figure, aim: float) -> str:
    """Return a sentence on a figure of ours and what is aimed at."""
    return f"{title}: {figure.text()}, aim {aim:g}: {'holds' if figure.median >= aim else 'does not hold'}."


def lineup(folder: Path, args: argparse.Namespace) -> Lineup:
    """Start both."""
    found, device = Lineup(), ["--device", args.device]
    slots = ["--slots", str(args.requests)]
    found.add("ours bf16", partial(ours, folder, "bf16", args.threads, "--runner", "torch", *device, *slots))
    found.add("transformers bf16", partial(transformers, folder, "bf16", args, *device))
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the arguments. Exits with a sentence when there is no such GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--requests", type=int, default=128, help="how many at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer_python", default=sys.executable, help="Python that has transformers")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the model, made at first use")
    parser.add_argument("--small", action="store_true", help="a small model, to try the benchmark itself")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "There is no GPU here that torch can use, so there is nothing to measure.\n")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    folder = model_folder(args.work.resolve(), args.small)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU: these figures mean nothing"
    found, wanted = lineup(folder, args), columns(args.requests)
    print(f"{gpu}; {machine()}\n" + "".join(f"- {line}\n" for line in found.said), flush=True)
    try:
        vocab_size = load_folder(folder)[0].config.vocab_size
        figures, _, others = measure(found.present, wanted, vocab_size, args.rounds, warm_up=NEW)
    finally:
        found.close()
    names = [c.name for c in found.present]
    digits, less = {c.title: c.digits for c in wanted}, {c.title for c in wanted if c.less_is_better}
    aims = {(peer, c.title): PEER_AIM for peer in names[1:] for c in wanted[:2]}
    print(comparison(figures, digits, less, pairs(names), aims))
    if args.device == "cuda" and "ours bf16" in names:
        print(verdict(wanted[0].title, figures[wanted[0].title]["ours bf16"], ONE_AIM))
        if args.requests == 128:
            print(verdict(wanted[1].title, figures[wanted[1].title]["ours bf16"], MANY_AIM))
    print(f"({args.rounds} rounds; others used {others:.2f} cores meanwhile)")


if __name__ == "__main__":
    main()
