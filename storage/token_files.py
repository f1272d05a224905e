"""Token files: train.bin and val.bin, arrays of ids on disk, and how text becomes them.

Ids are little-endian uint16, as in nanoGPT, or uint32 when the vocabulary has more than 65536. Where a part of the
text is only read and not learned (prompts, what others say in a chat), train.mask.bin and val.mask.bin say so, one
byte a token: the sum of LEARNED and BEGINS. Without them all is learned. All are read as memory maps.
Writing splits the documents into train and val, tokenizes them in parallel and appends to plain files (a full disk
then is an error, where a map would be a crash), which unfinished.py lets survive a kill. Folders and caches are
datasets.py's matter.
"""

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.chat_format import framed
from storage.documents import Scan
from storage.errors import NotLoadable
from storage.files import open_regular, opened_below
from storage.machine import usable_cores
from storage.records import Piece
from storage.tokenizer import Tokenizer
from storage.unfinished import Unfinished

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, how much it is
Ids = npt.NDArray[np.uint32]

BATCH_CHARACTERS = 2**20  # per task of a thread
SAVED_SECONDS = 2.0  # of work, after which it survives a kill
FILES = ("train.bin", "val.bin", "train.mask.bin", "val.mask.bin")
LEARNED, BEGINS = 1, 2  # in a mask: a model learns to say this token; a document begins with it
MASK = np.dtype("u1")
CHECK_IDS = 2**24  # ids looked at at once
MANY_DOCUMENTS = 10  # different ones; fewer are split as one text
LARGE_BYTES = 100_000_000  # of text; of more, 1 % is enough to validate on


@dataclass(frozen=True)
class Splits:
    """The two token arrays of a dataset for one tokenizer, and their masks if not all is learned."""

    train: np.memmap  # uint16 or uint32
    val: np.memmap
    bytes_per_token: float  # UTF-8 bytes of val's text per token of val; of what is learned of it
    tokenizer: Tokenizer
    name: str  # of the dataset, for messages
    train_mask: np.memmap | None = None  # uint8
    val_mask: np.memmap | None = None

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
    with opened_below(data, parts) as f:
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


def bytes_per_token(tokens: npt.NDArray[Any], tokenizer: Tokenizer, mask: npt.NDArray[Any] | None = None) -> float:
    """Return the UTF-8 bytes of the learned text per learned token; special tokens count as tokens without text."""
    special = set(tokenizer.special_tokens.values())
    lengths = [0 if i in special else len(tokenizer.token_bytes(i)) for i in range(tokenizer.n_vocab)]
    table, total, count = np.array(lengths, dtype=np.int64), 0, 0
    for i in range(0, len(tokens), CHECK_IDS):
        ids = tokens[i : i + CHECK_IDS]
        ids = ids if mask is None else ids[mask[i : i + CHECK_IDS] & LEARNED > 0]
        total, count = total + int(table[ids].sum()), count + len(ids)
    return max(total, 1) / count


def count_learned(mask: np.memmap) -> int:
    """Return how many tokens are learned."""
    return sum(int((mask[i : i + CHECK_IDS] & LEARNED).sum()) for i in range(0, len(mask), CHECK_IDS))


# ---- splitting

Labelled = tuple[int, Piece]  # 0 (train) or 1 (val), and what belongs there


def split_by_place(stream: Iterator[Piece], val_from: int) -> Iterator[Labelled]:
    """Label pieces of text: val is what follows the first `val_from` characters."""
    at = 0
    for piece in stream:
        room = max(0, val_from - at)
        at += len(piece.text)
        if 0 < room < len(piece.text):
            yield 0, piece._replace(text=piece.text[:room], ends=False)
            yield 1, piece._replace(text=piece.text[room:], begins=False)
        else:
            yield (0 if room > 0 else 1), piece


def split_by_document(stream: Iterator[Piece], is_val: Callable[[int], bool]) -> Iterator[Labelled]:
    """Label the pieces of each document by its number."""
    document = 0
    for piece in stream:
        yield int(is_val(document)), piece
        document += piece.ends


def split(stream: Iterator[Piece], found: Scan, val_from: int | None = None) -> Iterator[Labelled]:
    """Label pieces of documents with 0 (train) or 1 (val), the same way each time.

    `val_from` is the number of the first document that is meant for val, None if the dataset has none.
    Many documents: every tenth (hundredth, of much text) by the order of their hashes, so that copies of one
    document are on the same side. Few documents, or one: the last tenth of the characters, as in nanoGPT, unless
    they are examples with a part to learn, which stay whole.
    """
    if val_from is not None:
        return split_by_document(stream, lambda document: document >= val_from)
    distinct = sorted(set(found.hashes))
    if len(distinct) < MANY_DOCUMENTS and not found.masked:
        return split_by_place(stream, int(found.characters * 0.9))
    share = 100 if found.bytes > LARGE_BYTES else 10
    largest = distinct[-(-len(distinct) // share) - 1]

    def is_val(document: int) -> bool:
        if document >= len(found.hashes):
            raise NotLoadable("the text changed while it was read; try again")
        return found.hashes[document] <= largest

    return split_by_document(stream, is_val)


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


def _batches(stream: Iterator[Labelled]) -> Iterator[list[Labelled]]:
    batch: list[Labelled] = []
    size = 0
    for labelled in stream:
        batch.append(labelled)
        size += len(labelled[1].text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _with_mask(tokenizer: Tokenizer, piece: Piece, between: Ids) -> tuple[Ids, npt.NDArray[np.uint8]]:
    """Return the ids of a piece and their mask; that a document ends is learned with what it ends with."""
    ids = tokenizer.encode_array(piece.text)
    learned = np.full(len(ids), piece.learned)
    if piece.role is not None:
        ids, learned = framed(tokenizer, piece.role, ids, piece.learned)
    if piece.ends:
        says_so = piece.learned and piece.role is None  # a message has said it already
        ids, learned = np.concatenate((ids, between)), np.concatenate((learned, np.full(len(between), says_so)))
    mask = learned * MASK.type(LEARNED)
    mask[:1] |= BEGINS * piece.begins
    return ids, mask


@dataclass(frozen=True)
class _Encoder:
    """Turns batches of labelled pieces into what is appended to the files of each side."""

    tokenizer: Tokenizer
    between: Ids
    masked: bool

    def __call__(self, batch: list[Labelled]) -> tuple[list[bytes], int]:
        """Return the bytes for train.bin, val.bin and, if masked, their masks, and the characters of the batch."""
        ids: tuple[list[Ids], list[Ids]] = ([self.between[:0]], [self.between[:0]])
        masks: tuple[list[bytes], list[bytes]] = ([], [])
        for side, piece in batch:
            if self.masked:
                found, mask = _with_mask(self.tokenizer, piece, self.between)
                ids[side].append(found)
                masks[side].append(mask.tobytes())
            else:
                ids[side].append(self.tokenizer.encode_array(piece.text))
                ids[side].append(self.between if piece.ends else self.between[:0])
        dtype = token_type(self.tokenizer.n_vocab)
        data = [np.concatenate(side).astype(dtype).tobytes() for side in ids]
        return data + [b"".join(side) for side in masks if self.masked], sum(len(piece.text) for _, piece in batch)


def _in_order(encode: _Encoder, batches: Iterator[list[Labelled]], threads: int) -> Iterator[tuple[list[bytes], int]]:
    """Encode batches in `threads` threads (tiktoken leaves Python to the others); give them in their order."""
    running: deque[Future[tuple[list[bytes], int]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in batches:
                running.append(pool.submit(encode, batch))
                if len(running) > 2 * threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def write_tokens(
    unfinished: Unfinished, stream: Iterator[Labelled], found: Scan, tokenizer: Tokenizer, progress: Progress
) -> None:
    """Write the documents that `split` labelled into token files, synced to the disk, from where they stand on."""
    encode, done = _Encoder(tokenizer, separator(tokenizer, found.documents), found.masked), 0
    with unfinished.files(FILES[: 4 if found.masked else 2]) as files:
        batches, number, saved = _batches(stream), unfinished.batches, time.monotonic()
        for batch in itertools.islice(batches, number):
            done += sum(len(piece.text) for _, piece in batch)
            progress("finding the place where it stopped", done, found.characters)
        for data, characters in _in_order(encode, batches, usable_cores()):
            for f, part in zip(files, data, strict=True):
                f.write(part)
            done, number = done + characters, number + 1
            if time.monotonic() - saved >= SAVED_SECONDS:
                unfinished.done(files, number)
                saved = time.monotonic()
            progress("tokenizing", done, found.characters)
        unfinished.done(files, number)
