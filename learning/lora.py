"""LoRA: fine-tuning by low-rank additions to the matrices of attention and MLP (arXiv 2106.09685); the weights stay.

Only the additions get gradients and moments, which is where the memory of training goes; the fixed matrices are held
in the precision in which they compute. In the checkpoint "model" holds nanoGPT's keys with the additions merged in,
so that whatever reads it need not know of them; "lora" holds what the merged weights were made of, so that a resumed
run goes on to the last bit.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import GPT
from training.starting_point import require_thin

ADAPTED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # of each block


class AdaptedLinear(nn.Linear):
    """A linear layer with fixed weights and a product of two thin matrices beside them; at first it adds nothing."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.down = nn.Parameter(torch.empty(rank, self.in_features).uniform_(-1, 1) / math.sqrt(self.in_features))
        self.up = nn.Parameter(torch.zeros(self.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(self.scale * F.linear(x, self.down), self.up)

    def merged(self) -> Tensor:
        """Return the weight (out, in) of a plain layer that does the same."""
        return torch.addmm(self.weight.detach().float(), self.up.detach(), self.down.detach(), alpha=self.scale)


def adapt(model: GPT, rank: int, alpha: float) -> None:
    """Give the matrices of the blocks additions of this rank, the only parameters left to train.

    Raises ConfigError for a rank that the model's width does not exceed.
    """
    require_thin(rank, model.config.n_embd)
    model.requires_grad_(False)
    for block in model.transformer["h"].children():
        for name in ADAPTED:
            parent, _, child = name.partition(".")
            linear = getattr(getattr(block, parent), child)
            setattr(getattr(block, parent), child, AdaptedLinear(linear, rank, alpha))


def hold_fixed(model: GPT, dtype: torch.dtype) -> None:
    """Hold the fixed matrices in the type that autocast would round them to anew for each product."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.weight.data = module.weight.data.to(dtype)


def saved(model: GPT) -> dict[str, Any]:
    """Return the weights as a checkpoint holds them: {"model": …} and, of an adapted model, {"lora": …} beside it."""
    weights: dict[str, Any] = model.state_dict()
    own: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            own |= {f"{name}.{part}": weights.pop(f"{name}.{part}") for part in ("down", "up")}
            own[f"{name}.weight"] = weights[f"{name}.weight"]
            weights[f"{name}.weight"] = module.merged()
    return {"model": weights} | ({"lora": own} if own else {})


def take_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """Take out of a checkpoint's state the weights of the very model that it was saved from, and return them."""
    weights: dict[str, Tensor] = state.pop("model") | state.pop("lora", {})
    return weights
