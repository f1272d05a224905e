"""Datasets that come and go by HTTP: an uploaded file becomes a folder of data/, and a folder is deleted.

The client's file name decides nothing but the kind of file; what is stored has a name of ours. The file is
written and checked beside its place, so a broken or abandoned upload is never listed. Archives are refused.
"""

import errno
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

from storage import tokenizer as tokenizers
from storage.datasets import Dataset, canonical, dataset
from storage.documents import BINARY, SUFFIXES, Scan, pieces, scan, sources
from storage.encodings import UTF8, Transcoder, check_encoding
from storage.errors import BadName, Exists, NotFound, NotLoadable, TooLarge
from storage.files import disk_errors_explained, folder_to_be, quoted, replace_file, sync_folder
from storage.runs import Workspace
from storage.trash import move_to_trash

STORED_AS = {".txt": "text.txt", ".jsonl": "documents.jsonl"}
KEPT = ("prepare.py", "README.md")
COPY_BYTES = 2**20
SAMPLE_BYTES = 2**20


def _suffix(filename: object) -> str:
    found = [s for s in SUFFIXES if isinstance(filename, str) and filename.lower().endswith(s)]
    if not found:
        raise BadName(f"file is {quoted(filename)}; it must be a .txt or .jsonl file, and archives are not unpacked")
    return found[0]


def _copy(stream: BinaryIO, f: BinaryIO, limit: int, encoding: str) -> None:
    size, out = 0, None if encoding == UTF8 else Transcoder(f, encoding)
    while data := stream.read(COPY_BYTES):
        kind = next((BINARY[magic] for magic in BINARY if size == 0 and data.startswith(magic)), None)
        if kind is not None:
            raise NotLoadable(f"file is {kind}; it must be text, and archives are not unpacked")
        size += len(data)
        if size > limit:
            raise TooLarge(f"file has more than {limit} bytes, the limit of this server")
        (f if out is None else out).write(data)
    if out is not None:
        out.write(b"", final=True)


def _gpt2_tokens(found: Scan, workspace: Workspace, folder: Path) -> int | None:
    """Return how many tokens the text is for GPT-2, of much text told from its beginning; None without GPT-2's."""
    gpt2 = tokenizers.gpt2_of_this_machine(workspace)
    if gpt2 is None:
        return None
    tokens = size = 0
    for piece in pieces(folder, sources(folder)):
        tokens, size = tokens + len(gpt2.encode_array(piece.text)), size + len(piece.text.encode())
        if size >= SAMPLE_BYTES:
            break
    return round(tokens / size * found.bytes)


def _report(found: Scan, workspace: Workspace, folder: Path) -> dict[str, Any]:
    """Return what an upload holds."""
    about = {"documents": found.documents, "characters": found.characters, "bytes": found.bytes}
    return about | {"longest_line": found.longest_line, "gpt2_tokens": _gpt2_tokens(found, workspace, folder)}


def upload(
    workspace: Workspace, name: object, filename: object, stream: BinaryIO, limit: int, encoding: object = None
) -> tuple[Dataset, dict[str, Any]]:
    """Make a dataset of an uploaded .txt or .jsonl file of at most `limit` bytes; return it, and what it holds.

    `name` is the dataset's; None: the file name without its ending. `encoding` is the file's, None: UTF-8; it is
    stored as UTF-8. Raises BadName, Exists, TooLarge, NotLoadable (naming the line or byte that cannot be used) and
    NoSpace.
    """
    suffix, encoding = _suffix(filename), check_encoding(encoding)
    checked = canonical(name if name is not None else str(filename)[: -len(suffix)])
    data, target = workspace.data, workspace.data / checked
    taken = Exists(f"there is a dataset {checked} already; delete it first, or choose another name")
    if os.path.lexists(target):
        raise taken
    with folder_to_be(target) as temporary:
        replace_file(temporary / STORED_AS[suffix], lambda f: _copy(stream, f, limit, encoding))
        try:
            found = scan(pieces(temporary, sources(temporary)))
        except NotLoadable as e:  # which knows the file by our name
            raise NotLoadable(f"file{str(e).removeprefix(STORED_AS[suffix])}") from None
        if found.characters == 0:
            raise NotLoadable("file has no text")
        try:
            os.rename(temporary, target)  # fails if another upload was quicker: its folder is not empty
        except OSError as e:
            if e.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise taken from None
            raise
    sync_folder(data)
    return Dataset(workspace, checked), _report(found, workspace, target)


def _delete(folder: Path) -> None:
    if not os.path.lexists(folder / "prepare.py"):
        move_to_trash(folder)
        return
    for entry in list(os.scandir(folder)):
        if entry.name in KEPT:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def delete(workspace: Workspace, name: object) -> None:
    """Move a dataset to data/.trash; of one with a prepare.py delete only what that makes again.

    Raises NotFound, NotWritable.
    """
    found = dataset(workspace, name)
    try:
        with disk_errors_explained(f"data/{found.name}"):
            _delete(found.folder)
    except FileNotFoundError:  # another request was quicker
        raise NotFound(f"the dataset {found.name} has just been deleted") from None
