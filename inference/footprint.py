"""What a model takes: how many bytes of memory while it serves, its weights and its KV cache, from its shape alone.

The same formula for a model that is about to be loaded and for one that is. Activations, and what reading a file
takes for a moment, are not in it.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from inference.backend import Footprint
from inference.build import RunnerOptions, choose
from inference.native.packing import CACHE_BLOCK, KINDS, matrices, packed_bytes, up_to
from model import GPTConfig
from storage.architecture import count_parameters
from storage.chat_format import is_chat
from storage.errors import StorageError
from storage.hub import fetch
from storage.inspection import inspect
from storage.tokenizer import load

if TYPE_CHECKING:
    from storage.registry import ModelReference
    from storage.runs import Workspace

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def _native_weights(config: GPTConfig, dtype: str, packed: int | None) -> int:
    """Return the bytes of the native runner's weights: matrices as they are packed, all else in fp32."""
    others = count_parameters(asdict(config)) - sum(rows * width for rows, width in matrices(config))
    return 4 * others + (packed_bytes(config, KINDS[dtype][0]) if packed is None else packed)


def memory_bytes(
    config: GPTConfig,
    runner: str,
    device: str,
    dtype: str,
    slots: int,
    cache_memory: int | None = None,
    packed: int | None = None,
) -> int:
    """Return the bytes of weights and cache, of which there are at most `cache_memory`.

    `packed` are those that the matrices of a loaded native model take: only they tell whether bf16 fits into 12 bits,
    as that of trained models does.
    """
    args = asdict(config)
    plain_cpu = runner == "torch" and device == "cpu"  # its cache is fp32 in any precision
    if plain_cpu:
        args["tied"] = False  # the packed head is a copy
    native = runner == "native"
    weights = _native_weights(config, dtype, packed) if native else count_parameters(args) * BYTES[dtype]
    places = slots + 1 if device == "cuda" else slots  # the scratch slot of decode graphs
    positions = places * (up_to(config.block_size, CACHE_BLOCK) if native else config.block_size)
    cache = 2 * config.n_layer * positions * config.n_embd * (4 if plain_cpu or dtype == "fp32" else 2)
    return weights + (cache if cache_memory is None else min(cache, cache_memory))


def _chats(folder: Path, follow: bool) -> bool:
    """Say whether a model was trained to chat: only a tokenizer.json can say that it was."""
    try:
        return is_chat(load(folder / "tokenizer.json", follow))
    except StorageError:
        return False


def measure(reference: "ModelReference", workspace: "Workspace", options: RunnerOptions) -> Footprint:
    """Return what a model would take, from its file's description.

    Raises what inspection raises, ValueError for options that no runner here has, and Unreachable.
    """
    if reference.path is None:
        reference = replace(reference, path=fetch(reference.repository or reference.id, workspace))
    inspection = inspect(reference)
    config = GPTConfig(**inspection.model_args)
    choice = choose(config, options)
    memory = memory_bytes(config, choice.runner, choice.device, choice.dtype, options.slots, options.cache_memory)
    chat = _chats(inspection.folder, reference.kind in ("pretrained", "registered"))
    return Footprint(inspection.parameters, config.block_size, inspection.nbytes, memory, chat)
