"""Datasets: the folders data/<name>/, from raw text or nanoGPT's files to tokens a model can train on.

    data/<name>/prepare.py                    gets the text (or the tokens) when there is none yet
    data/<name>/*.txt, *.jsonl                raw text, tokenized for whatever model trains on it
    data/<name>/train.bin, val.bin, meta.*    nanoGPT's: tokens of one tokenizer, characters or GPT-2's
    data/<name>/tokens/<fingerprint>/         our tokens of the raw text, one folder per tokenizer

Names come from clients, so files are opened by name, without following links. How text is read is in
documents.py, how it becomes tokens in token_files.py and token_cache.py, how it comes by HTTP in uploads.py.
"""

import contextlib
import fcntl
import itertools
import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from storage import tokenizer as tokenizers
from storage.documents import (
    Source,
    count_documents,
    format_of,
    pieces,
    reported,
    require_two_examples,
    scan,
    sources,
    validation_start,
)
from storage.errors import NotFound, NotLoadable, StorageError
from storage.files import NAME, check_name, disk_errors_explained, look_up, quoted
from storage.runs import Workspace
from storage.token_cache import TokenCache
from storage.token_files import (
    Progress,
    Splits,
    bytes_per_token,
    check_ids,
    count_tokens,
    open_tokens,
    token_type,
)
from storage.tokenizer import Tokenizer, UnknownCharacter

__all__ = [
    "ALIASES",
    "Dataset",
    "Progress",
    "Splits",
    "dataset",
    "datasets",
]

ALIASES = {"shakesphere": "shakespeare"}  # a spelling in use since the first published example
NANOGPT = token_type(2**16)  # uint16, whatever the vocabulary
NANOGPT_FILES = ("train.bin", "val.bin")
GPT2_VOCAB = 50257
READ_AT_ONCE = 2**20  # bytes of text that are read before a job is made
CHECKED_AT_ONCE = 64 * 2**20  # bytes of a token file whose ids are looked at before a job is made


def ignore(what: str, done: int, total: int) -> None:
    """Report nothing: the progress of callers that show none."""


def _without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without keys and tokens: a script of a dataset has no use for them."""
    return {name: value for name, value in environment.items() if not name.endswith(("TOKEN", "KEY", "SECRET"))}


class Dataset:
    """One folder of data/."""

    def __init__(self, workspace: Workspace, name: str) -> None:
        self.workspace = workspace
        self.name = name
        self.folder = workspace.data / name
        self._cache = TokenCache(workspace.data, name)

    def _has(self, name: str) -> bool:
        """Say whether the folder has an entry of this name; a link is refused at once."""
        try:
            look_up(self.workspace.data, [self.name, name])
        except NotFound:
            return False
        return True

    def _is_script(self) -> bool:
        try:
            return stat.S_ISREG(look_up(self.workspace.data, [self.name, "prepare.py"]).st_mode)
        except StorageError:
            return False

    def has_tokens(self) -> bool:
        """Say whether the folder has nanoGPT's token files, made elsewhere."""
        return any(map(self._has, NANOGPT_FILES))

    def sources(self) -> list[Source]:
        """Return the text files, sorted by name; raises NotLoadable for links and special files."""
        return sources(self.folder)

    def format(self) -> str:
        """Return "text", "prompt_completion" or "chat": what its text is, or was, if only its tokens are left."""
        files = self.sources()
        return format_of(self.folder, files) if files else self._cache.format()

    def refuse(self, why: str) -> NotLoadable:
        """Return a refusal of this dataset, for the caller to raise."""
        return NotLoadable(f"dataset {self.name} {why}")

    def _nothing(self) -> NotFound:
        return NotFound(f"dataset {self.name} has no .txt or .jsonl file, no train.bin and no prepare.py")

    def describe(self) -> dict[str, Any]:
        """Return what GET /api/datasets says of it.

        `documents` is null where counting would take long; `format` is "text", "prompt_completion" or "chat" (of
        the last two only completions and what the assistant says are learned); `source` is "text", "nanoGPT" or,
        while there is nothing yet, "script"; `error` says what is wrong with its files, or is null.
        """
        found: dict[str, Any] = {"name": self.name, "bytes": 0, "documents": None, "tokens": {}, "error": None}
        found |= {"source": "text", "format": "text"}
        try:
            files = self.sources()
            found["bytes"] = sum(source.size for source in files)
            found["documents"] = count_documents(self.folder, files) if files else None
            found |= {"tokens": self._cache.counts(), "format": self.format()}
            kind = self.natural_kind()
            if kind is not None:
                count = sum(self._counts().values())
                found |= {"source": "nanoGPT", "bytes": found["bytes"] or count * NANOGPT.itemsize}
                found["tokens"][kind] = count
            elif not files and self._is_script():
                found["source"] = "script"
        except StorageError as e:
            found["error"] = str(e)
        return found | {"prepared": bool(found["tokens"])}

    # ---- token files made elsewhere

    def _counts(self) -> dict[str, int]:
        """Return the tokens in nanoGPT's files; raises NotFound or NotLoadable for missing, odd or empty ones."""
        for name in NANOGPT_FILES:
            if not self._has(name):
                raise NotFound(f"dataset {self.name} has token files, but no {name}")
        return {name: count_tokens(self.workspace.data, [self.name, name], NANOGPT) for name in NANOGPT_FILES}

    def _meta(self) -> Tokenizer | None:
        """Return the character tokenizer of meta.json or meta.pkl; None where nanoGPT means GPT-2's."""
        return tokenizers.from_meta(self.folder)

    def natural_kind(self) -> str | None:
        """Return "char" or "gpt2" for nanoGPT's files, None without them."""
        return None if not self.has_tokens() else "gpt2" if self._meta() is None else "char"

    def natural_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer of nanoGPT's files: by meta.json or meta.pkl, else GPT-2's. None for raw text."""
        return None if not self.has_tokens() else self._meta() or tokenizers.gpt2(self.workspace)

    def _is_natural(self, tokenizer: Tokenizer) -> bool:
        """Say whether nanoGPT's files are of this tokenizer, without looking for GPT-2's on the machine."""
        kind, meta = self.natural_kind(), self._meta()
        return tokenizer.kind == kind and (meta is None or meta.fingerprint == tokenizer.fingerprint)

    def _open_checked(self, name: str, n_vocab: int, progress: Progress) -> Any:
        ids = open_tokens(self.workspace.data, [self.name, name], NANOGPT)
        check_ids(ids, n_vocab, f"data/{self.name}/{name}", progress)
        return ids

    def _open_natural(self, tokenizer: Tokenizer, progress: Progress) -> Splits:
        self._counts()  # says of a missing file that it is missing, before a large one is checked
        train, val = (self._open_checked(name, tokenizer.n_vocab, progress) for name in NANOGPT_FILES)
        return Splits(train, val, bytes_per_token(val, tokenizer), tokenizer, self.name)

    # ---- before a job is made

    def check(self, tokenizer_name: str, block_size: int | None = None) -> None:
        """Raise NotFound or NotLoadable for what is already known to prevent a training.

        `tokenizer_name` is a Tokenizer's name or a word of `tokenizer_for`. Quick: nothing is fetched or made.
        """
        files = self.sources()
        if self.has_tokens():
            self._check_tokens(tokenizer_name, block_size, has_text=bool(files))
        elif files:
            size = sum(source.size for source in files)
            if block_size is not None and size <= block_size and self.format() == "text":
                less = f"has {size} bytes of text, too little for a window of {block_size} tokens"
                raise self.refuse(f"{less}; lower block_size or window, or add text")
            if size <= READ_AT_ONCE and validation_start(self.folder, files) is None:
                require_two_examples(self.name, scan(pieces(self.folder, files)))
        elif not self._is_script() and not self._has("tokens"):
            raise self._nothing()

    def _check_tokens(self, tokenizer_name: str, block_size: int | None, has_text: bool) -> None:
        counts, meta = self._counts(), self._meta()
        if tokenizer_name not in ("auto", "gpt2" if meta is None else "char"):
            if not has_text:
                raise self._mismatch(tokenizer_name, meta)
            return
        for name, count in counts.items():
            if block_size is not None and count <= block_size:
                raise self.refuse(f"has {count} tokens in {name}; block_size {block_size} needs {block_size + 1}")
            if count * NANOGPT.itemsize <= CHECKED_AT_ONCE:
                self._open_checked(name, GPT2_VOCAB if meta is None else meta.n_vocab, ignore)

    def _mismatch(self, tokenizer_name: str, natural: Tokenizer | None) -> NotLoadable:
        has = "GPT-2's tokens" if natural is None else f"tokens of {natural.n_vocab} characters"
        return self.refuse(
            f"holds only {has} and no text, and the model's tokenizer is {tokenizer_name}: take a dataset with "
            "raw text, or a model with this dataset's tokenizer"
        )

    # ---- from nothing to text, from text to tokens

    @contextlib.contextmanager
    def _locked(self, progress: Progress) -> Iterator[None]:
        """Let one process at a time fetch or tokenize; the lock goes with the process that holds it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with disk_errors_explained(f"data/{self.name}/.lock"):
            descriptor = os.open(self.folder / ".lock", flags, 0o644)
        with open(descriptor, "rb") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("waiting for another preparation of this dataset", 0, 0)
                fcntl.flock(f, fcntl.LOCK_EX)
            yield

    def collect(self, progress: Progress = ignore) -> None:
        """Run the folder's prepare.py if there is neither text nor tokens yet; its output goes where ours goes."""
        if self._is_collected():
            return
        if not self._is_script():
            raise self._nothing()
        with self._locked(progress):
            if not self._is_collected():
                self._run_script(progress)

    def is_known(self) -> bool:
        """Say whether there is text, or tokens that were made of it or came with the dataset."""
        return self._is_collected() or self._has("tokens")

    def _is_collected(self) -> bool:
        """Say whether there is text or tokens; one token file alone is what a stopped script left."""
        return bool(self.sources()) or (all if self._is_script() else any)(map(self._has, NANOGPT_FILES))

    def _run_script(self, progress: Progress) -> None:
        progress(f"running data/{self.name}/prepare.py", 0, 0)
        sys.stdout.flush()
        argv = [sys.executable, "-u", str(self.folder / "prepare.py")]
        env = {
            **_without_secrets(os.environ),
            "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        }
        code = subprocess.run(argv, stdin=subprocess.DEVNULL, env=env, check=False).returncode
        if code != 0:
            raise self.refuse(f"could not be fetched: its prepare.py ended with code {code}; the log says why")
        if not self._is_collected():
            raise self.refuse("has neither text nor tokens after its prepare.py")

    def prepare(self, tokenizer: Tokenizer, progress: Progress = ignore) -> Splits:
        """Return the train and val tokens for `tokenizer`, fetching and tokenizing what is not there yet.

        Tokens are kept per tokenizer and made again when the text has changed. Raises StorageError of any kind.
        """
        if not self.sources() and not self.has_tokens():
            with contextlib.suppress(NotFound):
                return self._cache.open(tokenizer)  # somebody removed the text to save space
        self.collect(progress)
        if self._is_natural(tokenizer):
            return self._open_natural(tokenizer, progress)
        if not self.sources():
            raise self._mismatch(tokenizer.name, self._meta())
        with self._locked(progress):
            files = self.sources()
            if not self._cache.is_current(tokenizer, files):
                try:
                    self._cache.build(files, tokenizer, progress)
                except UnknownCharacter as e:
                    raise self.refuse(f"does not fit the model's characters: {e}") from None
            return self._cache.open(tokenizer)

    def training_parts(self, limit_bytes: int | None = None, progress: Progress = ignore) -> Iterator[str]:
        """Give the text to make a vocabulary of, fetching it if it must; with a limit, parts from all over it.

        A line end stands between documents. Raises NotLoadable for a dataset that has only token files.
        """
        self.collect(progress)
        files = self.sources()
        if not files:
            raise self.refuse("has token files and no text to make a vocabulary of")
        size = sum(source.size for source in files)
        step = 1 if limit_bytes is None else max(1, -(-size // limit_bytes))
        between = ""
        for piece in itertools.islice(reported(pieces(self.folder, files), files, progress), 0, None, step):
            yield from (between, piece.text)
            between = "\n" if piece.ends else ""

    def training_text(self, limit_bytes: int | None = None, progress: Progress = ignore) -> str:
        """Return all of `training_parts` in one."""
        return "".join(self.training_parts(limit_bytes, progress))


# ---- the folder of datasets


def canonical(name: object) -> str:
    """Return a dataset's name as its folder is called; raises BadName."""
    checked = check_name("dataset", name)
    return ALIASES.get(checked, checked)


def dataset(workspace: Workspace, name: object) -> Dataset:
    """Return the dataset of this name; raises BadName, NotFound, or NotLoadable for a link or a file."""
    checked = canonical(name)
    try:
        found = look_up(workspace.data, [checked])
    except NotFound:
        known = ", ".join(d.name for d in datasets(workspace))
        upload = "nor any other; upload one: POST /api/datasets, or `python api_client.py upload FILE`"
        there = f"; there are: {known}" if known else f", {upload}"
        raise NotFound(f"there is no dataset {quoted(checked)}{there}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise NotLoadable(f"data/{checked} is not a folder")
    return Dataset(workspace, checked)


def datasets(workspace: Workspace) -> list[Dataset]:
    """Return all folders of data/ that have a name a client may give, sorted; links are left out."""
    try:
        with os.scandir(workspace.data) as entries:
            names = [e.name for e in entries if NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [Dataset(workspace, name) for name in sorted(names)]
