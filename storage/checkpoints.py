"""Checkpoints: saving, proving and loading them, and `load_model`, the one door through which weights come in.

A checkpoint has nanoGPT's keys (model, optimizer, model_args, iter_num, best_val_loss, config) and whatever
else decides the next iteration, as plain numbers, texts, lists, dictionaries and tensors. Beside it lies its
manifest with size and sha256. A file is inspected before anything else. To serve it, only its weights are read,
and nothing is unpickled; to train on, torch.load(weights_only=True) reads all of it.
"""

import errno
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from model import GPT
from storage import tokenizer as tokenizers
from storage.checkpoint_files import damage, keep, keep_previous, sha256_of, write_manifest
from storage.errors import NotFound, NotLoadable, StorageError
from storage.files import NAME, replace_file
from storage.inspection import Inspection, inspect, inspect_checkpoint, plain
from storage.pretrained import (
    GPT2_SIZES,
    FileChanged,
    StoredModel,
    assemble,
    fetch,
    folder_tokenizer,
    read_weights,
    require_vocabulary,
)
from storage.registry import ModelReference
from storage.runs import Run, Workspace
from storage.tokenizer import Tokenizer

ATTEMPTS = 3  # at loading a file that is replaced meanwhile

Report = Callable[[str], None]
Found = TypeVar("Found")


def _ignore(_: str) -> None:
    pass


# ---- saving


class _HashedFile:
    """A file that takes the sha256 of what is written to it, and remembers why writing failed."""

    def __init__(self, f: BinaryIO):
        self._f, self._sha256 = f, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        try:
            return self._f.write(data)
        except OSError as e:
            self.error = e
            raise

    def flush(self) -> None:
        self._f.flush()

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def _known(best_val_loss: float | None) -> float | None:
    """Return the best loss, None for nanoGPT's 1e9, which stands for none yet."""
    return None if best_val_loss is None or best_val_loss >= 1e9 else best_val_loss


def _entry(path: Path, sha256: str, inspection: Inspection) -> dict[str, Any]:
    return {
        "size": path.stat().st_size,
        "sha256": sha256,
        "iter_num": inspection.iter_num,
        "best_val_loss": _known(inspection.best_val_loss),
        "parameters": inspection.parameters,
        "written": time.time(),
    }


def save_checkpoint(path: Path, state: dict[str, Any], kept: bool = False) -> None:
    """Replace the checkpoint at `path` by `state`, proven to be loadable, with its manifest; or change nothing.

    `state` has model, optimizer, model_args, iter_num, best_val_loss, config, activation, tied and more, as
    tensors and plain values only. The checkpoint that was there stays as ckpt.prev.pt, and if it is to be `kept` the
    new one has a second name, ckpt-<iter_num>.pt. The manifest is written
    before the file takes its place and keeps the entries of earlier files, so that at every moment the file in
    place matches an entry. Raises NoSpace, OSError, or NotLoadable when `state` is no checkpoint.
    """
    hashed: list[_HashedFile] = []

    def write(f: BinaryIO) -> None:
        hashed.append(_HashedFile(f))
        try:
            torch.save(state, hashed[0])  # type: ignore[arg-type]
        except RuntimeError as e:  # what torch makes of a full disk
            raise hashed[0].error or e from None

    def prove(temporary: Path) -> None:
        inspection = inspect_checkpoint(temporary, path.name)
        sha256 = sha256_of(temporary)
        if sha256 != hashed[0].hexdigest():
            raise OSError(errno.EIO, f"{path.name} reads back differently from what was written")
        args = {"model_args": state["model_args"], "config": plain(state.get("config"))}
        keep_previous(path)
        write_manifest(path, _entry(temporary, sha256, inspection) | args)

    replace_file(path, write, prove)
    if kept:
        keep(path, state["iter_num"])


# ---- proving


def newest_valid(run: Run, report: Report = _ignore) -> Path:
    """Return the newest checkpoint of the run that is whole: the latest, the one before, one that is kept, the best.

    `report` gets a sentence for each one passed over. Raises NotFound when none is left.
    """
    problems = []
    for path in (run.checkpoint, run.previous, *run.kept(), run.best):
        if not path.exists():
            continue
        try:
            inspect_checkpoint(path, path.name)
            problem = damage(path)
        except StorageError as e:
            problem = str(e)
        if problem is None:
            return path
        report(problem)
        problems.append(problem)
    raise NotFound(f"{run.relative} has no checkpoint" + (" that is whole: " + "; ".join(problems) if problems else ""))


# ---- loading


def _load(path: Path, shown: str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:  # a file that changed since it was inspected raises nearly anything
        raise NotLoadable(f"{shown} is damaged or not a checkpoint: PyTorch refuses it") from e
    return state


def _our_tensors(state: dict[str, Any], inspection: Inspection, shown: str) -> dict[str, Tensor]:
    """Return the weights under our names, prefixes and masks gone."""
    try:
        return {ours: state["model"][theirs] for ours, theirs in inspection.names.items()}
    except (KeyError, TypeError):
        raise NotLoadable(f"{shown} changed while it was read") from None


def load_training_state(path: Path) -> dict[str, Any]:
    """Return everything that a checkpoint holds, tensors mapped from the file; raises NotFound, NotLoadable.

    The weights have the names of GPT.state_dict, whatever the file called them; `activation` and `tied` are there.
    """
    inspection = inspect_checkpoint(path, path.name)
    if (problem := damage(path)) is not None:
        raise NotLoadable(problem)
    state = _load(path, path.name)
    model = _our_tensors(state, inspection, path.name)
    args = inspection.model_args
    if args["tied"]:
        model["lm_head.weight"] = model["transformer.wte.weight"]
    return {**state, "model": model, "activation": args["activation"], "tied": args["tied"]}


def _dataset_tokenizer(inspection: Inspection, workspace: Workspace) -> Tokenizer | None:
    """Return the characters of the dataset that a nanoGPT checkpoint was trained on, if they are its vocabulary."""
    dataset = inspection.config.get("dataset")
    if not isinstance(dataset, str) or not NAME.fullmatch(dataset):
        return None
    found = tokenizers.from_meta(workspace.data / dataset)
    return found if found is not None and found.n_vocab == inspection.model_args["vocab_size"] else None


def _checkpoint_tokenizer(inspection: Inspection, workspace: Workspace, shown: str) -> Tokenizer:
    """Return the tokenizer in the run's folder, else the dataset's characters, else GPT-2's if the size is its."""
    folder, vocab_size = inspection.path.parent, inspection.model_args["vocab_size"]
    found = tokenizers.from_folder(folder)
    if found is None:
        found = tokenizers.from_meta(folder)
    if found is None:
        found = _dataset_tokenizer(inspection, workspace)
    if found is None and vocab_size in GPT2_SIZES:
        found = tokenizers.gpt2(workspace)
    if found is None:
        raise NotLoadable(f"{shown} has no tokenizer: put tokenizer.json or nanoGPT's meta.pkl beside it")
    return require_vocabulary(found, vocab_size, shown)


def _stored_checkpoint(inspection: Inspection, shown: str) -> StoredModel:
    """Return a whole checkpoint's model, the weights still in the file."""
    if (problem := damage(inspection.path)) is not None:
        raise NotLoadable(problem)
    stored = StoredModel(inspection, inspection.model_args, shown)
    if stored.config.tied or not torch.equal(*map(stored.get_parameter, ("lm_head.weight", "transformer.wte.weight"))):
        return stored
    return StoredModel(inspection, {**inspection.model_args, "tied": True}, shown)  # saved twice, unknowingly


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model ready to run, with what belongs to it."""

    model: GPT  # on the CPU, in eval mode, in the file's floating-point type
    tokenizer: Tokenizer
    reference: ModelReference
    iter_num: int | None  # of a checkpoint
    config: dict[str, Any]  # of the training run, {} for folders
    nbytes: int  # of the weights


@dataclass(frozen=True, eq=False)
class Opened:
    """A model about to be served: its weights still in their files."""

    model: StoredModel
    tokenizer: Tokenizer


def _follows(reference: ModelReference) -> bool:
    """Say whether links are followed: a hub's folders consist of them, and the registry file is the operator's."""
    return reference.kind in ("pretrained", "registered")


def _tokenizer_of(inspection: Inspection, reference: ModelReference, workspace: Workspace) -> Tokenizer:
    if inspection.kind == "checkpoint":
        return _checkpoint_tokenizer(inspection, workspace, reference.label)
    vocab_size = inspection.model_args["vocab_size"]
    return folder_tokenizer(inspection.path, vocab_size, reference.label, workspace, _follows(reference))


def _load_once(reference: ModelReference, workspace: Workspace, say: Report) -> Loaded:
    inspection, shown = inspect(reference), reference.label
    say(f"loading {shown}: {inspection.parameters / 1e6:.1f} million parameters")
    tokenizer = _tokenizer_of(inspection, reference, workspace)
    if inspection.kind == "checkpoint":
        model = _stored_checkpoint(inspection, shown).load()
    else:
        follow = _follows(reference)
        model = assemble(inspection.model_args, read_weights(inspection, shown, follow), shown)
    return Loaded(model, tokenizer, reference, inspection.iter_num, inspection.config, inspection.nbytes)


def _open_once(reference: ModelReference, workspace: Workspace, say: Report) -> Opened:
    inspection, shown = inspect(reference), reference.label
    tokenizer = _tokenizer_of(inspection, reference, workspace)
    if inspection.kind == "checkpoint":
        return Opened(_stored_checkpoint(inspection, shown), tokenizer)
    return Opened(StoredModel(inspection, inspection.model_args, shown, _follows(reference)), tokenizer)


def _patiently(
    once: Callable[[ModelReference, Workspace, Report], Found],
    reference: ModelReference,
    workspace: Workspace,
    say: Report,
) -> Found:
    """Return what `once` does with a model on this machine, tried again while its files change."""
    if reference.path is None:
        reference = replace(reference, path=fetch(reference.repository or reference.id, workspace, say))
    for _ in range(ATTEMPTS - 1):
        try:
            return once(reference, workspace, say)
        except FileChanged as e:  # a trainer may just have saved the next one
            say(f"{e}; starting again")
    return once(reference, workspace, say)


def load_model(reference: ModelReference, workspace: Workspace, progress: Report | None = None) -> Loaded:
    """Load the model that `reference` means; `progress` gets a sentence when something takes long.

    Raises NotFound, NotLoadable (one sentence, before any large allocation), Unreachable or NoSpace.
    """
    return _patiently(_load_once, reference, workspace, progress or _ignore)


def open_model(reference: ModelReference, workspace: Workspace) -> Opened:
    """Open the model that `reference` means, to be read weight by weight; raises as `load_model` does."""
    return _patiently(_open_once, reference, workspace, _ignore)
