"""Where tokenizers come from: files, training, and GPT-2's own, wherever this machine has it.

    load(path), from_folder(folder)   tokenizer.json; also vocab.json + merges.txt
    from_meta(folder)                 nanoGPT's meta.pkl, or meta.json: characters
    char_tokenizer(text), train_bpe(texts, vocab_size)
    gpt2(workspace)

What a tokenizer is and does is in vocabularies.py and stream_decoder.py, whose public names are here too.
No torch; the package `tokenizers` is used to train and for nothing else.
"""

import contextlib
import hashlib
import io
import os
import pickle
import pickletools
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from storage.errors import NotFound, StorageError, Unreachable
from storage.files import parse_json, read_bytes, read_json, replace_file, write_all
from storage.registry import PRETRAINED
from storage.runs import Workspace
from storage.stream_decoder import StopFinder, StreamDecoder
from storage.tokenizer_json import byte_pair, characters, from_json, refuse
from storage.vocabularies import (
    EOT,
    BytePairTokenizer,
    CharTokenizer,
    Tokenizer,
    UnknownCharacter,
)

__all__ = [
    "EOT",
    "StopFinder",
    "StreamDecoder",
    "Tokenizer",
    "UnknownCharacter",
    "char_tokenizer",
    "from_folder",
    "from_json",
    "from_meta",
    "from_meta_pkl",
    "from_vocab_merges",
    "gpt2",
    "gpt2_of_this_machine",
    "load",
    "train_bpe",
]

MAX_FILE_BYTES = 64 * 2**20
MAX_META_BYTES = 4 * 2**20
MAX_META_STEPS = 1_000_000

# ---- files


def load(path: Path, follow: bool = False) -> Tokenizer:
    """Return the tokenizer in a tokenizer.json; raises NotFound, or NotLoadable for what is not one of ours.

    A link is followed only if `follow`: the Hugging Face cache is made of links.
    """
    return from_json(parse_json(read_bytes(path, MAX_FILE_BYTES, follow), path.name))


def _byte_pair_files(vocab: bytes, merges: bytes) -> BytePairTokenizer:
    ids = parse_json(vocab, "vocab.json")
    try:
        lines = merges.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise refuse("merges.txt is not UTF-8") from None
    pairs = [line.removesuffix("\r") for line in lines if line.strip() and not line.startswith("#version")]
    special = [{"content": EOT, "id": ids[EOT], "special": True}] if isinstance(ids, dict) and EOT in ids else []
    return byte_pair(ids, pairs, special)


def from_vocab_merges(vocab: Path, merges: Path, follow: bool = False) -> Tokenizer:
    """Return the byte-level BPE of vocab.json and merges.txt (or encoder.json and vocab.bpe)."""
    return _byte_pair_files(read_bytes(vocab, MAX_FILE_BYTES, follow), read_bytes(merges, MAX_FILE_BYTES, follow))


def from_folder(folder: Path, follow: bool = False) -> Tokenizer | None:
    """Return the tokenizer of a Hugging Face folder, None without one; raises NotLoadable."""
    try:
        return load(folder / "tokenizer.json", follow)
    except NotFound:
        pass
    try:
        return from_vocab_merges(folder / "vocab.json", folder / "merges.txt", follow)
    except NotFound:
        return None


# ---- nanoGPT's meta.pkl

_PLAIN = re.compile(  # the steps of a pickle that make dictionaries, lists, texts and numbers
    "PROTO|FRAME|MARK|STOP|(EMPTY_)?(DICT|LIST|TUPLE)|TUPLE[123]|SETITEMS?|APPENDS?|NONE|NEWTRUE|NEWFALSE|INT|BININT[12]?"
    "|LONG1?|BINFLOAT|(SHORT_)?(BIN)?UNICODE|MEMOIZE|(LONG_)?(BIN)?(PUT|GET)"
)


class _PlainUnpickler(pickle.Unpickler):
    """Builds dictionaries, lists, texts and numbers, and cannot name a class or a function."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise refuse("meta.pkl is more than plain data: it names code")


def _unpickle_plain(data: bytes) -> object:
    """Return the plain data in a pickle, after a look at each of its steps; raises NotLoadable."""
    try:
        for step, (code, argument, _) in enumerate(pickletools.genops(data)):
            # a number in PUT is how large the unpickler makes a table, before it looks at anything else
            too_large = "PUT" in code.name and int(argument or 0) > MAX_META_STEPS
            if not _PLAIN.fullmatch(code.name) or too_large or step > MAX_META_STEPS:
                raise refuse(f"meta.pkl is more than plain data: it has the step {code.name}")
        return _PlainUnpickler(io.BytesIO(data)).load()
    except StorageError:
        raise
    except Exception:  # a damaged pickle raises nearly anything
        raise refuse("meta.pkl is damaged") from None


def _characters_of_meta(meta: object, name: str) -> Tokenizer:
    stoi = meta.get("stoi") if isinstance(meta, dict) else None
    if not isinstance(meta, dict) or not isinstance(stoi, dict):
        raise refuse(f"{name} holds no character vocabulary (stoi)")
    tokenizer = characters(stoi)
    itos = meta.get("itos", {i: character for character, i in stoi.items()})
    if itos != {i: character for character, i in stoi.items()}:
        raise refuse(f"stoi and itos of {name} do not agree")
    if meta.get("vocab_size", len(stoi)) != len(stoi):
        raise refuse(f"vocab_size of {name} is not {len(stoi)}, the number of its characters")
    return tokenizer


def from_meta_pkl(path: Path) -> Tokenizer:
    """Return the character tokenizer in nanoGPT's meta.pkl; executes nothing that is in it."""
    return _characters_of_meta(_unpickle_plain(read_bytes(path, MAX_META_BYTES)), path.name)


def from_meta(folder: Path) -> Tokenizer | None:
    """Return the character tokenizer of a prepared dataset: meta.json, else meta.pkl, else None."""
    try:
        return _characters_of_meta(read_json(folder / "meta.json", MAX_META_BYTES), "meta.json")
    except NotFound:
        pass
    try:
        return from_meta_pkl(folder / "meta.pkl")
    except NotFound:
        return None


# ---- from text


def char_tokenizer(text: str) -> Tokenizer:
    """Return the tokenizer whose tokens are the characters of `text`, in order of their code points."""
    distinct = sorted(set(text))
    if not distinct:
        raise ValueError("the text is empty; a character vocabulary needs at least 1 character")
    return CharTokenizer({character: i for i, character in enumerate(distinct)})


def train_bpe(texts: Iterable[str], vocab_size: int, allow_fewer: bool = False) -> Tokenizer:
    """Return a byte-level BPE trained on `texts`, with <|endoftext|> as its last id and `vocab_size` ids in all.

    Raises ValueError if the texts have too few repeated pairs for that, unless `allow_fewer`.
    """
    from tokenizers import ByteLevelBPETokenizer  # takes 20 ms, and only training needs it

    if vocab_size < 257:
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least 257: 256 bytes and {EOT}")
    trainer = ByteLevelBPETokenizer(add_prefix_space=False)
    trainer.train_from_iterator(texts, vocab_size=vocab_size - 1, min_frequency=2, show_progress=False)
    model = parse_json(trainer.to_str().encode(), "the trained tokenizer")["model"]
    vocab = model["vocab"]
    if len(vocab) < vocab_size - 1 and not allow_fewer:
        raise ValueError(f"vocab_size is {vocab_size}; this text gives at most {len(vocab) + 1} tokens")
    return byte_pair(vocab, model["merges"], [{"content": EOT, "id": len(vocab), "special": True}])


# ---- GPT-2's own

_HOST = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_FILES = {  # name on the host -> sha256
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
FETCH_SECONDS = 8.0
WHAT_TO_DO = (
    "put a GPT-2 folder with its tokenizer (tokenizer.json, or vocab.json and merges.txt) under --pretrained_dir, "
    "or set TIKTOKEN_CACHE_DIR"
)


def _tiktoken_cache() -> Path:
    """Return the folder in which tiktoken keeps its files, named by the sha1 of their addresses."""
    given = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    return Path(given) if given else Path(tempfile.gettempdir()) / "data-gym-cache"


def _cached_as(name: str) -> Path:
    return _tiktoken_cache() / hashlib.sha1((_HOST + name).encode(), usedforsecurity=False).hexdigest()


def _from_tiktoken_cache() -> Tokenizer | None:
    found = {name: read_bytes(_cached_as(name), MAX_FILE_BYTES, follow=True) for name in _GPT2_FILES}
    if any(hashlib.sha256(found[name]).hexdigest() != digest for name, digest in _GPT2_FILES.items()):
        return None
    return _byte_pair_files(found["encoder.json"], found["vocab.bpe"])


def _hub_folders() -> Iterator[Path]:
    """Give the folders of GPT-2 models in the Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache  # slow to import, and seldom needed

    for name in PRETRAINED:
        for repository in (name, f"openai-community/{name}", f"distilbert/{name}"):
            for file in ("tokenizer.json", "vocab.json"):
                path = try_to_load_from_cache(repository, file)
                if isinstance(path, str):
                    yield Path(path).parent


def _on_this_machine(workspace: Workspace | None) -> Iterator[Tokenizer | None]:
    """Give what may be GPT-2's tokenizer, the nearest place first; raises no StorageError of a single place."""
    roots = [] if workspace is None else [workspace.pretrained_dir, workspace.models]
    folders = [root / name for root in roots if root is not None for name in PRETRAINED]
    attempts: list[Callable[[], Tokenizer | None]] = [partial(from_folder, folder) for folder in folders]
    for attempt in [*attempts, _from_tiktoken_cache]:
        try:
            yield attempt()
        except StorageError:
            continue
    for folder in _hub_folders():
        try:
            yield from_folder(folder, follow=True)
        except StorageError:
            continue


def _download(name: str, into: dict[str, bytes]) -> None:
    import requests  # only here

    try:
        reply = requests.get(_HOST + name, timeout=FETCH_SECONDS)
        reply.raise_for_status()
    except requests.RequestException:
        return
    if hashlib.sha256(reply.content).hexdigest() == _GPT2_FILES[name]:
        into[name] = reply.content


def _fetch() -> Tokenizer:
    """Fetch GPT-2's files within FETCH_SECONDS and keep them where tiktoken does; raises Unreachable."""
    found: dict[str, bytes] = {}
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() not in ("1", "TRUE", "YES", "ON"):
        # in threads of their own, because looking up a host's name has no time limit that one could give
        threads = [threading.Thread(target=_download, args=(name, found), daemon=True) for name in _GPT2_FILES]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + FETCH_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    if len(found) < len(_GPT2_FILES):
        raise Unreachable(f"GPT-2's tokenizer is not on this machine and its host does not answer; {WHAT_TO_DO}")
    _keep(found)
    return _byte_pair_files(found["encoder.json"], found["vocab.bpe"])


def _keep(found: dict[str, bytes]) -> None:
    """Put downloaded files where tiktoken and the next call find them; a folder that is read-only stays as it is."""
    with contextlib.suppress(OSError, StorageError):
        _tiktoken_cache().mkdir(parents=True, exist_ok=True)
        for name, data in found.items():
            replace_file(_cached_as(name), partial(write_all, data=data))


def gpt2_of_this_machine(workspace: Workspace | None = None) -> Tokenizer | None:
    """Return GPT-2's tokenizer if this machine has it; never asks the network."""
    return next((found for found in _on_this_machine(workspace) if found is not None and found.kind == "gpt2"), None)


def gpt2(workspace: Workspace | None = None) -> Tokenizer:
    """Return GPT-2's tokenizer, from the nearest place that has it.

    Looks in the GPT-2 folders under `pretrained_dir` and models/, in tiktoken's cache and in Hugging Face's, then
    asks the network. Without any of these: Unreachable, in less than 10 seconds, saying what to do.
    """
    found = gpt2_of_this_machine(workspace)
    return _fetch() if found is None else found
