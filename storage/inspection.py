"""Inspection: whether a file or folder holds a model of ours, found out without loading it.

`inspect` reads descriptions only (a pickle's or a safetensors header's), bounds every field of the
configuration, and then demands exactly the tensors of that configuration, each with its shape. So everything
that cannot be a model is refused in one sentence before any large allocation. No torch; the numbers
themselves are read by checkpoints.py and pretrained.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from storage.architecture import BOUNDS, MASKS, Shape, checked_args, count_parameters, require_tensors, some, whole
from storage.errors import NotFound, NotLoadable
from storage.files import Identity, identity, opened, quoted
from storage.huggingface_folder import read_folder
from storage.registry import FOLDER_FILES, ModelReference
from storage.safetensors_file import ITEM_BYTES, StoredTensor
from storage.torch_file import read_torch_file
from storage.torch_pickle import TensorInfo

COMPILED = "_orig_mod."  # torch.compile puts it before every name


@dataclass(frozen=True)
class Inspection:
    """What a loadable model's file or folder holds."""

    kind: Literal["checkpoint", "huggingface"]
    path: Path
    model_args: dict[str, Any]  # every field of GPTConfig
    tensors: dict[str, tuple[str, Shape]]  # our name -> type and shape in the file
    names: dict[str, str]  # our name -> the file's name
    nbytes: int  # of the weights
    parameters: int
    iter_num: int | None = None
    best_val_loss: float | None = None
    config: dict[str, Any] = field(default_factory=dict)  # of the training run, scalars and short lists of them
    places: dict[str, tuple[str, StoredTensor]] = field(default_factory=dict)  # our name -> file, and where in it
    identities: dict[str, Identity] = field(default_factory=dict)  # of each of these files, as it was described

    @property
    def folder(self) -> Path:
        """Return the folder that the files are in."""
        return self.path.parent if self.kind == "checkpoint" else self.path


def _nbytes(tensors: Mapping[str, tuple[str, Shape]]) -> int:
    return sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in tensors.values())


# ---- checkpoints


def _scalar(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, int) or (isinstance(value, str) and len(value) <= 1000)


def _short_list(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) <= 100 and all(map(_scalar, value))


def plain(config: object) -> dict[str, Any]:
    """Return the entries of a configuration that JSON can hold: scalars, and lists of at most 100 of them."""
    kept: dict[str, Any] = {}
    if not isinstance(config, dict) or len(config) > 1000:
        return kept
    for key, value in config.items():
        if isinstance(key, str) and _scalar(value):
            kept[key] = value
        elif isinstance(key, str) and _short_list(value):
            kept[key] = list(value)
    return kept


def _state_tensors(state: object, shown: str) -> dict[str, tuple[str, TensorInfo]]:
    """Return our name -> (the file's name, tensor) of a checkpoint's "model"."""
    if not isinstance(state, dict) or not state:
        raise NotLoadable(f"{shown} holds no weights under the key 'model'")
    tensors: dict[str, tuple[str, TensorInfo]] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, TensorInfo):
            raise NotLoadable(f"{shown} holds {quoted(name)} among its weights, which is no tensor")
        ours = name.removeprefix(COMPILED)
        if ours.endswith(MASKS):
            continue
        if ours in tensors:
            raise NotLoadable(f"{shown} holds {quoted(ours)} twice")
        if not tensor.dense:
            raise NotLoadable(f"{quoted(ours)} in {shown} is a view into a larger tensor; save it with .contiguous()")
        tensors[ours] = (name, tensor)
    return tensors


def _place(tensor: TensorInfo) -> StoredTensor:
    end = tensor.start + math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
    return StoredTensor(tensor.dtype, tensor.shape, tensor.start, end)


def _same_place(a: TensorInfo, b: TensorInfo) -> bool:
    return (a.start, a.shape) == (b.start, b.shape)


def _is_tied(content: Mapping[str, Any], tensors: Mapping[str, tuple[str, TensorInfo]]) -> Any:
    """Say whether the head shares the embedding's weight: as the checkpoint states, else as it is stored."""
    if "tied" in content:
        return content["tied"]
    head, embedding = tensors.get("lm_head.weight"), tensors.get("transformer.wte.weight")
    return head is None or (embedding is not None and _same_place(head[1], embedding[1]))


def inspect_checkpoint(path: Path, shown: str) -> Inspection:
    """Return what a checkpoint file holds; raises NotFound, or NotLoadable in one sentence beginning with `shown`."""
    with opened(path, shown) as f:
        content, file = read_torch_file(f, shown), identity(f.fileno())
    if not isinstance(content, dict) or not isinstance(content.get("model_args"), dict):
        raise NotLoadable(f"{shown} is no checkpoint of nanoGPT or of ours: it has no model_args")
    given = content["model_args"]
    tensors = _state_tensors(content.get("model"), shown) if _looks_like_ours(given, shown) else {}
    stated = {"activation": content.get("activation", "gelu"), "tied": _is_tied(content, tensors)}
    args = checked_args({"bias": True, **given, **stated}, shown)
    if args["tied"]:
        tensors.pop("lm_head.weight", None)
    found = {name: (tensor.dtype, tensor.shape) for name, (_, tensor) in tensors.items()}
    require_tensors(found, args, shown, transposed=False)
    if (nbytes := _nbytes(found)) > file.size:
        raise NotLoadable(f"{shown} describes {nbytes} bytes of weights and has {file.size}")
    iter_num, loss = content.get("iter_num"), content.get("best_val_loss")
    return Inspection(
        kind="checkpoint",
        path=path,
        model_args=args,
        tensors=found,
        names={name: theirs for name, (theirs, _) in tensors.items()},
        nbytes=nbytes,
        parameters=count_parameters(args),
        iter_num=iter_num if type(iter_num) is int else None,
        best_val_loss=loss if isinstance(loss, float) and math.isfinite(loss) else None,
        config=plain(content.get("config")),
        places={name: (path.name, _place(tensor)) for name, (_, tensor) in tensors.items()},
        identities={path.name: file},
    )


def _looks_like_ours(args: Mapping[Any, Any], shown: str) -> bool:
    """Raise NotLoadable, naming fields, for the model_args of another architecture."""
    known = {*BOUNDS, "bias", "dropout"}
    if unknown := args.keys() - known:
        raise NotLoadable(f"{shown} is another architecture: its model_args have {some(map(str, unknown))}")
    for name in BOUNDS:
        whole(args, name, shown)
    return True


# ---- Hugging Face folders


def _huggingface(folder: Path, shown: str, follow: bool) -> Inspection:
    described = read_folder(folder, shown, follow)
    args, stored = described.args, described.tensors
    if args["tied"]:
        stored.pop("lm_head.weight", None)
    found = {ours: (tensor.dtype, tensor.shape) for ours, (_, _, tensor) in stored.items()}
    require_tensors(found, args, shown, transposed=True)
    return Inspection(
        kind="huggingface",
        path=folder,
        model_args=args,
        tensors=found,
        names={ours: name for ours, (_, name, _) in stored.items()},
        nbytes=_nbytes(found),
        parameters=count_parameters(args),
        places={ours: (file, tensor) for ours, (file, _, tensor) in stored.items()},
        identities=described.identities,
    )


def inspect(reference: ModelReference) -> Inspection:
    """Return what the reference's file or folder holds; raises NotFound, or NotLoadable in one sentence."""
    if reference.path is None:
        raise NotFound(f"{reference.label} is not on this machine")
    if reference.path.suffix == ".pt":
        return inspect_checkpoint(reference.path, reference.label)
    label, _, file = reference.label.rpartition("/")
    shown = label if file in FOLDER_FILES else reference.label
    return _huggingface(reference.path, shown, follow=reference.kind in ("pretrained", "registered"))
