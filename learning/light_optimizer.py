"""Optimizers that do not import torch's compiler: torch's own do so when made, for a second and 70 MB of every run.

They only tell the compiler to leave some methods alone. Here the same methods are taken without that; a run with
`compile` compiles the model, never an optimizer.
"""

import inspect
from typing import Any

import torch


def _plain(method: Any) -> Any:
    """Return a method as it was before torch's decorators."""
    return inspect.unwrap(method)


class LightOptimizer(torch.optim.Optimizer):
    """What an optimizer derives from, first among its bases."""

    add_param_group = _plain(torch.optim.Optimizer.add_param_group)
    load_state_dict = _plain(torch.optim.Optimizer.load_state_dict)
    state_dict = _plain(torch.optim.Optimizer.state_dict)
    zero_grad = _plain(torch.optim.Optimizer.zero_grad)


class AdamW(LightOptimizer, torch.optim.AdamW):
    """torch.optim.AdamW, step for step."""

    step = torch.no_grad()(_plain(torch.optim.AdamW.step))
