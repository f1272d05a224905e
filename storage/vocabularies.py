"""The two kinds of tokenizer, and what they have in common: byte-level BPE and single characters.

Here is how text becomes token ids and back, once the vocabulary is known. Where a vocabulary comes from
(files, training, GPT-2's own) is in tokenizer.py, and whether a tokenizer.json may be believed in
tokenizer_json.py. No torch; BPE runs on tiktoken, whatever trained it.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import tiktoken

from storage.files import replace_file, write_all
from storage.machine import usable_cores
from storage.stream_decoder import StreamDecoder

EOT = "<|endoftext|>"
# GPT-2's pattern, with what needs no look-ahead in one group that comes first: the same cuts, found a third faster,
# because the engine runs such a group as an automaton of its own.
PATTERN = r"(?: ?\p{L}+|'(?:[sdmt]|ll|ve|re)| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s+"
GPT2_FINGERPRINT = "d6b610e5cf0de677"
UNKNOWN = "\ufffd".encode()  # the text of an id beyond the vocabulary: a model may have padded rows
SPACE_BLOCK = 450_000
Kind = Literal["gpt2", "bpe", "char"]


class UnknownCharacter(ValueError):
    """A text has a character that a character vocabulary lacks."""


class Tokenizer(Protocol):
    """Turns text into token ids and back."""

    @property
    def kind(self) -> Kind:
        """Return "gpt2", "bpe" or "char"."""

    @property
    def name(self) -> str:
        """Return "gpt2", "bpe:1024" (with the vocabulary's size) or "char"."""

    @property
    def n_vocab(self) -> int:
        """Return the number of ids: they are 0 to n_vocab - 1."""

    @property
    def longest_token(self) -> int:
        """Return the bytes of the longest token: a text of more than N times that is more than N tokens."""

    @property
    def special_tokens(self) -> dict[str, int]:
        """Return the ids that no plain text gives, by their names."""

    @property
    def eot(self) -> int | None:
        """Return the id of <|endoftext|>, None without one."""

    @property
    def fingerprint(self) -> str:
        """Return 16 hex digits that two tokenizers share only if they give the same ids."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text: special tokens in it are text. Raises UnknownCharacter (characters)."""

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Return the ids of each text, computed in parallel."""

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        """Return `encode(text)` as an array, without the cost of a list."""

    def encode_with_special(self, text: str) -> list[int]:
        """Return the ids of text in which special tokens such as <|endoftext|> are themselves."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; what is not UTF-8, and ids beyond the vocabulary, become U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one id, which need not be whole characters."""

    def stream_decoder(self) -> StreamDecoder:
        """Return a new decoder for ids that come one by one."""

    def with_special(self, names: Sequence[str]) -> "Tokenizer":
        """Return this tokenizer with more special tokens, behind its own ids; those it has stay as they are."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of a tokenizer.json, which Hugging Face's libraries load with the same ids."""

    def save(self, path: Path) -> None:
        """Write the tokenizer.json."""


class _Vocabulary(ABC):
    """What both kinds share: ids to bytes, and who they are."""

    _family: str

    def __init__(self, tokens: Mapping[int, bytes], special_tokens: Mapping[str, int]) -> None:
        self.special_tokens = dict(special_tokens)
        self.n_vocab = len(tokens) + len(special_tokens)
        self.eot = self.special_tokens.get(EOT)
        named = {token_id: name.encode() for name, token_id in special_tokens.items()}
        self._bytes = [named[i] if i in named else tokens[i] for i in range(self.n_vocab)]
        self.longest_token = max(map(len, self._bytes))

    @cached_property
    def fingerprint(self) -> str:
        """Return 16 hex digits that two tokenizers share only if they give the same ids."""
        content = [self._family, [token.hex() for token in self._bytes], self.special_tokens]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one id, which need not be whole characters."""
        return self._bytes[token_id] if 0 <= token_id < self.n_vocab else UNKNOWN

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; what is not UTF-8, and ids beyond the vocabulary, become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def stream_decoder(self) -> StreamDecoder:
        """Return a new decoder for ids that come one by one."""
        return StreamDecoder(self.token_bytes)

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the content of a tokenizer.json, which Hugging Face's libraries load with the same ids."""

    def save(self, path: Path) -> None:
        """Write the tokenizer.json."""
        data = json.dumps(self.to_json()).encode()
        replace_file(path, lambda f: write_all(f, data))

    def _more_special(self, names: Sequence[str]) -> dict[str, int]:
        new = [name for name in names if name not in self.special_tokens]
        return self.special_tokens | {name: self.n_vocab + i for i, name in enumerate(new)}

    def _tokenizer_json(self, steps: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        by_id = sorted(self.special_tokens.items(), key=lambda item: item[1])
        added = [{"id": token_id, "content": name, **flags} for name, token_id in by_id]
        top = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
        return {**top, **steps, "model": model}


# ---- byte-level BPE


def byte_alphabet() -> str:
    """Return the 256 characters with which vocabulary files write the bytes 0 to 255.

    Bytes that Latin-1 shows as a visible character are written as that character, the others, in order, as
    the characters from U+0100 on. GPT-2 chose this so that no entry has a space or a control character.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return "".join(chr(byte) if byte in visible else chr(next(others)) for byte in range(256))


def _parts(text: str) -> list[str]:
    """Return the text in parts without a run of 1,000,000 spaces, on which tiktoken's pattern engine gives up.

    A run that long has an aligned block of SPACE_BLOCK in it; the text is cut after each such block.
    """
    cuts = [
        at + SPACE_BLOCK
        for at in range(0, len(text) - SPACE_BLOCK, SPACE_BLOCK)
        if text[at : at + SPACE_BLOCK].isspace()
    ]
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


class BytePairTokenizer(_Vocabulary):
    """Byte-level BPE with GPT-2's pattern: GPT-2's own vocabulary, or a trained one.

    `ranks` gives the id of each token's bytes; all 256 bytes are tokens, and ids rise with the merges' order.
    `merges` are the pairs, in order, in the alphabet of `byte_alphabet`; they are kept for tokenizer.json.
    """

    _family = "bytes"

    def __init__(self, ranks: Mapping[bytes, int], merges: Sequence[str], special_tokens: Mapping[str, int]) -> None:
        super().__init__({token_id: token for token, token_id in ranks.items()}, special_tokens)
        self._merges = tuple(merges)
        self._ranks = dict(ranks)
        self._encoding = tiktoken.Encoding(
            "bpe", pat_str=PATTERN, mergeable_ranks=self._ranks, special_tokens=self.special_tokens
        )

    @cached_property
    def kind(self) -> Kind:
        """Return "gpt2" for GPT-2's own vocabulary, wherever it came from, else "bpe"."""
        return "gpt2" if self.fingerprint == GPT2_FINGERPRINT else "bpe"

    @property
    def name(self) -> str:
        """Return "gpt2", or "bpe:" and the vocabulary's size."""
        return "gpt2" if self.kind == "gpt2" else f"bpe:{self.n_vocab}"

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text: special tokens in it are text, lone surrogates become U+FFFD."""
        if len(text) <= SPACE_BLOCK:
            return self._encoding.encode_ordinary(text)
        return [token_id for part in _parts(text) for token_id in self._encoding.encode_ordinary(part)]

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Return the ids of each text, computed in parallel."""
        with ThreadPoolExecutor(threads or usable_cores()) as pool:
            return list(pool.map(self.encode, texts))

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        """Return `encode(text)` as an array, without the cost of a list; other threads run meanwhile."""
        parts = [self._encoding.encode_to_numpy(part, disallowed_special=()) for part in _parts(text)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def encode_with_special(self, text: str) -> list[int]:
        """Return the ids of text in which special tokens such as <|endoftext|> are themselves."""
        return [i for part in _parts(text) for i in self._encoding.encode(part, allowed_special="all")]

    def with_special(self, names: Sequence[str]) -> "BytePairTokenizer":
        """Return this tokenizer with more special tokens, behind its own ids; those it has stay as they are."""
        return BytePairTokenizer(self._ranks, self._merges, self._more_special(names))

    def to_json(self) -> dict[str, Any]:
        """Return the content of a tokenizer.json, which Hugging Face's libraries load with the same ids."""
        alphabet = byte_alphabet()
        by_id = sorted(self._ranks.items(), key=lambda item: item[1])
        vocab = {"".join(alphabet[byte] for byte in token): token_id for token, token_id in by_id}
        step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
        model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
        model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
        return self._tokenizer_json(
            {"pre_tokenizer": step, "post_processor": step, "decoder": step},
            model | {"vocab": vocab | self.special_tokens, "merges": list(self._merges)},
        )


# ---- characters


class CharTokenizer(_Vocabulary):
    """One token per character (code point), as in nanoGPT's shakespeare_char."""

    _family = "characters"
    kind: Kind = "char"
    name = "char"

    def __init__(self, characters: Mapping[str, int], special_tokens: Mapping[str, int] | None = None) -> None:
        super().__init__({i: character.encode() for character, i in characters.items()}, special_tokens or {})
        self._ids = dict(characters)

    @cached_property
    def _table(self) -> npt.NDArray[np.int32]:  # code point -> id, -1 for those that have none
        table = np.full(0x110000, -1, dtype=np.int32)
        table[[ord(character) for character in self._ids]] = list(self._ids.values())
        return table

    def _unknown(self, text: str) -> UnknownCharacter:
        offset, character = next((i, c) for i, c in enumerate(text) if c not in self._ids)
        shown = character if character.isprintable() else ascii(character)[1:-1]
        return UnknownCharacter(
            f"the character '{shown}' (U+{ord(character):04X}) at offset {offset} "
            f"is not among the {len(self._ids)} characters of this vocabulary"
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text; raises UnknownCharacter naming the first one that has none."""
        try:
            return [self._ids[character] for character in text]
        except KeyError:
            raise self._unknown(text) from None

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Return the ids of each text; one look-up per character needs no threads."""
        return [self.encode(text) for text in texts]

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        """Return `encode(text)` as an array, without the cost of a list."""
        ids = self._table[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")]
        if ids.size and ids.min() < 0:
            raise self._unknown(text)
        return np.asarray(ids, dtype=np.uint32)

    def encode_with_special(self, text: str) -> list[int]:
        """Return the ids of text in which special tokens such as <|endoftext|> are themselves."""
        if not self.special_tokens:
            return self.encode(text)
        pieces = re.split(f"({'|'.join(map(re.escape, self.special_tokens))})", text)
        special = self.special_tokens
        return [i for piece in pieces for i in ([special[piece]] if piece in special else self.encode(piece))]

    def with_special(self, names: Sequence[str]) -> "CharTokenizer":
        """Return this tokenizer with more special tokens, behind its own ids; those it has stay as they are."""
        return CharTokenizer(self._ids, self._more_special(names))

    def to_json(self) -> dict[str, Any]:
        """Return the content of a tokenizer.json, which Hugging Face's libraries load with the same ids."""
        split = {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}
        vocab = dict(sorted(self._ids.items(), key=lambda item: item[1])) | self.special_tokens
        return self._tokenizer_json(
            {"pre_tokenizer": split, "post_processor": None, "decoder": {"type": "Fuse"}},
            {
                "type": "WordLevel",
                "vocab": vocab,
                "unk_token": "<unk>",
            },  # no <unk> in it: unknown is an error there too
        )
