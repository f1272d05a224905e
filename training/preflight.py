"""Preflight: what a training will be, from its tokens and three measured iterations, and warnings in words.

Text that is there twice, or in both splits, is found as pieces of about a hundred bytes that occur again at any
place, and examples (prompts with completions, conversations) as wholes; each is a hash, so that millions of tokens
take a second. No torch here: dry_run.py measures.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.datasets import Splits
from storage.machine import available_memory
from storage.token_files import BEGINS, bytes_per_token, count_learned
from training.config import TrainConfig
from training.examples import Mask
from training.progress import duration, quantity
from training.windows import Tokens

PIECE_BYTES = 100
SHORTEST, LONGEST = 8, 128  # tokens of a piece
MOST_TOKENS = 4_000_000  # of a split that are looked at; of longer ones the rates are at least those that are told
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no token is lost modulo 2**64
MEMORISING, DUPLICATES, LEAK, CUT, LONG_SECONDS = 20, 0.10, 0.01, 0.05, 12 * 3600
FORWARD_SHARE = 1 / 3  # of an iteration's time that its forward pass takes


def hashes(tokens: Tokens, length: int) -> npt.NDArray[np.uint64]:
    """Return a hash of the `length` tokens from each position on."""
    count = len(tokens) - length + 1
    found = np.zeros(max(count, 0), dtype=np.uint64)
    for k in range(length if count > 0 else 0):
        found = found * BASE + (tokens[k : k + count].astype(np.uint64) + np.uint64(1))
    return found


def _occurrences(pieces: npt.NDArray[np.uint64], among: npt.NDArray[np.uint64]) -> npt.NDArray[Any]:
    """Return how often each piece is among sorted hashes."""
    left, right = (np.searchsorted(among, pieces, side) for side in ("left", "right"))
    return np.asarray(right - left)


def example_lengths(mask: Mask) -> npt.NDArray[np.int64]:
    """Return the number of tokens of each example."""
    return np.diff(np.append(np.flatnonzero(mask & BEGINS), len(mask)))


def hashes_of_examples(tokens: Tokens, mask: Mask) -> npt.NDArray[np.uint64]:
    """Return a hash of each example, the sum of its tokens times powers of BASE."""
    lengths = example_lengths(mask)
    begins = len(mask) - np.cumsum(lengths[::-1])[::-1]
    if len(begins) == 0:
        return np.zeros(0, dtype=np.uint64)
    powers = np.multiply.accumulate(np.full(lengths.max(), BASE))
    places = np.arange(begins[0], len(mask)) - np.repeat(begins, lengths)
    terms = (tokens[begins[0] :].astype(np.uint64) + np.uint64(1)) * powers[places]
    return np.asarray(np.add.reduceat(terms, begins - begins[0]))


def overlap_of_examples(splits: Splits, train_mask: Mask, val_mask: Mask) -> dict[str, float | None]:
    """Return which share of the training examples is there more than once, and which share of val's is in train."""
    train = hashes_of_examples(np.asarray(splits.train[:MOST_TOKENS]), np.asarray(train_mask[:MOST_TOKENS]))
    val = hashes_of_examples(np.asarray(splits.val[:MOST_TOKENS]), np.asarray(val_mask[:MOST_TOKENS]))
    among = np.sort(train)
    again = float((_occurrences(train, among) > 1).mean()) if len(train) else None
    leaked = float((_occurrences(val, among) > 0).mean()) if len(val) and len(train) else None
    return {"duplicate_rate": again, "leak_rate": leaked}


def overlap(splits: Splits) -> dict[str, float | None]:
    """Return which share of the training text is there again, and which share of val is in train, too."""
    if splits.train_mask is not None and splits.val_mask is not None:
        return overlap_of_examples(splits, splits.train_mask, splits.val_mask)
    length = min(max(round(PIECE_BYTES / max(splits.bytes_per_token, 0.1)), SHORTEST), LONGEST)
    train = hashes(np.asarray(splits.train[:MOST_TOKENS]), length)
    val = hashes(np.asarray(splits.val[:MOST_TOKENS]), length)[::length]
    pieces, among = train[::length], np.sort(train)
    again = float((_occurrences(pieces, among) > 1).mean()) if len(pieces) else None
    leaked = float((_occurrences(val, among) > 0).mean()) if len(val) and len(train) else None
    return {"duplicate_rate": again, "leak_rate": leaked}


def expected_seconds(config: TrainConfig, per_iteration: float) -> float:
    """Return how long a resolved config's run takes, evaluations included."""
    iterations, interval = int(config.max_iters or 1), int(config.eval_interval or 1)
    batch = per_iteration / int(config.gradient_accumulation_steps or 1) * FORWARD_SHARE
    return iterations * per_iteration + (iterations // interval + 1) * 2 * int(config.eval_iters or 1) * batch


def report(
    config: TrainConfig, splits: Splits, window: int, vocab_size: int, updates: Sequence[dict[str, float]], memory: int
) -> dict[str, Any]:
    """Return all that is known before a training; each update has `loss` and `seconds`, the first one warms up."""
    batch = int(config.batch_size or 1) * int(config.gradient_accumulation_steps or 1) * window
    seconds = min(update["seconds"] for update in updates[1:] or updates)
    mask = splits.train_mask
    learned = len(splits.train) if mask is None else count_learned(mask)
    found: dict[str, Any] = {"train_tokens": len(splits.train), "val_tokens": len(splits.val)}
    found |= {"learned_tokens": learned, "tokenizer": splits.tokenizer.name}
    some = None if mask is None else mask[:MOST_TOKENS]
    per_token = bytes_per_token(splits.train[:MOST_TOKENS], splits.tokenizer, some)  # val's can be far from it
    found |= {"train_bytes": round(learned * per_token)}  # of what is learned
    found |= {"cut_rate": None if mask is None else float((example_lengths(mask) > window).mean())}
    found |= {"tokens_per_iteration": batch, "max_iters": config.max_iters}
    found |= {"epochs": int(config.max_iters or 1) * batch / len(splits.train)}
    found |= {"seconds_per_iteration": seconds, "tokens_per_second": batch / seconds}
    found |= {"expected_seconds": expected_seconds(config, seconds), "peak_memory_bytes": memory}
    start = math.log(vocab_size) if config.init_from == "scratch" else None
    found |= {"expected_start_loss": start, "start_loss": updates[0]["loss"], "uniform_loss": math.log(vocab_size)}
    found |= overlap(splits)
    return found | {"warnings": warnings(found, window)}


def warnings(found: dict[str, Any], window: int) -> list[str]:
    """Return in words what is worth a thought before the training starts."""
    epochs, said, available = found["epochs"], [], available_memory()
    if epochs >= MEMORISING:
        said.append(f"{epochs:,.0f} epochs over {quantity(found['train_bytes'])}B: it will memorise")
    if epochs < 0.5:
        said.append(f"max_iters covers {100 * epochs:.2g} % of the training text; the rest is never seen")
    if found["val_tokens"] < 20 * window:
        said.append(f"only {found['val_tokens']:,} tokens to validate on: val loss will be noisy")
    if (found["duplicate_rate"] or 0) >= DUPLICATES:
        said.append(f"{100 * found['duplicate_rate']:.0f} % of the training text is there more than once")
    if (found["leak_rate"] or 0) >= LEAK:
        said.append(
            f"{100 * found['leak_rate']:.0f} % of the validation text is in the training text, too: val loss will "
            "look better than it is"
        )
    if (found["cut_rate"] or 0) >= CUT:
        said.append(
            f"{100 * found['cut_rate']:.0f} % of the examples are longer than a window of {window} tokens: their ends "
            "are learned without their beginnings"
        )
    if found["expected_start_loss"] is None and found["start_loss"] > found["uniform_loss"]:
        said.append(f"the trained model starts at a loss of {found['start_loss']:.2f}, worse than guessing")
    elif found["expected_start_loss"] is not None and abs(found["start_loss"] / found["expected_start_loss"] - 1) > 0.1:
        said.append(f"it starts at a loss of {found['start_loss']:.2f}, not near {found['expected_start_loss']:.2f}")
    if available is not None and found["peak_memory_bytes"] > 0.8 * available:
        said.append(f"it takes {quantity(found['peak_memory_bytes'])}B of memory, and {quantity(available)}B are free")
    if found["expected_seconds"] > LONG_SECONDS:
        said.append(f"it will take {duration(found['expected_seconds'])}")
    return said
