"""How several processes share a model: each has a copy (DDP), or each has its rows of every tensor (FSDP2).

With rows, a process has all of a block only while it computes with it, for models that one device cannot hold.
Checkpoints hold whole tensors in either case: everything else reads them as any other, and any number of processes
goes on from them. What gathers tensors here is for all processes at once. Importing what splits tensors takes most
of a second and 45 MB, so it waits for a run that does.
"""

import contextlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from learning import lora
from learning.machine import compiled
from model import GPT
from training.config import TrainConfig


def shard(model: GPT, device: torch.device, processes: int) -> None:
    """Leave this process its rows of the weights, on its device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    for block in model.transformer["h"].children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # also after an evaluation, which no backward follows


def shared(config: TrainConfig, model: GPT, device: torch.device, processes: int) -> nn.Module:
    """Move a model to its device, or this process's share of it, and return what computes its loss.

    The optimizers are to be made after this.
    """
    if config.shard:
        shard(model, device, processes)
        return model
    model.to(device)
    forward = compiled(model) if config.compile else model
    return DistributedDataParallel(forward) if processes > 1 else forward


def exchange(forward: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a step: copies exchange gradients in the last step only, rows in each."""
    if isinstance(forward, DistributedDataParallel) and not last:
        return forward.no_sync()
    return contextlib.nullcontext()


def _is_split(value: Any) -> bool:
    """Say whether a process has only its rows of a tensor, which cannot be before something has split one."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(value, tensors.DTensor)


def _split(value: Tensor, as_of: Tensor) -> Tensor:
    """Return a whole tensor split as another one is; each process takes the rows from its own copy."""
    if not _is_split(as_of):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, as_of.device_mesh, as_of.placements, src_data_rank=None)  # type: ignore[attr-defined]


def _whole(value: Any, keep: bool) -> Any:
    if not _is_split(value):
        return value
    found = value.full_tensor()
    return found.cpu() if keep else None


def saved(model: GPT, keep: bool) -> dict[str, Any]:
    """Return the weights as a checkpoint holds them, those of a split model gathered; a tied head is one tensor still.

    A process that does not `keep` them gets None in their place, and has one at a time in memory.
    """
    found = lora.saved(model)
    weights = found["model"]
    if any(map(_is_split, weights.values())):
        tied = {"lm_head.weight": "transformer.wte.weight"} if model.config.tied else {}
        whole = {name: _whole(value, keep) for name, value in weights.items() if name not in tied}
        found["model"] = whole | {name: whole[same] for name, same in tied.items()}
    return found


def whole_moments(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """Return an optimizer's state with split tensors gathered, None for them in a process that does not `keep` it."""
    state = optimizer.state_dict()
    moments = {i: {name: _whole(value, keep) for name, value in of.items()} for i, of in state["state"].items()}
    return state | {"state": moments}


def take_weights(model: GPT, weights: Mapping[str, Tensor]) -> None:
    """Put whole weights into a model."""
    mine = model.state_dict()
    model.load_state_dict({name: _split(value, mine[name]) for name, value in weights.items()})


def take_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put an optimizer's whole state into it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        i: {name: _split(value, params[i]) if value.shape == params[i].shape else value for name, value in of.items()}
        for i, of in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def finite(parameters: Iterable[Tensor]) -> bool:
    """Say whether all numbers in this process's part of the parameters are finite."""
    parts = (p.to_local() if _is_split(p) else p for p in parameters)  # type: ignore[attr-defined]
    return all(bool(part.isfinite().all()) for part in parts)
