"""Token files: train.bin and val.bin, arrays of ids on disk, and how text becomes them.

Ids are little-endian uint16, as in nanoGPT, or uint32 when the vocabulary has more than 65536. They are read as
memory maps. Writing splits the documents into train and val, tokenizes them in parallel and appends to plain
files (a full disk then is an error, where a map would be a crash). Folders and caches are datasets.py's matter.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from storage.documents import Scan
from storage.errors import NotLoadable
from storage.files import open_regular
from storage.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much it is
Ids = npt.NDArray[np.uint32]

BATCH_CHARACTERS = 2**20  # per task of a thread
CHECK_IDS = 2**24  # ids looked at at once
MANY_DOCUMENTS = 10  # different ones; fewer are split as one text
LARGE_BYTES = 100_000_000  # of text; of more, 1 % is enough to validate on


@dataclass(frozen=True)
class Splits:
    """The two token arrays of a dataset for one tokenizer."""

    train: np.memmap  # uint16 or uint32
    val: np.memmap
    bytes_per_token: float  # UTF-8 bytes of val's text per token of val
    tokenizer: Tokenizer
    name: str  # of the dataset, for messages

    def require_length(self, block_size: int) -> None:
        """Raise NotLoadable unless both splits have at least one sequence of block_size tokens and its target."""
        for split, tokens in (("train", self.train), ("val", self.val)):
            if len(tokens) < block_size + 1:
                raise NotLoadable(
                    f"dataset {self.name}: {split} has {len(tokens)} tokens; "
                    f"block_size {block_size} needs at least {block_size + 1}"
                )


# ---- reading


def token_type(n_vocab: int) -> np.dtype:
    """Return the type in which ids of a vocabulary of this size are stored."""
    return np.dtype("<u2" if n_vocab <= 2**16 else "<u4")


def count_tokens(data: Path, parts: Sequence[str], dtype: np.dtype) -> int:
    """Return the number of ids in a token file; raises NotFound, or NotLoadable for what cannot be one."""
    name = "/".join([data.name, *parts])
    descriptor = open_regular(data, parts)
    try:
        size = os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
    if size == 0:
        raise NotLoadable(f"{name} is empty")
    if size % dtype.itemsize != 0:
        raise NotLoadable(f"{name} has {size} bytes, not a multiple of {dtype.itemsize}: it is no file of {dtype.name}")
    return size // dtype.itemsize


def open_tokens(data: Path, parts: Sequence[str], dtype: np.dtype) -> np.memmap:
    """Return the ids in the token file data/parts as a read-only memory map."""
    count_tokens(data, parts, dtype)
    with open(open_regular(data, parts), "rb") as f:
        return np.memmap(f, dtype=dtype, mode="r")


def check_ids(tokens: np.memmap, n_vocab: int, name: str, progress: Progress) -> None:
    """Raise NotLoadable if an id is not in a vocabulary of this size, naming the first one."""
    for start in range(0, len(tokens), CHECK_IDS):
        piece = tokens[start : start + CHECK_IDS]
        if piece.max() >= n_vocab:
            at = int(np.argmax(piece >= n_vocab))
            raise NotLoadable(
                f"{name} has the id {piece[at]} at position {start + at}; the vocabulary has {n_vocab} ids"
            )
        progress(f"checking {name}", start + len(piece), len(tokens))


def bytes_per_token(tokens: np.memmap, tokenizer: Tokenizer) -> float:
    """Return the UTF-8 bytes of the text per token; special tokens count as tokens without text."""
    special = set(tokenizer.special_tokens.values())
    lengths = [0 if i in special else len(tokenizer.token_bytes(i)) for i in range(tokenizer.n_vocab)]
    table = np.array(lengths, dtype=np.int64)
    total = sum(int(table[tokens[i : i + CHECK_IDS]].sum()) for i in range(0, len(tokens), CHECK_IDS))
    return total / len(tokens)


# ---- splitting


def split_by_place(stream: Iterator[tuple[str, bool]], val_from: int) -> Iterator[tuple[int, str, bool]]:
    """Label pieces with 0 (train) or 1 (val): val is what follows the first `val_from` characters."""
    at = 0
    for text, ends in stream:
        room = max(0, val_from - at)
        at += len(text)
        if 0 < room < len(text):
            yield 0, text[:room], False
            yield 1, text[room:], ends
        else:
            yield (0 if room > 0 else 1), text, ends


def split_by_hash(
    stream: Iterator[tuple[str, bool]], hashes: Sequence[int], largest: int
) -> Iterator[tuple[int, str, bool]]:
    """Label the pieces of each document with 1 (val) if its hash is at most `largest`, else with 0 (train)."""
    document = 0
    for text, ends in stream:
        if document >= len(hashes):
            raise NotLoadable("the text changed while it was read; try again")
        yield int(hashes[document] <= largest), text, ends
        document += ends


def split(
    stream: Iterator[tuple[str, bool]], found: Scan, val_from: int | None = None
) -> Iterator[tuple[int, str, bool]]:
    """Label pieces of documents with 0 (train) or 1 (val), the same way each time.

    `val_from` is the character at which text that is meant for val begins, None if the dataset has no such text.
    Many documents: every tenth (hundredth, of much text) by the order of their hashes, so that copies of one
    document are on the same side. Few documents, or one: the last tenth of the characters, as in nanoGPT.
    """
    if val_from is not None:
        return split_by_place(stream, val_from)
    distinct = sorted(set(found.hashes))
    if len(distinct) < MANY_DOCUMENTS:
        return split_by_place(stream, int(found.characters * 0.9))
    share = 100 if found.bytes > LARGE_BYTES else 10
    return split_by_hash(stream, found.hashes, distinct[-(-len(distinct) // share) - 1])


# ---- writing


def separator(tokenizer: Tokenizer, documents: int) -> Ids:
    """Return what ends each of several documents: <|endoftext|>, else a line end if the vocabulary has one."""
    if documents < 2:
        return np.empty(0, dtype=np.uint32)
    if tokenizer.eot is not None:
        return np.array([tokenizer.eot], dtype=np.uint32)
    try:
        return tokenizer.encode_array("\n")
    except ValueError:
        return np.empty(0, dtype=np.uint32)


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _batches(stream: Iterator[tuple[int, str, bool]]) -> Iterator[list[tuple[int, str, bool]]]:
    batch: list[tuple[int, str, bool]] = []
    size = 0
    for labelled in stream:
        batch.append(labelled)
        size += len(labelled[1])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, between: Ids, batch: list[tuple[int, str, bool]]) -> tuple[Ids, Ids, int]:
    """Return the ids of a batch for train and for val, and its number of characters."""
    ids: tuple[list[Ids], list[Ids]] = ([between[:0]], [between[:0]])
    for side, text, ends in batch:
        ids[side].append(tokenizer.encode_array(text))
        if ends:
            ids[side].append(between)
    return np.concatenate(ids[0]), np.concatenate(ids[1]), sum(len(text) for _, text, _ in batch)


def _in_order(
    tokenizer: Tokenizer, between: Ids, stream: Iterator[tuple[int, str, bool]], threads: int
) -> Iterator[tuple[Ids, Ids, int]]:
    """Encode batches in `threads` threads (tiktoken leaves Python to the others); give them in their order."""
    running: deque[Future[tuple[Ids, Ids, int]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in _batches(stream):
                running.append(pool.submit(_encode, tokenizer, between, batch))
                if len(running) > 2 * threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def write_tokens(
    folder: Path,
    stream: Iterator[tuple[int, str, bool]],
    found: Scan,
    tokenizer: Tokenizer,
    progress: Progress,
) -> None:
    """Write train.bin and val.bin of the documents that `split` labelled into `folder`, synced to the disk."""
    dtype, done = token_type(tokenizer.n_vocab), 0
    between = separator(tokenizer, found.documents)
    with open(folder / "train.bin", "xb") as train, open(folder / "val.bin", "xb") as val:
        for train_ids, val_ids, characters in _in_order(tokenizer, between, stream, usable_cores()):
            train.write(train_ids.astype(dtype).tobytes())
            val.write(val_ids.astype(dtype).tobytes())
            done += characters
            progress("tokenizing", done, found.characters)
        for f in (train, val):
            f.flush()
            os.fsync(f.fileno())
