"""The registry: from what a user calls a model to what and where it is. Nothing is opened or fetched here.

A model is bundled (models/), pretrained (one of five names, found in a local folder or fetched later), or
trained (out/). A path is only accepted in the forms that `resolve` lists, and only through names: whatever
lies outside those folders gets one and the same refusal, whether it exists or not.
"""

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from storage.checkpoint_files import CHECKPOINT
from storage.errors import BadName, NotFound, NotLoadable
from storage.files import NAME, look_up, quoted
from storage.runs import Workspace

PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
BUNDLED = "tiny-shakespeare"
FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json", "config.json")
PATH_RULE = "it must be out/<name>/ckpt.pt, out/<name>, models/<name> or a name in the folder of pretrained models"

Kind = Literal["bundled", "pretrained", "trained", "folder", "registered"]


@dataclass(frozen=True)
class ModelReference:
    """A model that can be loaded, and how it is called."""

    id: str  # "gpt2", "tiny-shakespeare", "my_model", "my_model/best"
    kind: Kind
    path: Path | None  # a checkpoint file or a Hugging Face folder; None: still to be fetched
    label: str  # what the user gave, for messages
    device: str | None = None  # this and the next two: what a registry file says of it; None: as the settings say
    dtype: str | None = None
    max_context_tokens: int | None = None
    repository: str | None = None  # on the Hugging Face hub, of a registered model that is there


def resolve(workspace: Workspace, *, model_path: object = None, model_type: object = None) -> ModelReference:
    """Return the model that exactly one of `model_path` and `model_type` names.

    Paths: out/<name>/ckpt.pt (or best.pt, another .pt, model.safetensors), out/<name> (a run or an exported
    folder), models/<name>, or the name of a folder in `pretrained_dir`. Raises BadName, NotFound, NotLoadable.
    """
    if (model_path is None) == (model_type is None):
        raise BadName("give exactly one of model_path and model_type")
    field, value = ("model_type", model_type) if model_path is None else ("model_path", model_path)
    if not isinstance(value, str) or not value:
        raise BadName(f"{field} is {quoted(value)}; it must be a text that is not empty")
    return _by_type(workspace, value) if field == "model_type" else _by_path(workspace, value)


def _by_type(workspace: Workspace, name: str) -> ModelReference:
    registered = dict(workspace.registered).get(name)
    if registered is not None:
        return registered
    names = pretrained_names(workspace)
    if name not in names:
        error = NotFound if NAME.fullmatch(name) else BadName
        rule = f"it must be one of {', '.join(names)}; a trained model has a model_path: out/<name>"
        raise error(f"model_type is {quoted(name)}; {rule}")
    folder = local_folder(workspace, name)
    if name == BUNDLED and folder is None:
        raise NotFound(
            f"models/{BUNDLED} is not there: copy the project's models/ into this root, or name another model"
        )
    kind: Kind = "bundled" if name == BUNDLED else "pretrained" if name in PRETRAINED else "folder"
    return ModelReference(name, kind, folder, name)


def _by_path(workspace: Workspace, value: str) -> ModelReference:
    parts = value.removesuffix("/").split("/")
    if not all(NAME.fullmatch(part) for part in parts):  # it may lead anywhere, so it is not repeated
        raise BadName(f"model_path is not one that can be loaded; {PATH_RULE}")
    if parts[0] == "out" and 2 <= len(parts) <= 4:
        try:
            path = _locate(workspace.out, parts[1:], value)
        except NotFound as error:
            raise NotFound(f"{error}{workspace.nearest(parts[1])}") from None
        return ModelReference(_trained_id(path, workspace.out), _kind(path, "trained"), path, value)
    if parts[0] == "models" and 2 <= len(parts) <= 3:
        path = _locate(workspace.models, parts[1:], value)
        return ModelReference(parts[1], "bundled", path, value)
    if len(parts) == 1 and parts[0] not in ("out", "models") and workspace.pretrained_dir is not None:
        path = _locate(workspace.pretrained_dir, parts, value)
        return ModelReference(value, "pretrained" if value in PRETRAINED else "folder", path, value)
    raise BadName(f"model_path is {quoted(value)}; {PATH_RULE}")


def _locate(root: Path, parts: Sequence[str], shown: str) -> Path:
    """Return the checkpoint file, or the Hugging Face folder, that root/parts means."""
    try:
        mode = look_up(root, parts).st_mode
    except NotFound:
        raise NotFound(f"{shown} does not exist") from None
    except NotLoadable as error:  # tells which part of it is a link, or a file in place of a folder
        raise NotLoadable(f"{shown} cannot be loaded: {error}") from None
    path, is_file_name = root.joinpath(*parts), parts[-1].endswith(".pt") or parts[-1] in FOLDER_FILES
    if is_file_name and len(parts) > 1:
        if not stat.S_ISREG(mode):
            raise NotLoadable(f"{shown} is {'a folder' if stat.S_ISDIR(mode) else 'a pipe or a device'}, not a file")
        return path if path.suffix == ".pt" else path.parent
    if not stat.S_ISDIR(mode):
        raise NotLoadable(f"{shown} is neither a checkpoint (.pt) nor a folder with a model")
    if _has(path, CHECKPOINT):
        return path / CHECKPOINT
    if any(_has(path, name) for name in FOLDER_FILES):
        return path
    raise NotLoadable(f"{shown} holds neither {CHECKPOINT} nor config.json with model.safetensors")


def _has(folder: Path, name: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(folder / name).st_mode)
    except OSError:
        return False


def _kind(path: Path, checkpoint_kind: Kind) -> Kind:
    return checkpoint_kind if path.suffix == ".pt" else "folder"


def _trained_id(path: Path, out: Path) -> str:
    """Return "my_model" for its ckpt.pt, "my_model/best" for its best.pt, "my_model/export" for that folder."""
    relative = path.relative_to(out)
    if relative.name == CHECKPOINT:
        return relative.parent.as_posix()
    return relative.with_suffix("").as_posix() if relative.suffix == ".pt" else relative.as_posix()


def local_folder(workspace: Workspace, name: str) -> Path | None:
    """Return the folder of a pretrained model that is on this machine by that name: bundled, or in pretrained_dir."""
    for root in (workspace.models, workspace.pretrained_dir):
        if root is not None and NAME.fullmatch(name) and _is_model_folder(root / name):
            return root / name
    return None


def _is_model_folder(folder: Path) -> bool:
    return not os.path.islink(folder) and _has(folder, "config.json")


def _folders(root: Path | None) -> Iterator[str]:
    if root is None:
        return
    names: list[str] = []
    with contextlib.suppress(OSError):  # what cannot be looked at has no models
        names = sorted(os.listdir(root))
    yield from (name for name in names if NAME.fullmatch(name) and _is_model_folder(root / name))


def pretrained_names(workspace: Workspace) -> list[str]:
    """Return every name that `model_type` may have: the five, the bundled one, registered ones, and local folders."""
    names = [*PRETRAINED, BUNDLED, *(name for name, _ in workspace.registered)]
    return list(dict.fromkeys([*names, *_folders(workspace.models), *_folders(workspace.pretrained_dir)]))
