"""Runs: the folders out/<name>/ and what lies in them. The folder is the truth; there is no database.

`Workspace` is where the project's folders are, `Run` is one folder: its paths and a quick description that
reads two small JSON files and opens no weights. Who writes what: status.json is the server's, everything
else in the folder is the trainer's. No torch here, and no knowledge of what is inside a checkpoint.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import BadName, NotFound, StorageError
from storage.files import NAME, NAME_RULE, check_name, quoted, read_json

if TYPE_CHECKING:
    from storage.registry import ModelReference

CHECKPOINT, BEST, PREVIOUS = "ckpt.pt", "best.pt", "ckpt.prev.pt"


@dataclass(frozen=True)
class Run:
    """One training run: the folder out/<name>/."""

    name: str
    folder: Path

    @property
    def relative(self) -> str:
        """Return the folder as users write it: out/<name>."""
        return f"out/{self.name}"

    @property
    def checkpoint(self) -> Path:
        """Return the path of the latest checkpoint."""
        return self.folder / CHECKPOINT

    @property
    def previous(self) -> Path:
        """Return the path of the checkpoint before the latest, kept in case the latest is damaged."""
        return self.folder / PREVIOUS

    @property
    def best(self) -> Path:
        """Return the path of the checkpoint with the best validation loss."""
        return self.folder / BEST

    @property
    def config(self) -> Path:
        """Return the path of the resolved TrainConfig."""
        return self.folder / "train_config.json"

    @property
    def status(self) -> Path:
        """Return the path of the job's state; only the server writes it."""
        return self.folder / "status.json"

    @property
    def result(self) -> Path:
        """Return the path of the trainer's last file: how it ended."""
        return self.folder / "result.json"

    @property
    def metrics(self) -> Path:
        """Return the path of the rows of losses and speeds."""
        return self.folder / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Return the path of the text samples."""
        return self.folder / "samples.jsonl"

    @property
    def log(self) -> Path:
        """Return the path of the trainer's output."""
        return self.folder / "train.log"

    @property
    def tokenizer(self) -> Path:
        """Return the path of the tokenizer that travels with the run."""
        return self.folder / "tokenizer.json"

    def manifest(self, path: Path) -> Path:
        """Return the path of the manifest (size, sha256, iter_num, ...) beside a checkpoint of this run."""
        return manifest_path(path)

    def exists(self) -> bool:
        """Say whether the folder is there, as a folder and not as a link."""
        return self.folder.is_dir() and not self.folder.is_symlink()

    def describe(self) -> dict[str, Any]:
        """Return what GET /api/models says of this run; opens no weights.

        `damaged` is a sentence when a file of the run cannot be right, else None. Raises NotFound without weights.
        """
        folder = str(self.folder)  # thousands of runs are described at once, and Path is slow
        name, found = self._weights(folder)
        exported = name.startswith("model.safetensors")
        config, damage = _read_object(f"{folder}/{'config.json' if exported else 'train_config.json'}")
        manifest, manifest_damage = _read_object(f"{folder}/{name}.json")
        entry, size_damage = _entry_of(manifest, name, found.st_size)
        return {
            "name": self.name,
            "path": f"out/{self.name}/{name}",
            "config": config or entry.get("config") or entry.get("model_args") or {},
            "iter_num": entry.get("iter_num"),
            "best_val_loss": entry.get("best_val_loss"),
            "size_bytes": found.st_size,
            "modified": found.st_mtime,
            "damaged": damage or manifest_damage or size_damage,
        }

    def _weights(self, folder: str) -> tuple[str, os.stat_result]:
        for name in (CHECKPOINT, BEST, PREVIOUS, "model.safetensors", "model.safetensors.index.json"):
            try:
                found = os.lstat(f"{folder}/{name}")
            except OSError:
                continue
            if stat.S_ISREG(found.st_mode):
                return name, found
        raise NotFound(f"{self.relative} has no checkpoint")


def manifest_path(path: Path) -> Path:
    """Return where the manifest of a checkpoint lies: ckpt.pt.json beside ckpt.pt."""
    return path.with_name(path.name + ".json")


def _read_object(path: str) -> tuple[dict[str, Any], str | None]:
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


def manifest_entries(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a manifest says of the latest file and of earlier ones, the latest first.

    A manifest is written before its file takes its place, so the file in place may still be an earlier one.
    """
    earlier = manifest.get("earlier")
    entries = [manifest, *(earlier if isinstance(earlier, list) else [])]
    return [entry for entry in entries if isinstance(entry, dict) and "size" in entry]


def _entry_of(manifest: dict[str, Any], name: str, size: int) -> tuple[dict[str, Any], str | None]:
    """Return the manifest's entry for a file of `size` bytes, and what is wrong if there is none."""
    entries = manifest_entries(manifest)
    for entry in entries:
        if entry["size"] == size:
            return entry, None
    if not entries:  # a foreign checkpoint has no manifest
        return manifest, None
    return manifest, f"{name} has {size} bytes, and {entries[0]['size']} were written"


@dataclass(frozen=True)
class Workspace:
    """Where the project's folders are."""

    root: Path
    pretrained_dir: Path | None = None  # one Hugging Face folder per name
    registered: "tuple[tuple[str, ModelReference], ...]" = ()  # names that a registry file adds

    @property
    def out(self) -> Path:
        """Return the folder of runs."""
        return self.root / "out"

    @property
    def data(self) -> Path:
        """Return the folder of datasets."""
        return self.root / "data"

    @property
    def models(self) -> Path:
        """Return the folder of bundled models."""
        return self.root / "models"

    def run(self, name: object) -> Run:
        """Return the run of this name, whether it exists or not; raises BadName."""
        checked = check_name("run", name)
        return Run(checked, self.out / checked)

    def run_from_output_dir(self, output_dir: object) -> Run:
        """Return the run of "out/<name>" or "<name>"; raises BadName for anything else."""
        if (
            not isinstance(output_dir, str)
            or output_dir == "out"
            or not NAME.fullmatch(output_dir.removeprefix("out/"))
        ):
            raise BadName(f"output_dir is {quoted(output_dir)}; it must be out/<name>: {NAME_RULE}")
        return self.run(output_dir.removeprefix("out/"))

    def runs(self) -> list[Run]:
        """Return all run folders, sorted by name; links and odd names are left out."""
        return sorted(self._scan(), key=lambda run: run.name)

    def _scan(self) -> Iterator[Run]:
        out = self.out
        try:
            entries = os.scandir(out)
        except OSError:
            return
        with entries:
            for entry in entries:
                if NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    yield Run(entry.name, out / entry.name)
