"""Weights in and out: Hugging Face GPT-2 folders to our model and back, and a model built from tensors.

`load_folder` reads config.json, safetensors and the tokenizer; `export` writes such a folder. A StoredModel's weights
stay in their files and are read one by one. What a folder holds is found out and checked by inspection.py first; where
pretrained folders come from is hub.py.
"""

import json
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model import GPT, LAYER_NORM_EPS, GPTConfig
from storage import tokenizer as tokenizers
from storage.architecture import TRANSPOSED
from storage.chat_format import END, TEMPLATE, end_of_turn, is_chat
from storage.errors import NotLoadable
from storage.files import disk_errors_explained, identity, open_descriptor, reading, sync_folder, temporary_beside
from storage.hub import fetch
from storage.inspection import Inspection, inspect
from storage.registry import ModelReference
from storage.runs import Workspace
from storage.safetensors_file import StoredTensor
from storage.tokenizer import Tokenizer

__all__ = [
    "FileChanged",
    "StoredModel",
    "assemble",
    "export",
    "fetch",
    "load_folder",
    "read_weights",
    "require_vocabulary",
]

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PART_BYTES = 8 * 2**20  # of a tensor that is read in parts
GPT2_SIZES = (50257, 50304)  # GPT-2's vocabulary, and nanoGPT's, padded to a multiple of 64


# ---- in


def _is_finite(tensor: Tensor) -> bool:
    """Say whether no element is NaN or infinite; the sum shows it in one pass without a copy, but may overflow."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def assemble(args: Mapping[str, Any], tensors: dict[str, Tensor], shown: str) -> GPT:
    """Return the model of GPTConfig fields `args` with these tensors, not copies, as its weights; in eval mode.

    Keeps the tensors' type, or float32 if they have several. Raises NotLoadable for NaN and infinities.
    """
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise NotLoadable(f"{shown} holds NaN or infinite numbers in {name}")
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    with torch.device("meta"):
        model = GPT(GPTConfig(**args))
    if args["tied"]:
        tensors = {**tensors, "lm_head.weight": tensors["transformer.wte.weight"]}
    model.load_state_dict(tensors, assign=True)
    if args["tied"]:
        model.lm_head.weight = model.get_parameter("transformer.wte.weight")
    return model.eval()


class FileChanged(NotLoadable):
    """Another file took the name, or the file was written over, between inspection and reading."""


def _rows(place: StoredTensor, first: int, count: int) -> StoredTensor:
    """Return where `count` rows of a matrix lie, from row `first` on."""
    row = (place.end - place.start) // max(place.shape[0], 1)
    return replace(
        place,
        shape=(count, *place.shape[1:]),
        start=place.start + first * row,
        end=place.start + (first + count) * row,
    )


def _read_tensor(descriptor: int, place: StoredTensor) -> Tensor | None:
    """Read a tensor's numbers, or return None if the file ends before them.

    Into memory of its own, not mapped: a mapped file that someone truncates later would kill the process.
    """
    tensor = torch.empty(place.shape, dtype=DTYPES[place.dtype])
    buffer = tensor.view(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], place.start + done)
        if count == 0:
            return None
        done += count
    return tensor


def _read_file(inspection: Inspection, file: str, shown: str, follow: bool) -> Iterator[tuple[str, Tensor]]:
    """Give the name and tensor of everything in one file; raises FileChanged unless it is the file inspected."""
    descriptor = open_descriptor(inspection.folder / file, follow=follow)
    try:
        for name, (where, place) in inspection.places.items():
            if where != file:
                continue
            with reading(shown):
                tensor = _read_tensor(descriptor, place)
            if tensor is None or identity(descriptor) != inspection.identities[file]:
                raise FileChanged(f"{shown} changed while it was read")
            yield name, tensor
    finally:
        os.close(descriptor)


def read_weights(inspection: Inspection, shown: str, follow: bool = False) -> dict[str, Tensor]:
    """Return the tensors that were inspected, in our layout; at most one of them is in memory twice.

    Nothing is unpickled. Raises FileChanged if it is no longer the file that was inspected.
    """
    turned = TRANSPOSED if inspection.kind == "huggingface" else ()
    return {
        name: tensor.t().contiguous() if name.endswith(turned) else tensor
        for file in inspection.identities
        for name, tensor in _read_file(inspection, file, shown, follow)
    }


class StoredModel:
    """A model whose weights stay in its files: each is read anew when it is asked for, and no other need be in memory.

    Answers as GPT does to `config`, `get_parameter`, `named_parameters` and `parts`, with tensors in the file's
    type; `load` gives the GPT. Reading raises FileChanged if a file was written over since it was inspected; one that
    another took the name of stays open and readable until this is freed.
    """

    def __init__(self, inspection: Inspection, args: Mapping[str, Any], shown: str, follow: bool = False):
        """Open the files; `args` are GPTConfig's fields. Raises FileChanged."""
        self.config = GPTConfig(**args)
        self._inspection, self._args, self._shown = inspection, dict(args), shown
        self._files: dict[str, int] = {}
        weakref.finalize(self, _close, self._files)
        for file in inspection.identities:
            self._files[file] = open_descriptor(inspection.folder / file, follow=follow)
            self._check(file)
        with torch.device("meta"):
            self.names = [name for name, _ in GPT(self.config).named_parameters()]

    def _check(self, file: str) -> None:
        if identity(self._files[file]) != self._inspection.identities[file]:
            raise FileChanged(f"{self._shown} changed while it was read")

    def get_parameter(self, name: str) -> Tensor:
        """Return the tensor of one of our names, in our layout."""
        file, place = self._inspection.places[name]
        tensor = self._read(file, place)
        turned = self._inspection.kind == "huggingface" and name.endswith(TRANSPOSED)
        return tensor.t().contiguous() if turned else tensor

    def parts(self, name: str) -> Iterator[Tensor]:
        """Give a parameter's rows in order, in parts of a multiple of 32 rows; one that is turned comes whole."""
        file, place = self._inspection.places[name]
        if self._inspection.kind == "huggingface" and name.endswith(TRANSPOSED):
            yield self.get_parameter(name)
            return
        rows = place.shape[0]
        step = max(PART_BYTES * rows // max(place.end - place.start, 1) // 32, 1) * 32
        for first in range(0, rows, step):
            yield self._read(file, _rows(place, first, min(step, rows - first)))

    def _read(self, file: str, place: StoredTensor) -> Tensor:
        with reading(self._shown):
            tensor = _read_tensor(self._files[file], place)
        self._check(file)
        if tensor is None:
            raise FileChanged(f"{self._shown} changed while it was read")
        return tensor

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Give names and tensors in GPT's order; a tied head is not among them."""
        for name in self.names:
            yield name, self.get_parameter(name)

    def load(self) -> GPT:
        """Return the model with all of its weights in memory; see `assemble`."""
        return assemble(self._args, dict(self.named_parameters()), self._shown)


def _close(files: dict[str, int]) -> None:
    for descriptor in files.values():
        os.close(descriptor)


def require_vocabulary(tokenizer: Tokenizer, vocab_size: int, shown: str) -> Tokenizer:
    """Return `tokenizer` if every id it gives is one of the model's; more ids in the model are padding."""
    if tokenizer.n_vocab > vocab_size:
        raise NotLoadable(
            f"the tokenizer of {shown} has {tokenizer.n_vocab} tokens and the model only {vocab_size}: not a pair"
        )
    return tokenizer


def folder_tokenizer(
    folder: Path, vocab_size: int, shown: str, workspace: Workspace | None, follow: bool = False
) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder; GPT-2's own if there is none and the size is GPT-2's."""
    found = tokenizers.from_folder(folder, follow)
    if found is None and vocab_size in GPT2_SIZES:
        found = tokenizers.gpt2(workspace)
    if found is None:
        raise NotLoadable(f"{shown} has no tokenizer: put its tokenizer.json into the folder")
    return require_vocabulary(found, vocab_size, shown)


def load_folder(path: Path, workspace: Workspace | None = None) -> tuple[GPT, Tokenizer]:
    """Return model and tokenizer of a Hugging Face GPT-2 folder; raises NotLoadable in one sentence."""
    inspection = inspect(ModelReference(path.name, "folder", path, path.name))
    tokenizer = folder_tokenizer(path, inspection.model_args["vocab_size"], path.name, workspace)
    return assemble(inspection.model_args, read_weights(inspection, path.name), path.name), tokenizer


# ---- out


def _special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Return the ids by which transformers knows where a text ends: <|endoftext|>, or the end of a chat's turn."""
    end = end_of_turn(tokenizer) if is_chat(tokenizer) else tokenizer.eot
    return {"bos_token_id": tokenizer.eot, "eos_token_id": end}


def _config_json(config: GPTConfig, special: Mapping[str, int | None], dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": config.activation,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": config.tied,
        "use_cache": True,
        **special,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _tokenizer_config(tokenizer: Tokenizer, block_size: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,  # transformers' default rewrites " ," to ","
    }
    if tokenizer.eot is not None:
        text = tokenizer.decode([tokenizer.eot])
        config.update(bos_token=text, eos_token=text, unk_token=text)
    if is_chat(tokenizer):
        config.update(eos_token=END, chat_template=TEMPLATE)
    return config


def _exported_tensors(model: GPT, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return contiguous tensors under transformers' names and in its layout; a model without biases gets zeros."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():  # a tied head is not among them
        tensor = parameter.detach().to("cpu", dtype)
        tensors[name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor.contiguous()
        is_embedding = name in ("transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight")
        if not model.config.bias and not is_embedding:
            tensors[name.removesuffix("weight") + "bias"] = torch.zeros(parameter.size(0), dtype=dtype)
    return tensors


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="ascii")


def _write_folder(folder: Path, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    special = _special_ids(tokenizer)
    _write_json(folder / "config.json", _config_json(model.config, special, dtype))
    _write_json(folder / "generation_config.json", special | {"pad_token_id": special["eos_token_id"]})
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, model.config.block_size))
    _write_json(folder / "tokenizer.json", tokenizer.to_json())
    save_file(_exported_tensors(model, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors makes it its owner's alone
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_folder(folder)


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`; one that was there is moved aside first and removed last."""
    aside = temporary_beside(temporary.parent / folder.name)
    if os.path.lexists(folder):
        os.rename(folder, aside)
    try:
        os.rename(temporary, folder)
    except OSError:
        if os.path.lexists(aside):
            os.rename(aside, folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def export(
    model: GPT, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype = torch.float32, work: Path | None = None
) -> None:
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer load with no other file.

    `dtype` is float32, float16 or bfloat16. The folder appears whole, replacing one that was there, or not at all;
    until then it is in `work`, a folder on the same disk, by default the one that it will be in.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype}; it must be float32, float16 or bfloat16")
    temporary = temporary_beside((work or folder.parent) / folder.name)
    with disk_errors_explained(f"{folder.parent.name}/{folder.name}"):
        temporary.mkdir(parents=True)
        try:
            _write_folder(temporary, model, tokenizer, dtype)
            inspect(ModelReference(folder.name, "folder", temporary, folder.name))
            _put_in_place(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
