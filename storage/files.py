"""Files on disk: names that clients may give, and files that are either whole or not there.

A name from a client is matched against one pattern and then opened step by step from a trusted folder,
never following a link (`open_regular`). A file is replaced by writing another one beside it, syncing it,
checking it and renaming it (`replace_file`), so that a crash at any moment leaves the old or the new one.

This file knows no format but JSON, and nothing of runs, models or datasets.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from storage.errors import BadName, NoSpace, NotFound, NotLoadable, NotWritable

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of runs, datasets, models, and of each part of a path
NAME_RULE = "a name has 1 to 64 letters, digits, '.', '_' or '-' and begins with a letter or digit"
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
JSON_LIMIT = 16 * 2**20

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # never a link, never waiting for a FIFO's writer


def quoted(value: object) -> str:
    """Return `value` for a message: quoted, escaped to ASCII and at most 80 characters long.

    Containers are named by their type only: writing out a hostile one could take for ever.
    """
    if isinstance(value, str):
        text = json.dumps(value[:80])
        return text if len(text) <= 80 and len(value) <= 80 else text[:76] + '..."'
    if value is None or isinstance(value, bool | int | float):
        return str(value)[:80] if not isinstance(value, int) or value.bit_length() < 256 else "a huge number"
    return f"a {type(value).__name__}"


def check_name(kind: str, value: object) -> str:
    """Return `value` if it is a name that a client may give to a `kind` of thing; raise BadName if not."""
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise BadName(f"{kind} is {quoted(value)}; {NAME_RULE}")
    return value


# ---- opening


def _explain(error: OSError, name: str) -> Exception:
    if error.errno == errno.ENOENT:
        return NotFound(f"{name} does not exist")
    if error.errno == errno.ELOOP:
        return NotLoadable(f"{name} is a link; links are not followed")
    if error.errno == errno.ENXIO:
        return NotLoadable(f"{name} is not a regular file")
    return NotLoadable(f"{name} cannot be read: {os.strerror(error.errno or 0)}")


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Raise NotFound or NotLoadable for what the system does to the reading of `name` inside."""
    try:
        yield
    except OSError as e:
        raise _explain(e, name) from e


def _require_kind(mode: int, name: str, wanted: Callable[[int], bool], noun: str) -> None:
    if stat.S_ISLNK(mode):
        raise NotLoadable(f"{name} is a link; links are not followed")
    if not wanted(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a file" if stat.S_ISREG(mode) else "a pipe or a device"
        raise NotLoadable(f"{name} is {found}, not {noun}")


@contextlib.contextmanager
def _parent(root: Path, parts: Sequence[str]) -> Iterator[int]:
    """Open the folder that holds the last of `parts`, walking down from `root` without following links."""
    for part in parts:
        check_name("path", part)
    with reading("/".join(parts)):
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # `root` is ours and may be a link
        try:
            for part in parts[:-1]:
                mode = os.stat(part, dir_fd=folder, follow_symlinks=False).st_mode
                _require_kind(mode, part, stat.S_ISDIR, "a folder")
                below = os.open(part, _OPEN | os.O_DIRECTORY, dir_fd=folder)
                os.close(folder)
                folder = below
            yield folder
        finally:
            os.close(folder)


def look_up(root: Path, parts: Sequence[str]) -> os.stat_result:
    """Return what is at root/parts without following links; raises BadName, NotFound or NotLoadable (a link)."""
    with _parent(root, parts) as folder:
        found = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):
            raise NotLoadable(f"{'/'.join(parts)} is a link; links are not followed")
        return found


def open_regular(root: Path, parts: Sequence[str]) -> int:
    """Open the regular file root/parts for reading without following links; return its descriptor.

    Raises BadName for a part that is no name, NotFound, and NotLoadable for links, folders and special files.
    """
    with _parent(root, parts) as folder:
        return open_descriptor(parts[-1], folder)


def _opened(
    name: str | Path, folder: int | None = None, follow: bool = False, shown: str | None = None
) -> tuple[int, os.stat_result]:
    """Open a regular file, as open_descriptor does; return its descriptor and what is known of it."""
    shown = shown or os.path.basename(name)
    with reading(shown):
        descriptor = os.open(name, _OPEN & ~os.O_NOFOLLOW if follow else _OPEN, dir_fd=folder)
    try:
        found = os.fstat(descriptor)
        _require_kind(found.st_mode, shown, stat.S_ISREG, "a file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, found


def open_descriptor(name: str | Path, folder: int | None = None, follow: bool = False) -> int:
    """Open a regular file (in the open `folder`; a link if `follow`): its descriptor. Raises NotFound, NotLoadable."""
    return _opened(name, folder, follow)[0]


@contextlib.contextmanager
def opened(path: Path, shown: str | None = None, follow: bool = False) -> Iterator[BufferedReader]:
    """Open a regular file to read; messages call it `shown`. Raises NotFound and, also if a disk fails, NotLoadable."""
    descriptor, _ = _opened(path, follow=follow, shown=shown)
    with reading(shown or path.name), open(descriptor, "rb") as f:
        yield f


@contextlib.contextmanager
def opened_below(root: Path, parts: Sequence[str]) -> Iterator[BufferedReader]:
    """Open the regular file root/parts for reading, as open_regular does, and explain what a disk does, as `opened`."""
    descriptor = open_regular(root, parts)
    with reading("/".join(parts)), open(descriptor, "rb") as f:
        yield f


def open_to_append(path: Path) -> int:
    """Open a regular file to append to, made if need be, never a link or FIFO: its descriptor. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _OPEN, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENXIO, "Not a regular file", str(path))
    return descriptor


def read_pieces(path: Path) -> Iterator[bytes]:
    """Give a regular file's bytes, for who writes them elsewhere; what fails there is not explained as reading."""
    with opened(path) as f:
        while piece := f.read(2**20):
            yield piece


class Identity(NamedTuple):
    """What tells a file from one that takes its name later, and from itself written over."""

    device: int
    inode: int
    size: int
    modified: int


def identity(descriptor: int) -> Identity:
    """Return the identity of an open file."""
    found = os.fstat(descriptor)
    return Identity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


# ---- JSON


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant)  # made once: a listing parses thousands of files


def parse_json(data: bytes, name: str) -> Any:
    """Return the value of strict JSON; NotLoadable, naming `name`, for anything else."""
    try:
        return _STRICT.decode(data.decode("utf-8"))
    except RecursionError:
        raise NotLoadable(f"{name} is nested too deeply") from None
    except ValueError as e:  # JSON, UTF-8 and integers of more than 4300 digits
        reason = str(e).encode("ascii", "backslashreplace").decode()[:100]
        raise NotLoadable(f"{name} is not valid JSON: {reason}") from None


def read_bytes(path: str | Path, limit_bytes: int, follow: bool = False) -> bytes:
    """Return a regular file's content; raises NotFound, and NotLoadable for a larger file or another kind."""
    descriptor, found = _opened(path, follow=follow)
    size = found.st_size
    try:
        data = os.read(descriptor, size + 1) if size <= limit_bytes else b""
    except OSError as e:
        raise _explain(e, os.path.basename(path)) from e
    finally:
        os.close(descriptor)
    if len(data) > size or size > limit_bytes:  # it grew, or was too large from the start
        raise NotLoadable(f"{os.path.basename(path)} is larger than {min(size, limit_bytes)} bytes")
    return data


def read_json(path: str | Path, limit_bytes: int = JSON_LIMIT) -> Any:
    """Return the value in a JSON file; raises NotFound, and NotLoadable for what is not strict JSON."""
    data = read_bytes(path, limit_bytes)
    try:
        return _STRICT.decode(data.decode("utf-8"))
    except (RecursionError, ValueError):
        return parse_json(data, os.path.basename(path))  # says what is wrong with it


def write_json(path: Path, obj: Any) -> None:
    """Replace a JSON file by `obj`; raises ValueError for NaN and infinities, which are not JSON."""
    data = json.dumps(obj, indent=2, allow_nan=False).encode("ascii") + b"\n"
    replace_file(path, lambda f: write_all(f, data))


# ---- writing

_NOT_WRITABLE = {errno.EROFS: "the disk is read-only", errno.EACCES: "the server may not write there"}
_NOT_WRITABLE |= {errno.EISDIR: "a folder is in the place of a file"}
_NOT_WRITABLE |= dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file is in the place of a folder")


def write_all(f: BinaryIO, data: bytes) -> None:
    """Write all of `data`, for the `write` of replace_file."""
    f.write(data)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable: a rename is not, before this."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_beside(path: Path) -> Path:
    """Return a new path in the same folder that no NAME can equal and sweep_temporary finds."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


@contextlib.contextmanager
def disk_errors_explained(name: str) -> Iterator[None]:
    """Raise NoSpace or NotWritable for what a full or read-only disk does to a write of `name` inside."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"the disk is full: {name} could not be written") from e
        if e.errno in _NOT_WRITABLE:
            raise NotWritable(f"{_NOT_WRITABLE[e.errno]}: {name} could not be written") from e
        raise


@contextlib.contextmanager
def folder_to_be(target: Path) -> Iterator[Path]:
    """Give a new folder beside `target`, to be renamed to it; what is not is removed. Raises NoSpace, NotWritable."""
    with disk_errors_explained(target.name):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(target)
        temporary.mkdir()
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def replace_file(path: Path, write: Callable[[BinaryIO], None], verify: Callable[[Path], None] | None = None) -> None:
    """Replace `path` by what `write` writes, durably, or change nothing.

    Order: temporary file in the same folder, write, fsync, `verify(temporary)`, rename, fsync of the folder.
    Whatever raises on the way, a failed fsync too, is a failed write: the temporary file is removed, the old
    file stays. A full disk raises NoSpace, a read-only one NotWritable, other failures of the system OSError.
    """
    temporary = temporary_beside(path)
    with disk_errors_explained(path.name):
        try:
            with open(temporary, "xb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            if verify is not None:
                verify(temporary)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # what went wrong first is what is told
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sweep_temporary(folder: Path, but: Collection[str] = ()) -> None:
    """Remove what interrupted writes left in `folder`; for its only writer to call when it starts.

    What is to become one of the files in `but` stays: somebody else writes those.
    """
    if not folder.is_dir():
        return
    for entry in os.scandir(folder):
        if TEMPORARY.fullmatch(entry.name) and entry.name[1:].rsplit(".", 2)[0] not in but:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


def free_bytes(path: Path) -> int:
    """Return the bytes free for us on the disk of `path`, or of its nearest folder that exists."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_writable(folder: Path) -> None:
    """Raise NotWritable for a folder in which nothing can be made."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise NotWritable(f"{folder.name}/ is read-only, so nothing can be kept there")


def require_space(path: Path, needed: int) -> None:
    """Raise NoSpace unless `needed` bytes are free on the disk of `path`."""
    free = free_bytes(path)
    if free < needed:
        raise NoSpace(f"{needed / 1e6:,.0f} MB are needed and the disk has {free / 1e6:,.0f} MB free")
