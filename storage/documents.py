"""The raw text of a dataset: its .txt and .jsonl files, read as a stream of documents.

A .txt file is one document; a .jsonl file has one per line, see records.py.
Text is UTF-8 (a BOM is dropped) and its lines end in LF; anything else is refused with the place of the fault.
Documents come in pieces, so that a file larger than the memory can be read. A piece ends where GPT-2's pattern
cuts anyway, so the tokens of the pieces are the tokens of the whole. A file val.txt or val.jsonl comes last and
is the text to validate on. No tokens here.
"""

import codecs
import contextlib
import hashlib
import itertools
import os
import stat
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from storage.errors import NotFound, NotLoadable
from storage.files import NAME, look_up, opened_below, reading
from storage.records import FORMATS, LineReader, Piece, parse_line

SUFFIXES = (".txt", ".jsonl")
VALIDATION = ("val.txt", "val.jsonl")
READ_BYTES = 2**20
MAX_LINE_BYTES = 64 * 2**20
MAX_PIECE = 4 * 2**20  # characters; only text without any space or line end is cut elsewhere than between words
COUNTED_BYTES = 32 * 2**20  # of files up to this size the lines are counted for a listing
NOT_UTF8 = (
    "not UTF-8 text at byte {}; if it has another encoding, upload it as a dataset with `encoding`, such as latin-1"
)
BINARY = {b"\x1f\x8b": "a gzip archive", b"PK\x03\x04": "a zip archive", b"PAR1": "a Parquet file"}


@dataclass(frozen=True)
class Source:
    """One file of raw text, as it was when it was looked at."""

    name: str
    size: int
    mtime_ns: int

    def describe(self) -> dict[str, Any]:
        """Return what identifies this version of the file, for meta.json."""
        return asdict(self)


def sources(folder: Path) -> list[Source]:
    """Return the text files in a folder, by name, VALIDATION last; raises NotLoadable for links, special files."""
    found = []
    with reading(folder.name):
        names = os.listdir(folder)
    for name in sorted(names, key=lambda name: (name in VALIDATION, name)):
        if not name.endswith(SUFFIXES) or not NAME.fullmatch(name):
            continue
        entry = look_up(folder, [name])
        if not stat.S_ISREG(entry.st_mode):
            raise NotLoadable(f"{folder.name}/{name} is not a regular file")
        if entry.st_size > 0:
            found.append(Source(name, entry.st_size, entry.st_mtime_ns))
    return found


# ---- the documents of a .jsonl file


def _lines(f: BinaryIO, name: str) -> Iterator[tuple[int, int, bytes]]:
    """Give number, place and bytes of each line that is not blank."""
    number, offset = 0, 0
    while line := f.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise NotLoadable(f"{name} line {number} is longer than {MAX_LINE_BYTES // 2**20} MiB")
        if line.strip():
            yield number, offset, line
        offset += len(line)


def _jsonl_pieces(f: BinaryIO, name: str) -> Iterator[Piece]:
    reader = LineReader()
    for number, offset, line in _lines(f, name):
        try:
            yield from reader.pieces(line)
        except UnicodeDecodeError as e:
            raise NotLoadable(f"{name} line {number} is {NOT_UTF8.format(offset + e.start)}") from None
        except ValueError as e:
            raise NotLoadable(f"{name} line {number} cannot be used: {str(e)[:200]}") from None


def format_of(folder: Path, files: Sequence[Source]) -> str:
    """Return the format of a folder's `files`, by their first lines: the last of FORMATS that one of them has.

    A first line that cannot be used counts as text here: whoever reads the file is told what is wrong.
    """
    found = {"text"}
    for source in files:
        if source.name.endswith(".jsonl"):
            with opened_below(folder, [source.name]) as f, contextlib.suppress(ValueError, NotLoadable):
                found.update(parse_line(line)[0] for _, _, line in itertools.islice(_lines(f, source.name), 1))
    return max(found, key=FORMATS.index)


# ---- the pieces of a .txt file


def _cut(text: str, earliest: int) -> int:
    """Return the last place, after `earliest`, where a space or line end follows a visible character; 0 if none.

    Every token of GPT-2's pattern that holds a visible character ends there at the latest, and none looks back.
    """
    for at in range(len(text) - 1, max(earliest, 0), -1):
        if text[at] in " \n" and not text[at - 1].isspace():
            return at
    return len(text) - 1 if len(text) >= MAX_PIECE else 0


def _decoded(f: BinaryIO, name: str) -> Iterator[str]:
    """Give the text of a file as it is read; raises NotLoadable at the first byte that is not UTF-8."""
    utf8, consumed = codecs.getincrementaldecoder("utf-8")(), 0
    while data := f.read(READ_BYTES):
        if consumed == 0 and (kind := next((BINARY[m] for m in BINARY if data.startswith(m)), None)) is not None:
            raise NotLoadable(f"{name} is {kind}, not text")
        yield _decode(utf8, data, consumed, name)
        consumed += len(data)
    yield _decode(utf8, b"", consumed, name)


def _decode(utf8: codecs.IncrementalDecoder, data: bytes, consumed: int, name: str) -> str:
    waiting = len(utf8.getstate()[0])  # bytes of a character that the last read cut in two
    try:
        text = utf8.decode(data, final=not data)
    except UnicodeDecodeError as e:
        raise NotLoadable(f"{name} is {NOT_UTF8.format(consumed - waiting + e.start)}") from None
    if b"\0" in data:
        raise NotLoadable(f"{name} is not text: it has a NUL byte at byte {consumed + data.index(0)}")
    return text


def _unix_lines(texts: Iterator[str]) -> Iterator[str]:
    """Give texts without a BOM at the beginning and with LF for CR LF, wherever they are cut."""
    bom, held = "\ufeff", ""
    for text in texts:
        held += text.removeprefix(bom)
        bom = "" if text else bom
        yield held.removesuffix("\r").replace("\r\n", "\n")
        held = "\r" if held.endswith("\r") else ""
    yield held


def _txt_pieces(f: BinaryIO, name: str) -> Iterator[Piece]:
    held, begins = "", True
    for text in _unix_lines(_decoded(f, name)):
        earliest = len(held) - 1  # what was there before has no place to cut
        held += text
        at = _cut(held, earliest) if text else 0
        if at > 0:
            yield Piece(held[:at], begins, False)
            held, begins = held[at:], False
    yield Piece(held, begins, True)


def pieces(folder: Path, files: Sequence[Source]) -> Iterator[Piece]:
    """Give the documents of a folder's `files` in order, in pieces."""
    for source in files:
        with opened_below(folder, [source.name]) as f:
            read = _jsonl_pieces if source.name.endswith(".jsonl") else _txt_pieces
            yield from read(f, source.name)


def reported(
    stream: Iterator[Piece], files: Sequence[Source], progress: Callable[[str, int, int], None]
) -> Iterator[Piece]:
    """Give pieces as they come, and report how much of the text of `files` has been read; roughly, of lines of JSON."""
    done, total = 0, sum(source.size for source in files)
    for piece in stream:
        done = min(done + len(piece.text), total)
        progress("reading the text", done, total)
        yield piece


# ---- all documents at a glance


@dataclass
class Scan:
    """What one reading of all documents tells."""

    hashes: "array[int]" = field(default_factory=lambda: array("Q"))  # one per document, of its content
    characters: int = 0
    bytes: int = 0  # of UTF-8
    longest_line: int = 0  # in characters
    masked: bool = False  # whether there is text that is only read, not learned

    @property
    def documents(self) -> int:
        """Return the number of documents."""
        return len(self.hashes)


def scan(stream: Iterator[Piece]) -> Scan:
    """Return hashes and sizes of the documents of `pieces`; reading them all is also what checks them."""
    result, digest = Scan(), hashlib.blake2b(digest_size=8)
    unfinished = 0  # characters of a line that goes on in the next piece
    for piece in stream:
        lengths = [len(line) for line in piece.text.split("\n")]
        lengths[0] += unfinished
        result.longest_line = max(result.longest_line, *lengths)
        unfinished = 0 if piece.ends else lengths[-1]
        data = piece.text.encode()
        if piece.role is not None or not piece.learned:
            digest.update(f"\0{piece.role}\0{piece.learned}\0".encode())
            result.masked = True
        digest.update(data)
        result.characters += len(piece.text)
        result.bytes += len(data)
        if piece.ends:
            result.hashes.append(int.from_bytes(digest.digest(), "little"))
            digest = hashlib.blake2b(digest_size=8)
    return result


def require_two_examples(dataset: str, found: Scan) -> None:
    """Raise NotLoadable for examples that are all one and the same: one is there to validate on, and none to learn."""
    if found.masked and len(set(found.hashes)) == 1:
        how_many = "has one example" if found.documents == 1 else f"has {found.documents} examples, all the same"
        raise NotLoadable(
            f"dataset {dataset} {how_many}: it takes at least two different ones, one of them to validate on"
        )


def validation_start(folder: Path, files: Sequence[Source]) -> int | None:
    """Return how many documents come before the files of VALIDATION, None if `sources` found none of these."""
    before = [file for file in files if file.name not in VALIDATION]
    return None if len(before) == len(files) else scan(pieces(folder, before)).documents


def count_documents(folder: Path, files: Sequence[Source]) -> int | None:
    """Return the number of documents, None when the files are too large to be read for a listing."""
    if sum(source.size for source in files if source.name.endswith(".jsonl")) > COUNTED_BYTES:
        return None
    count = 0
    for source in files:
        if source.name.endswith(".txt"):
            count += 1
            continue
        try:
            with opened_below(folder, [source.name]) as f:
                count += sum(1 for line in f if line.strip())
        except NotFound:
            continue
    return count
