"""Files that clients upload to have jobs use them: state/files/<id>/ with the bytes and what is told of them.

A file's id is made here; the client's name for it is told again and decides at most between text and JSONL. An
upload is copied and read to its end before it is listed as processed; what is wrong with a training file is kept
with the file, by line. Archives are refused. To train on a file, it becomes a dataset (`as_dataset`).
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO

from storage.documents import BINARY, MAX_LINE_BYTES, pieces, scan, sources
from storage.errors import BadName, NotFound, NotLoadable, StorageError, TooLarge
from storage.files import (
    disk_errors_explained,
    folder_to_be,
    open_regular,
    opened_below,
    quoted,
    read_json,
    read_pieces,
    replace_file,
    require_space,
    sweep_temporary,
    sync_folder,
    temporary_beside,
    write_json,
)
from storage.records import LineReader
from storage.runs import Workspace

ID = re.compile(r"file-[0-9a-f]{24}")
PURPOSES = ("fine-tune", "assistants", "batch", "vision", "user_data", "evals")
ARCHIVES = BINARY | {
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\0": "an xz archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"Rar!\x1a": "a rar archive",
}
TAR_MAGIC, TAR_AT = b"ustar", 257
TEXT, JSONL, OTHER = "text.txt", "documents.jsonl", "content"  # how the bytes of each kind are stored
DESCRIPTION = "file.json"
KINDS: dict[str, Any] = {"created": (int, float), "bytes": int, "status_details": (str, NoneType)}
KINDS |= dict.fromkeys(("filename", "purpose", "stored_as", "status"), str)  # what the description holds
MAX_FILENAME = 255
COPY_BYTES = 2**20
SHOWN_FAULTS = 5


@dataclass(frozen=True)
class UserFile:
    """One uploaded file, as its description was when it was read."""

    folder: Path
    created: float  # seconds since the epoch
    filename: str  # the client's; never a path here
    purpose: str
    bytes: int
    stored_as: str
    status: str  # uploaded, processed, error
    status_details: str | None = None

    @property
    def id(self) -> str:
        """Return the file's id, file-<24 hex digits>."""
        return self.folder.name

    def write(self) -> None:
        """Replace the description on the disk by this one."""
        write_json(self.folder / DESCRIPTION, {k: v for k, v in self.__dict__.items() if k != "folder"})

    @classmethod
    def read(cls, folder: Path) -> "UserFile":
        """Return the file in a folder. Raises NotFound, NotLoadable."""
        found = read_json(folder / DESCRIPTION)
        whole = isinstance(found, dict) and found.keys() <= KINDS.keys()
        if not whole or not all(isinstance(found.get(name), kind) for name, kind in KINDS.items()):
            raise NotLoadable(f"{folder.name} has a damaged description")
        return cls(folder, **found)

    def open(self) -> BinaryIO:
        """Open the bytes for reading. Raises NotFound, NotLoadable."""
        descriptor = open_regular(self.folder, [self.stored_as])
        if (size := os.fstat(descriptor).st_size) != self.bytes:
            os.close(descriptor)
            raise NotLoadable(f"{self.id} is damaged: {size} of its {self.bytes} bytes are there")
        return open(descriptor, "rb")


def _folder(workspace: Workspace) -> Path:
    return workspace.root / "state" / "files"


def sweep(workspace: Workspace) -> None:
    """Remove what uploads left that a crash interrupted; for a server that has just started."""
    sweep_temporary(_folder(workspace))
    sweep_temporary(workspace.data)


# ---- uploading


def _display_name(filename: object) -> str:
    name = str(filename or "").replace("\\", "/").rsplit("/", 1)[-1] or "file"
    if len(name) > MAX_FILENAME:
        raise BadName(f"the file's name has {len(name)} characters; it may have at most {MAX_FILENAME}")
    return name


def _stored_as(filename: str, purpose: str, beginning: bytes) -> str:
    """Return the name that says of what kind a file is: by its ending, else by how it begins."""
    if purpose != "fine-tune":
        return OTHER
    ending = filename.lower().rpartition(".")[2]
    if ending in ("txt", "jsonl", "json"):
        return TEXT if ending == "txt" else JSONL
    return JSONL if beginning.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{") else TEXT


def _refuse_archives(beginning: bytes) -> None:
    kind = next((ARCHIVES[magic] for magic in ARCHIVES if beginning.startswith(magic)), None)
    if beginning[TAR_AT:].startswith(TAR_MAGIC):
        kind = "a tar archive"
    if kind is not None:
        raise NotLoadable(f"file is {kind}; archives are not unpacked, send the text or the JSONL itself")


def _copy(beginning: bytes, stream: BinaryIO, f: BinaryIO, limit: int) -> None:
    data, size = beginning, 0
    while data:
        size += len(data)
        if size > limit:
            raise TooLarge(f"file has more than {limit} bytes, the limit of this server")
        f.write(data)
        data = stream.read(COPY_BYTES)


def save(workspace: Workspace, filename: object, purpose: object, stream: BinaryIO, limit: int) -> UserFile:
    """Store an upload of at most `limit` bytes and check it. Raises BadName, NotLoadable, TooLarge, NoSpace."""
    if purpose not in PURPOSES:
        raise BadName(f"purpose is {quoted(purpose)}; it must be one of {', '.join(PURPOSES)}")
    name, beginning = _display_name(filename), stream.read(COPY_BYTES)
    _refuse_archives(beginning)
    stored_as = _stored_as(name, str(purpose), beginning)
    target = _folder(workspace) / f"file-{secrets.token_hex(12)}"
    with folder_to_be(target) as temporary:
        replace_file(temporary / stored_as, lambda f: _copy(beginning, stream, f, limit))
        size = (temporary / stored_as).stat().st_size
        UserFile(temporary, time.time(), name, str(purpose), size, stored_as, "uploaded").write()
        os.rename(temporary, target)
    sync_folder(target.parent)
    return settled(UserFile.read(target))


# ---- checking


def _faults(f: BinaryIO) -> Iterator[tuple[int, str | None]]:
    """Give the number of each line that is not blank, and what is wrong with it."""
    number, reader = 0, LineReader()
    while line := f.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            yield number, f"it is longer than {MAX_LINE_BYTES // 2**20} MiB; nothing after it was read"
            return
        if line.strip():
            try:
                reader.pieces(line)
            except UnicodeDecodeError as e:
                yield number, f"it is not UTF-8 text at its byte {e.start}"
            except ValueError as e:
                yield number, str(e)[:200]
            else:
                yield number, None


def _check_lines(f: BinaryIO) -> str | None:
    found: list[str] = []
    documents = more = 0
    for number, fault in _faults(f):
        documents += 1
        if fault is not None and len(found) < SHOWN_FAULTS:
            found.append(f"line {number}: {fault}")
        elif fault is not None:
            more += 1
    if more:
        found.append(f"and {more} more lines")
    return "; ".join(found) or (None if documents else "the file has no line of JSON")


def _problem(file: UserFile) -> str | None:
    """Return what makes a file unfit to train on, None if nothing does."""
    if file.purpose != "fine-tune":
        return None
    try:
        if file.stored_as == JSONL:
            with opened_below(file.folder, [file.stored_as]) as f:
                problem = _check_lines(f)
            if problem is not None:
                return problem
        empty = scan(pieces(file.folder, sources(file.folder))).characters == 0
    except StorageError as e:  # which knows the file by our name
        return f"the file{str(e).removeprefix(file.stored_as)}"
    return "the file has no text" if empty else None


def settled(file: UserFile) -> UserFile:
    """Return the file as it is after its check, which is done now unless somebody else is at it.

    Whoever holds the lock checks; a server that died while it checked left a file that the next look settles.
    """
    if file.status != "uploaded":
        return file
    with file.open() as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return file
        problem = _problem(file)
        status = {"status": "processed" if problem is None else "error", "status_details": problem}
        checked = UserFile(**file.__dict__ | status)
        checked.write()
        return checked


# ---- what there is


def user_file(workspace: Workspace, file_id: object) -> UserFile:
    """Return the file of this id, settled. Raises NotFound."""
    if isinstance(file_id, str) and ID.fullmatch(file_id):
        folder = _folder(workspace) / file_id
        if not folder.is_symlink() and folder.is_dir():
            return settled(UserFile.read(folder))
    raise NotFound(f"there is no file {quoted(file_id)}")


def user_files(workspace: Workspace) -> list[UserFile]:
    """Return all files, the newest first."""
    found = []
    try:
        names = [e.name for e in os.scandir(_folder(workspace)) if ID.fullmatch(e.name)]
    except OSError:
        return []
    for name in names:
        try:
            found.append(UserFile.read(_folder(workspace) / name))
        except StorageError:  # deleted a moment ago, or damaged: nothing can be told of it
            continue
    return sorted(found, key=lambda file: (file.created, file.id), reverse=True)


# ---- as a dataset


def _copy_into(folder: Path, file: UserFile, name: str) -> None:
    replace_file(folder / name, lambda f: f.writelines(read_pieces(file.folder / file.stored_as)))


def as_dataset(workspace: Workspace, training: UserFile, validation: UserFile | None = None) -> str:
    """Return the name of the dataset with these files' text, made if it is not there. Raises NoSpace.

    The text to validate on is val.txt or val.jsonl in it; without it a part of the training text is.
    """
    name = training.id if validation is None else f"{training.id}-{validation.id.removeprefix('file-')}"
    target = workspace.data / name
    if target.is_dir():
        return name
    require_space(workspace.data, training.bytes + (0 if validation is None else validation.bytes))
    with folder_to_be(target) as temporary:
        _copy_into(temporary, training, training.stored_as)
        if validation is not None:
            _copy_into(temporary, validation, f"val{Path(validation.stored_as).suffix}")
        try:
            os.rename(temporary, target)
        except OSError as e:
            if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise  # else another job was quicker to make the same
    sync_folder(workspace.data)
    return name


def datasets_of(workspace: Workspace, file: UserFile) -> list[str]:
    """Return the names of the datasets that were made of a file."""
    digits = file.id.removeprefix("file-")
    pattern = re.compile(rf"file-{digits}(-[0-9a-f]{{24}})?|file-[0-9a-f]{{24}}-{digits}")
    try:
        return sorted(name for name in os.listdir(workspace.data) if pattern.fullmatch(name))
    except OSError:
        return []


def _remove(folder: Path) -> bool:
    """Remove a folder; say whether it was there, and not somebody quicker."""
    gone = temporary_beside(folder)
    try:
        os.rename(folder, gone)
    except FileNotFoundError:
        return False
    shutil.rmtree(gone)
    return True


def delete(workspace: Workspace, file: UserFile) -> None:
    """Remove a file and the datasets that were made of it. Raises NotWritable, NotFound if it has gone meanwhile."""
    with disk_errors_explained(file.id):
        for name in datasets_of(workspace, file):
            _remove(workspace.data / name)
        if not _remove(file.folder):
            raise NotFound(f"there is no file {quoted(file.id)}")
