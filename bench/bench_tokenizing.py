"""Tokenizing: how fast a dataset's text becomes token files, on one core and on all, beside the libraries alone.

    .venv/bin/python -m bench.bench_tokenizing --text FILE [--megabytes 110] [--rounds 3] [--train 4096]

The text is FILE again and again. Ours is the whole preparation: reading, checking, splitting, tokenizing, writing.
tiktoken and tokenizers get texts of a megabyte that are in memory, and keep nothing; tokenizers, which is slower, gets
a part of them. With --train, a byte-pair tokenizer of that size is made of the same text, once, as `bpe:N` does it.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tiktoken
from tokenizers import Tokenizer as HuggingFaceTokenizer

from bench.measure import machine, rounds, table
from storage import tokenizer as tokenizers
from storage.datasets import Dataset
from storage.runs import Workspace
from storage.tokenizer_choice import tokenizer_for
from training.progress import PreparationLine

PIECE, SLOW_SHARE = 1_000_000, 10  # characters; tokenizers gets one in so many pieces


def on(cores: set[int], work: Callable[[], int]) -> Callable[[], float]:
    """Return work on some cores as a contestant: MB/s, where `work` returns the bytes it did."""

    def timed() -> float:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)
        try:
            begun = time.perf_counter()
            done = work()
            return done / 1e6 / (time.perf_counter() - begun)
        finally:
            os.sched_setaffinity(0, before)

    return timed


def make_text(folder: Path, text: bytes, megabytes: int) -> int:
    """Write the text of a dataset, `text` again and again; return its bytes."""
    folder.mkdir(parents=True)
    count = -(-megabytes * 10**6 // len(text))
    with open(folder / "text.txt", "wb") as f:
        for _ in range(count):
            f.write(text)
    return count * len(text)


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=110)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", type=int)
    args = parser.parse_args()
    text, all_cores = args.text.read_bytes(), os.sched_getaffinity(0)
    one, gpt2, encoding = {min(all_cores)}, tokenizers.gpt2(), tiktoken.get_encoding("gpt2")
    with tempfile.TemporaryDirectory() as folder:
        source = Dataset(Workspace(Path(folder)), "text")
        size = make_text(source.folder, text, args.megabytes)
        pieces = [(source.folder / "text.txt").read_text()[i : i + PIECE] for i in range(0, size, PIECE)]
        gpt2.save(Path(folder) / "tokenizer.json")
        slow = HuggingFaceTokenizer.from_file(str(Path(folder) / "tokenizer.json"))

        def prepare() -> int:
            shutil.rmtree(source.folder / "tokens", ignore_errors=True)
            source.prepare(gpt2)
            return size

        def plain() -> int:
            return sum(len(piece.encode()) for piece in pieces if encoding.encode_ordinary(piece))

        def slowly() -> int:
            return sum(len(piece.encode()) for piece in pieces[::SLOW_SHARE] if slow.encode(piece))

        contestants = {"ours, one core": on(one, prepare), f"ours, {len(all_cores)} cores": on(all_cores, prepare)}
        contestants |= {"tiktoken, one core": on(one, plain), "tokenizers, one core": on(one, slowly)}
        figures, others = rounds(contestants, args.rounds)
        print(machine())
        print(table(f"GPT-2's tokens of {size / 1e6:,.0f} MB", "MB/s", figures, "ours, one core", digits=1))
        print(f"\n({args.rounds} rounds; others used {others:.2f} cores meanwhile)")
        if args.train is not None:
            begun = time.perf_counter()
            made = tokenizer_for(f"bpe:{args.train}", source, source.workspace, PreparationLine())
            print(f"\n{made.name} of {size / 1e6:,.0f} MB: {time.perf_counter() - begun:.1f} s")


if __name__ == "__main__":
    main()
