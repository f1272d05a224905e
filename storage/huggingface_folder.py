"""A Hugging Face GPT-2 folder, described: config.json as GPTConfig's fields, and where each tensor lies.

Names are ours (transformer.h.0...) whether or not the files have the prefix. What GPT-2's configuration can
express and model.py cannot compute is refused by the name of the field. No torch, and no numbers are read;
pretrained.py does that.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.architecture import MASKS, checked_args, some
from storage.errors import NotFound, NotLoadable
from storage.files import NAME, Identity, identity, opened, parse_json, quoted, read_bytes
from storage.safetensors_file import StoredTensor, read_header

MAX_SHARDS = 1000
_GPT2_DEFAULTS = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257}  # what the config may leave out
_REQUIRED = {  # field -> (the value it must have, which is also the one it has when left out)
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "layer_norm_epsilon": 1e-5,
}
_ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")


def _huggingface_args(config: Any, shown: str) -> dict[str, Any]:
    """Return GPTConfig's fields from a config.json; NotLoadable names the field that makes it another model."""
    if not isinstance(config, dict):
        raise NotLoadable(f"config.json of {shown} is no JSON object")
    if config.get("model_type") != "gpt2":
        raise NotLoadable(f"{shown} is not a GPT-2: its model_type is {quoted(config.get('model_type'))}")
    architectures = config.get("architectures") or [_ARCHITECTURES[0]]
    if not isinstance(architectures, list) or architectures[0] not in _ARCHITECTURES:
        raise NotLoadable(f"architectures of {shown} is {quoted(architectures)}; it must be {_ARCHITECTURES[0]}")
    for name, value in _REQUIRED.items():
        if type(config.get(name, value)) is not type(value) or config.get(name, value) != value:
            raise NotLoadable(f"{name} of {shown} is {quoted(config[name])}; only {quoted(value)} is supported")
    context = {"block_size": config.get("n_positions", config.get("n_ctx", 1024))}
    args = {**_GPT2_DEFAULTS, **{name: config[name] for name in _GPT2_DEFAULTS if name in config}, **context}
    activation = config.get("activation_function", "gelu_new")
    stated = {"bias": True, "tied": config.get("tie_word_embeddings", True), "activation": activation}
    checked = checked_args({**args, **stated, "dropout": config.get("resid_pdrop", 0.1)}, shown)
    if config.get("n_inner") not in (None, 4 * checked["n_embd"]):
        raise NotLoadable(f"n_inner of {shown} is {quoted(config['n_inner'])}; only 4 * n_embd is supported")
    return checked


def _shards(folder: Path, shown: str, follow: bool) -> dict[str, list[str]]:
    """Return each safetensors file of the folder and the tensors that the index says it has (none without an index)."""
    try:
        data = read_bytes(folder / "model.safetensors.index.json", 4 * 2**20, follow)
    except NotFound:
        return {"model.safetensors": []}
    index = parse_json(data, f"model.safetensors.index.json of {shown}")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise NotLoadable(f"model.safetensors.index.json of {shown} has no weight_map")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not NAME.fullmatch(file) or not file.endswith(".safetensors"):
            raise NotLoadable(f"model.safetensors.index.json of {shown} names the file {quoted(file)}")
        shards.setdefault(file, []).append(name)
    if len(shards) > MAX_SHARDS:
        raise NotLoadable(f"{shown} has {len(shards)} files; at most {MAX_SHARDS} are read")
    return shards


def _our_name(name: str) -> str:
    return name if name.startswith(("transformer.", "lm_head.")) else "transformer." + name


@dataclass(frozen=True)
class Folder:
    """What a folder describes."""

    args: dict[str, Any]  # GPTConfig's fields
    tensors: dict[str, tuple[str, str, StoredTensor]]  # our name -> file, the file's name, place
    identities: dict[str, Identity]  # of each file that was described


def _add_tensors(found: Folder, file: str, tensors: dict[str, StoredTensor], shown: str) -> None:
    """Add a file's tensors under our names, masks left out."""
    for name, tensor in tensors.items():
        ours = _our_name(name)
        if ours.endswith(MASKS):
            continue
        if ours in found.tensors:
            raise NotLoadable(f"{shown} holds {quoted(ours)} twice")
        found.tensors[ours] = file, name, tensor


def _describe_files(found: Folder, folder: Path, shown: str, follow: bool) -> None:
    for file, names in _shards(folder, shown, follow).items():
        with opened(folder / file, f"{shown}/{file}", follow) as f:
            tensors = read_header(f, f"{shown}/{file}")
            found.identities[file] = identity(f.fileno())
        if lacking := set(names) - tensors.keys():
            raise NotLoadable(f"{shown}/{file} lacks {some(lacking)}, which the index says it has")
        _add_tensors(found, file, tensors, shown)


def _folder_problem(folder: Path, shown: str) -> NotLoadable | None:
    """Return the refusal for a folder whose weights have another format."""
    present = {name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if (folder / name).exists()}
    if present:
        return NotLoadable(f"{shown} has its weights only as a pickle ({min(present)}); convert it to safetensors")
    return None


def read_folder(folder: Path, shown: str, follow: bool = False) -> Folder:
    """Return what a Hugging Face GPT-2 folder describes; raises NotLoadable.

    Links are followed only if `follow`: the Hugging Face cache is made of links.
    """
    try:
        config = parse_json(read_bytes(folder / "config.json", 2**20, follow), f"config.json of {shown}")
    except NotFound:
        raise NotLoadable(f"{shown} has no config.json") from None
    found = Folder(_huggingface_args(config, shown), {}, {})
    try:
        _describe_files(found, folder, shown, follow)
    except NotFound as e:
        raise _folder_problem(folder, shown) or NotLoadable(f"{e}: the folder is not complete") from None
    return found
