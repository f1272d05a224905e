"""Datasets that come and go by HTTP: an uploaded file becomes a folder of data/, and a folder is deleted.

The client's file name decides nothing but the kind of file; what is stored has a name of ours. The file is
written and checked beside its place, so a broken or abandoned upload is never listed. Archives are refused.
"""

import errno
import os
import shutil
from typing import BinaryIO

from storage.datasets import Dataset, canonical, dataset
from storage.documents import BINARY, SUFFIXES, pieces, scan, sources
from storage.errors import BadName, Exists, NotLoadable, TooLarge
from storage.files import quoted, replace_file, sync_folder, temporary_beside
from storage.runs import Workspace

STORED_AS = {".txt": "text.txt", ".jsonl": "documents.jsonl"}
KEPT = ("prepare.py", "README.md")
COPY_BYTES = 2**20


def _suffix(filename: object) -> str:
    found = [s for s in SUFFIXES if isinstance(filename, str) and filename.lower().endswith(s)]
    if not found:
        raise BadName(f"file is {quoted(filename)}; it must be a .txt or .jsonl file, and archives are not unpacked")
    return found[0]


def _copy(stream: BinaryIO, f: BinaryIO, limit: int) -> None:
    size = 0
    while data := stream.read(COPY_BYTES):
        kind = next((BINARY[magic] for magic in BINARY if size == 0 and data.startswith(magic)), None)
        if kind is not None:
            raise NotLoadable(f"file is {kind}; it must be text, and archives are not unpacked")
        size += len(data)
        if size > limit:
            raise TooLarge(f"file has more than {limit} bytes, the limit of this server")
        f.write(data)


def upload(workspace: Workspace, name: object, filename: object, stream: BinaryIO, limit: int) -> Dataset:
    """Make a dataset of an uploaded .txt or .jsonl file of at most `limit` bytes.

    `name` is the dataset's; None: the file name without its ending. Raises BadName, Exists, TooLarge, NotLoadable
    (naming the line or byte that cannot be used) and NoSpace.
    """
    suffix = _suffix(filename)
    checked = canonical(name if name is not None else str(filename)[: -len(suffix)])
    data, target = workspace.data, workspace.data / checked
    taken = Exists(f"there is a dataset {checked} already; delete it first, or choose another name")
    if os.path.lexists(target):
        raise taken
    data.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    temporary.mkdir()
    try:
        replace_file(temporary / STORED_AS[suffix], lambda f: _copy(stream, f, limit))
        if scan(pieces(temporary, sources(temporary))).characters == 0:
            raise NotLoadable("file has no text")
        os.rename(temporary, target)  # fails if another upload was quicker: its folder is not empty
    except OSError as e:
        if e.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise taken from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(data)
    return Dataset(workspace, checked)


def delete(workspace: Workspace, name: object) -> None:
    """Delete a dataset's folder; of one with a prepare.py only what that can make again. Raises NotFound."""
    folder = dataset(workspace, name).folder
    if not os.path.lexists(folder / "prepare.py"):
        gone = temporary_beside(folder)
        os.rename(folder, gone)
        shutil.rmtree(gone)
        return
    for entry in list(os.scandir(folder)):
        if entry.name in KEPT:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)
