"""Runs: the folders out/<name>/ and what lies in them. The folder is the truth; there is no database.

`Workspace` is where the project's folders are, `Run` is one folder: its paths and a quick description that
reads two small JSON files and opens no weights. Who writes what: status.json is the server's, everything
else in the folder is the trainer's. No torch here, and no knowledge of what is inside a checkpoint.
"""

import contextlib
import difflib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.checkpoint_files import (
    BEST,
    CHECKPOINT,
    PREVIOUS,
    kept_name,
    kept_steps,
    listed,
    manifest_path,
    read_object,
    regular_file,
)
from storage.errors import BadName, NotFound, NotLoadable
from storage.files import NAME, NAME_RULE, check_name, quoted

if TYPE_CHECKING:
    from storage.registry import ModelReference


EXPORTED = ("model.safetensors", "model.safetensors.index.json")  # weights in Hugging Face's format


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
    def has_checkpoint(self) -> bool:
        """Say whether the latest checkpoint is there, as a file that a server may look at."""
        return regular_file(str(self.folder), CHECKPOINT) is not None

    @property
    def previous(self) -> Path:
        """Return the path of the checkpoint before the latest, kept in case the latest is damaged."""
        return self.folder / PREVIOUS

    @property
    def best(self) -> Path:
        """Return the path of the checkpoint with the best validation loss."""
        return self.folder / BEST

    def kept(self) -> list[Path]:
        """Return the paths of the checkpoints that are kept (`keep_every`), the latest first."""
        return [self.folder / kept_name(step) for step in kept_steps(str(self.folder))]

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
        """Say whether the folder is there, as a folder and not as a link. Raises NotLoadable where a disk fails."""
        try:
            return stat.S_ISDIR(self.folder.lstat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as e:
            raise NotLoadable(f"{self.relative} cannot be read: {e.strerror}") from None

    def describe(self) -> dict[str, Any]:
        """Return what GET /api/models says of this run, see describe_run."""
        return describe_run(self.name, str(self.folder))


def describe_run(name: str, folder: str) -> dict[str, Any]:
    """Return what GET /api/models says of the run `name` in `folder`; opens no weights.

    `damaged` is a sentence when a file of the run cannot be right, else None; `checkpoints` are those there are,
    each with its own. Raises NotFound without weights.
    """
    config, damage = read_object(f"{folder}/train_config.json")
    found = list(listed(folder, kept=not config or "keep_every" in config))
    if not found:
        return _describe_export(name, folder)
    shown = found[0]
    return {
        "name": name,
        "path": f"out/{name}/{shown.name}",
        "config": config or shown.manifest.get("config") or shown.manifest.get("model_args") or {},
        "iter_num": shown.iter_num,
        "best_val_loss": shown.best_val_loss,
        "size_bytes": shown.size_bytes,
        "modified": shown.modified,
        "damaged": damage or shown.damaged,
        "checkpoints": [file.describe(f"out/{name}") for file in found],
    }


def _describe_export(name: str, folder: str) -> dict[str, Any]:
    """Return the same of a folder with a model in Hugging Face's format. Raises NotFound."""
    for file in EXPORTED:
        if (found := regular_file(folder, file)) is not None:
            break
    else:
        raise NotFound(f"out/{name} has no checkpoint")
    config, damage = read_object(f"{folder}/config.json")
    return {
        "name": name,
        "path": f"out/{name}/{file}",
        "config": config,
        "iter_num": None,
        "best_val_loss": None,
        "size_bytes": found.st_size,
        "modified": found.st_mtime,
        "damaged": damage,
        "checkpoints": [],
    }


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
        return [Run(name, self.out / name) for name in self.names()]

    def nearest(self, name: str) -> str:
        """Return how a message about a run that is not there ends: "; did you mean my_run?", or nothing."""
        names = self.names()
        near = [] if name in names else difflib.get_close_matches(name, names, n=1)
        return f"; did you mean {near[0]}?" if near else ""

    def trained_models(self) -> list[dict[str, Any]]:
        """Return the description of every run that has weights, sorted by name; see describe_run."""
        out, described = str(self.out), []
        for name in self.names():
            with contextlib.suppress(NotFound):
                described.append(describe_run(name, f"{out}/{name}"))
        return described

    def names(self) -> list[str]:
        """Return the names of all run folders, sorted; links and odd names are left out."""
        try:
            entries = os.scandir(self.out)
        except OSError:
            return []
        with entries:
            found = [e.name for e in entries if NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
        return sorted(found)
