"""Linear layers with weights packed once, by oneDNN, in the order in which this CPU reads them.

A plain linear on CPU reorders or strides through its weights in every call: 2 to 4 times slower at one
row, 1.5 times at sixteen. Only the layout changes; results differ from plain ones in rounding alone.
"""

import torch
from torch import Tensor, nn

from model import GPT

FUSED = {"gelu": "none", "gelu_new": "tanh"}  # our activations in oneDNN's words


def can_pack() -> bool:
    """Say whether this build of torch and this CPU have the packed product."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        linear = nn.Linear(32, 32).requires_grad_(False)
        x = torch.ones(2, 32)
        return torch.allclose(PackedLinear(linear, 2)(x), linear(x), atol=1e-4)
    except (RuntimeError, AttributeError):  # a build without the operators
        return False


class PackedLinear(nn.Module):
    """y = activation(x W^T + b) for x (..., K), W (N, K); `activation` is one of model.ACTIVATIONS or None."""

    def __init__(self, linear: nn.Linear, rows: int, activation: str | None = None):
        """Pack for calls of about `rows` rows; any number works."""
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.fused = ("none", "") if activation is None else ("gelu", FUSED[activation])

    def forward(self, x: Tensor) -> Tensor:
        kind, algorithm = self.fused
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, kind, [], algorithm)
        return y


def pack(model: GPT, rows: int) -> None:
    """Replace a model's linears by packed ones, layer by layer, so that two copies of few weights exist at once."""
    for block in model.transformer["h"]:
        block.attn.c_attn = PackedLinear(block.attn.c_attn, rows)
        block.attn.c_proj = PackedLinear(block.attn.c_proj, rows)
        block.mlp.c_fc = PackedLinear(block.mlp.c_fc, rows, model.config.activation)
        block.mlp.activation = nn.Identity()  # in c_fc now
        block.mlp.c_proj = PackedLinear(block.mlp.c_proj, rows)
    model.lm_head = PackedLinear(model.lm_head, rows)
