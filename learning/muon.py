"""Muon: momentum whose every matrix is made nearly orthogonal before the weights move along it.

After Keller Jordan's Muon, with the step scaled to the size of AdamW's (arXiv 2502.16982). It differs from
torch.optim.Muon in how it computes: matrices of one size go through the iteration together, and the queries, keys
and values that one tensor holds are three matrices. A small model spends a third of the time, not most of it.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from learning.light_optimizer import LightOptimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic of the Newton-Schulz iteration, steepest at zero
STEPS = 4  # of the iteration; singular values end between about 0.7 and 1.2, but for the least hundredth of them
RMS = 0.2  # root mean square of a step at learning rate 1, as AdamW's usually is


def orthogonalized(x: Tensor) -> Tensor:
    """Return matrices (n, rows, columns), no more rows than columns, with singular values brought near 1, in bf16."""
    a, b, c = COEFFICIENTS
    x = x.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def matrices(x: Tensor) -> list[Tensor]:
    """Return views of the matrices that a weight holds, each lying down: a weight (3 C, C) is q, k and v."""
    parts = x.chunk(3) if x.size(0) == 3 * x.size(1) else (x,)
    return [part if part.size(0) <= part.size(1) else part.mT for part in parts]


class Muon(LightOptimizer):
    """The optimizer for weights of two dimensions; `momentum` is Nesterov's."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.9):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move the weights that have gradients."""
        for group in self.param_groups:
            moves: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)  # weight and direction, by size
            for p in (p for p in group["params"] if p.grad is not None):
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                ahead = p.grad.lerp(momentum, group["momentum"])
                for weight, direction in zip(matrices(p), matrices(ahead), strict=True):
                    moves[weight.shape].append((weight, direction))
            for shape, pairs in moves.items():
                rate = group["lr"] * RMS * math.sqrt(max(shape))
                directions = orthogonalized(torch.stack([direction for _, direction in pairs]))
                for (weight, _), direction in zip(pairs, directions, strict=True):
                    weight.add_(direction, alpha=-rate)
