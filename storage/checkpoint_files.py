"""The checkpoint files of a run and their manifests: which there are, which are damaged, and which are kept.

    ckpt.pt        the latest               ckpt.pt.json      its manifest, and that of the one before
    ckpt.prev.pt   the one before
    best.pt        the best, weights only   best.pt.json
    ckpt-500.pt    kept (`keep_every`)      ckpt-500.pt.json

A listing opens no weights: there a file is damaged when it has another size than was written. `damage` reads all of
it. What is inside a checkpoint is for checkpoints.py to say; no torch here.
"""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from storage.errors import NotFound, NotLoadable, StorageError
from storage.files import opened, read_json, read_pieces, replace_file, sync_folder, write_json
from storage.torch_file import crc_damage

CHECKPOINT, BEST, PREVIOUS = "ckpt.pt", "best.pt", "ckpt.prev.pt"
KEPT = re.compile(r"ckpt-(0|[1-9][0-9]{0,9})\.pt")
IF_ON_PURPOSE = "if it was replaced on purpose, delete the .json beside it"
EARLIER = 4  # entries of earlier files that a manifest keeps
ENTRY = ("size", "sha256", "iter_num", "best_val_loss", "parameters", "written")
Entry = dict[str, Any]  # what a manifest says of one file


def kept_name(iter_num: int) -> str:
    """Return the name of the checkpoint that is kept of an iteration."""
    return f"ckpt-{iter_num}.pt"


def manifest_path(path: Path) -> Path:
    """Return where the manifest of a checkpoint lies: ckpt.pt.json beside ckpt.pt."""
    return path.with_name(path.name + ".json")


def read_object(path: str) -> tuple[dict[str, Any], str | None]:
    """Return a JSON object and None, or {} and what is wrong with the file; a missing file is not wrong."""
    try:
        value = read_json(path, 2**20)
    except NotFound:
        return {}, None
    except StorageError as e:
        return {}, str(e)
    if not isinstance(value, dict):
        return {}, f"{os.path.basename(path)} holds no JSON object"
    return value, None


# ---- manifests


def _entries_in(manifest: dict[str, Any]) -> list[Entry]:
    """Return what a manifest says of the latest file and of earlier ones, the latest first.

    A manifest is written before its file takes its place, so the file in place may still be an earlier one.
    """
    earlier = manifest.get("earlier")
    entries = [manifest, *(earlier if isinstance(earlier, list) else [])]
    return [entry for entry in entries if isinstance(entry, dict) and "size" in entry]


def entries(path: Path) -> list[Entry]:
    """Return what the manifest says of a checkpoint and of earlier ones; [] without a manifest that can be read."""
    latest = path.with_name(CHECKPOINT) if path.name == PREVIOUS else path
    return _entries_in(read_object(str(manifest_path(latest)))[0])


def _entry_of(manifest: dict[str, Any], name: str, size: int) -> tuple[Entry, str | None]:
    """Return the manifest's entry for a file of `size` bytes, and what is wrong if there is none."""
    if manifest.get("size") == size:
        return manifest, None
    found = _entries_in(manifest)
    for entry in found:
        if entry["size"] == size:
            return entry, None
    if not found:  # a foreign checkpoint has no manifest
        return manifest, None
    return manifest, f"{name} has {size} bytes, and {found[0]['size']} were written"


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of the file that is about to become `path`; it keeps the entries of the files before it."""
    short = [{key: value for key, value in old.items() if key in ENTRY} for old in entries(path)[:EARLIER]]
    write_json(manifest_path(path), {**manifest, "earlier": short})


# ---- listing


class CheckpointFile(NamedTuple):
    """A checkpoint file as a listing shows it."""

    name: str
    iter_num: int | None
    best_val_loss: float | None
    size_bytes: int
    modified: float
    damaged: str | None
    manifest: dict[str, Any]

    def describe(self, folder: str) -> dict[str, Any]:
        """Return what GET /api/models says of it; `folder` is out/<name>."""
        return {
            "path": f"{folder}/{self.name}",
            "iter_num": self.iter_num,
            "size_bytes": self.size_bytes,
            "damaged": self.damaged,
        }


def regular_file(folder: str, name: str) -> os.stat_result | None:
    """Return what is known of a regular file, None for anything else, a link too."""
    try:
        found = os.lstat(f"{folder}/{name}")
    except OSError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def kept_steps(folder: str) -> list[int]:
    """Return the iterations of which a folder has a kept checkpoint, the latest first."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return sorted((int(match[1]) for match in map(KEPT.fullmatch, names) if match), reverse=True)


def listed(folder: str, kept: bool = True) -> Iterator[CheckpointFile]:
    """Give the checkpoint files in a folder: the latest, the best, the one before, and the kept from the latest on.

    Reads manifests only. Thousands of runs are listed at once: paths are texts, because Path is slow, and a folder is
    not searched for kept ones unless `kept`, because that takes as long as all the rest.
    """
    latest: tuple[dict[str, Any], str | None] | None = None
    for name in (CHECKPOINT, BEST, PREVIOUS, *map(kept_name, kept_steps(folder) if kept else ())):
        found = regular_file(folder, name)
        if found is None:
            continue
        if name not in (CHECKPOINT, PREVIOUS):
            manifest, problem = read_object(f"{folder}/{name}.json")
        else:
            latest = latest or read_object(f"{folder}/{CHECKPOINT}.json")
            manifest, problem = latest
        entry, size_problem = _entry_of(manifest, name, found.st_size)
        if name == PREVIOUS:  # their sizes rarely differ, so its entry is the one behind that of the latest
            entry = next(iter(_entries_in(manifest)[1:]), {})
        step, loss = entry.get("iter_num"), entry.get("best_val_loss")
        problem = problem or size_problem
        yield CheckpointFile(name, step, loss, found.st_size, found.st_mtime, problem, manifest)


# ---- proving


def sha256_of(path: Path) -> str:
    """Return the sha256 of a regular file. Raises NotFound, NotLoadable."""
    with opened(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint file as a sentence, or None.

    It must match its manifest in size and sha256; without a manifest its records must match their checksums.
    Reads the whole file. Whether it is a model of ours is for inspect_checkpoint to say.
    """
    written = entries(path)
    try:
        with opened(path) as f:
            if not written:
                return crc_damage(f, path.name)
            size = f.seek(0, 2)
            if size not in [entry["size"] for entry in written]:
                return f"{path.name} has {size} bytes, and {written[0]['size']} were written; {IF_ON_PURPOSE}"
            f.seek(0)
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    except StorageError as e:
        return str(e)
    matches = any(entry.get("sha256") == sha256 for entry in written)
    return None if matches else f"{path.name} is damaged: its sha256 differs from what was written; {IF_ON_PURPOSE}"


# ---- keeping


def _link(source: Path, target: Path) -> bool:
    """Let `target` be the same file as `source`, at once; say whether the file system can do that."""
    link = target.with_name(f".{target.name}.{'0' * 16}.tmp")  # swept like any temporary file
    link.unlink(missing_ok=True)
    try:
        link.hardlink_to(source)
    except OSError:
        return False
    try:
        link.replace(target)
    finally:
        with suppress(OSError):  # a rename onto another name of the same file leaves both
            link.unlink(missing_ok=True)
    return True


def keep_previous(path: Path) -> None:
    """Keep the latest checkpoint under its second name, durably once its folder is synced; one is always there."""
    if path.name != CHECKPOINT or not path.exists():
        return
    previous = path.with_name(PREVIOUS)
    if not _link(path, previous):
        path.replace(previous)


def _publish(source: Path, target: Path, manifest: dict[str, Any]) -> None:
    """Give a whole checkpoint another name, with the manifest; without hard links it is copied."""

    def prove(temporary: Path) -> None:
        if sha256_of(temporary) != manifest["sha256"]:
            raise OSError(errno.EIO, f"{target.name} reads back differently from what was written")

    write_manifest(target, manifest)
    keep_previous(target)
    if _link(source, target):
        sync_folder(target.parent)
    else:
        replace_file(target, lambda f: f.writelines(read_pieces(source)), prove)


def keep(path: Path, iter_num: int) -> None:
    """Keep the checkpoint that was just saved at `path` as ckpt-<iter_num>.pt. Raises StorageError, OSError."""
    _publish(path, path.with_name(kept_name(iter_num)), read_json(manifest_path(path)))


def _has(path: Path, sha256: str) -> bool:
    """Say whether a file is there, can be read, and is this one."""
    with suppress(StorageError):
        return sha256_of(path) == sha256
    return False


def bring_back(folder: Path, iter_num: int) -> None:
    """Make the checkpoint that is kept of an iteration the latest one; what was the latest is then the one before.

    Raises NotFound, NotLoadable, OSError. Nobody may be training in the folder.
    """
    source, target = folder / kept_name(iter_num), folder / CHECKPOINT
    if regular_file(str(folder), source.name) is None:
        kept = ", ".join(map(str, kept_steps(str(folder))[:20])) or "none"
        raise NotFound(f"no checkpoint of iteration {iter_num} is kept; kept are those of: {kept}")
    sha256 = sha256_of(source)
    entry = next((entry for entry in entries(source) if entry.get("sha256") == sha256), None)
    if entry is None:
        raise NotLoadable(damage(source) or f"{source.name} has no manifest, so nobody knows whether it is whole")
    if not _has(target, sha256):  # else it is the latest already
        _publish(source, target, read_object(str(manifest_path(source)))[0] | entry)
