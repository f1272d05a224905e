"""The token files that we made of a dataset's text: data/<name>/tokens/<fingerprint>/, one folder per tokenizer.

A folder holds train.bin, val.bin, their masks if not all is learned, tokenizer.json and meta.json, which says of
which version of which text files they are. It is written beside its place and renamed, so it is whole or not there;
a killed preparation leaves an unfinished one (unfinished.py), which the next one goes on with. Who may write is the
caller's matter: one process at a time. nanoGPT's files that came from elsewhere are not here.
"""

import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.chat_format import is_chat
from storage.documents import (
    Scan,
    Source,
    format_of,
    pieces,
    reported,
    require_two_examples,
    scan,
    validation_start,
)
from storage.errors import NoSpace, NotFound, NotLoadable, StorageError
from storage.files import (
    NAME,
    look_up,
    opened_below,
    parse_json,
    reading,
    require_space,
    sweep_temporary,
    sync_folder,
    temporary_beside,
    write_json,
)
from storage.records import FORMATS
from storage.token_files import (
    FILES,
    MASK,
    Progress,
    Splits,
    bytes_per_token,
    count_learned,
    open_tokens,
    split,
    token_type,
    write_tokens,
)
from storage.tokenizer import Tokenizer
from storage.unfinished import Unfinished, saved

SPLITS = ("train", "val")
META_BYTES = 2**24
UNFINISHED = ".unfinished-"  # and the fingerprint: no NAME begins with a dot
EXPECTED_TOKENS_PER_BYTE = 0.4  # of byte pairs: English has 0.25, Python sources 0.35


@dataclass(frozen=True)
class TokenCache:
    """The folder tokens/ of one dataset."""

    data: Path
    dataset: str

    @property
    def folder(self) -> Path:
        """Return data/<name>/tokens."""
        return self.data / self.dataset / "tokens"

    def _meta(self, fingerprint: str) -> dict[str, Any]:
        parts = [self.dataset, "tokens", fingerprint, "meta.json"]
        with opened_below(self.data, parts) as f:
            meta = parse_json(f.read(META_BYTES), "/".join(["data", *parts]))
        kinds = {"tokenizer": str, "train_tokens": int, "val_tokens": int, "bytes_per_token": float, "sources": list}
        if not isinstance(meta, dict) or not all(isinstance(meta.get(key), kind) for key, kind in kinds.items()):
            raise NotLoadable(f"{'/'.join(['data', *parts])} is not what was written there")
        return {"format": "text", "masked": False} | meta

    def _metas(self) -> list[dict[str, Any]]:
        """Return what meta.json says in each folder that is whole."""
        try:
            look_up(self.data, [self.dataset, "tokens"])
        except NotFound:
            return []
        with reading(f"{self.dataset}/tokens"):
            names = os.listdir(self.folder)
        return [self._meta(name) for name in sorted(filter(NAME.fullmatch, names))]

    def counts(self) -> dict[str, int]:
        """Return the number of tokens by tokenizer name."""
        return {meta["tokenizer"]: meta["train_tokens"] + meta["val_tokens"] for meta in self._metas()}

    def format(self) -> str:
        """Return the format of the text that the tokens were made of; "text" without any."""
        return str(max(["text", *(meta["format"] for meta in self._metas())], key=FORMATS.index))

    def open(self, tokenizer: Tokenizer) -> Splits:
        """Return the tokens for this tokenizer; raises NotFound without them, NotLoadable for damaged ones."""
        parts = [self.dataset, "tokens", tokenizer.fingerprint]
        meta, dtype = self._meta(tokenizer.fingerprint), token_type(tokenizer.n_vocab)
        kinds = (dtype, dtype, MASK, MASK)[: 4 if meta["masked"] else 2]
        found = [open_tokens(self.data, [*parts, name], kind) for name, kind in zip(FILES, kinds, strict=False)]
        if [len(array) for array in found] != [meta["train_tokens"], meta["val_tokens"]] * (len(found) // 2):
            raise NotLoadable(f"dataset {self.dataset}: its token files do not have the size they were written with")
        return Splits(found[0], found[1], meta["bytes_per_token"], tokenizer, self.dataset, *found[2:])

    def is_current(self, tokenizer: Tokenizer, files: Sequence[Source]) -> bool:
        """Say whether there are whole token files of exactly these versions of the text files."""
        try:
            self.open(tokenizer)
            meta = self._meta(tokenizer.fingerprint)
            same = meta["sources"] == [source.describe() for source in files]
            return same and bool(meta["format"] == format_of(self.data / self.dataset, files))
        except StorageError:
            return False

    def build(self, files: Sequence[Source], tokenizer: Tokenizer, progress: Progress) -> None:
        """Tokenize the text files; replaces what was there for this tokenizer.

        Killed or stopped, it leaves what it has done, and the next call goes on from there; a failure leaves nothing.
        """
        form = format_of(self.data / self.dataset, files)
        if form == "chat" and not is_chat(tokenizer):
            raise NotLoadable(
                f"dataset {self.dataset} is chat, and the tokenizer {tokenizer.name} has no tokens for it"
            )
        self.folder.mkdir(exist_ok=True)
        sweep_temporary(self.folder)
        made_of = {"sources": [source.describe() for source in files], "format": form}
        self._sweep_unfinished(made_of)
        unfinished = Unfinished(self.folder / f"{UNFINISHED}{tokenizer.fingerprint}", made_of)
        try:
            meta = self._write(unfinished, files, tokenizer, progress)
            tokenizer.save(unfinished.folder / "tokenizer.json")
            write_json(unfinished.folder / "meta.json", meta | made_of)
            unfinished.finish()
            self._put_in_place(unfinished.folder, self.folder / tokenizer.fingerprint)
        except OSError as e:
            unfinished.discard()
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"the disk is full: the tokens of dataset {self.dataset} could not be written") from e
            raise
        except Exception:
            unfinished.discard()
            raise

    def _sweep_unfinished(self, made_of: dict[str, Any]) -> None:
        """Remove unfinished tokens of other versions of the text, which nobody can go on with."""
        for folder in self.folder.glob(f"{UNFINISHED}*"):
            if saved(folder, made_of) is None:
                shutil.rmtree(folder, ignore_errors=True)

    def _write(
        self, unfinished: Unfinished, files: Sequence[Source], tokenizer: Tokenizer, progress: Progress
    ) -> dict[str, Any]:
        source, dtype, folder = self.data / self.dataset, token_type(tokenizer.n_vocab), unfinished.folder
        found = unfinished.scan(lambda: scan(reported(pieces(source, files), files, progress)))
        expected = found.characters if tokenizer.kind == "char" else int(found.bytes * EXPECTED_TOKENS_PER_BYTE)
        require_space(folder, expected * (dtype.itemsize + found.masked * MASK.itemsize) - unfinished.written)
        val_from = validation_start(source, files)
        if val_from is None:
            require_two_examples(self.dataset, found)
        labelled = split(pieces(source, files), found, val_from)
        write_tokens(unfinished, labelled, found, tokenizer, progress)
        return {
            "tokenizer": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "dtype": dtype.name,
            "masked": found.masked,
            **self._sizes(folder, found, dtype, tokenizer),
            "documents": found.documents,
            "characters": found.characters,
        }

    def _sizes(self, folder: Path, found: Scan, dtype: np.dtype, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return what meta.json says of new token files; raises NotLoadable unless there is something on each side."""
        sizes = {f"{name}_tokens": (folder / f"{name}.bin").stat().st_size // dtype.itemsize for name in SPLITS}
        learned = dict(sizes)
        if found.masked and all(sizes.values()):
            learned = {
                f"{name}_tokens": count_learned(open_tokens(folder, [f"{name}.mask.bin"], MASK)) for name in SPLITS
            }
        for name, count in learned.items():
            if count == 0:
                side = name.removesuffix("_tokens")
                what = f"{found.documents} examples" if found.masked else f"{found.characters} characters"
                raise NotLoadable(f"dataset {self.dataset}: its {what} leave {side} without a token to learn")
        val = open_tokens(folder, ["val.bin"], dtype)
        mask = open_tokens(folder, ["val.mask.bin"], MASK) if found.masked else None
        return sizes | {"bytes_per_token": bytes_per_token(val, tokenizer, mask)}

    def _put_in_place(self, folder: Path, target: Path) -> None:
        """Let a whole folder take the place of `target`."""
        old = temporary_beside(target)
        sync_folder(folder)
        if target.exists():
            os.rename(target, old)  # maps of its files stay valid in the processes that have them
        os.rename(folder, target)
        sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)
