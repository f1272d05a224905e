"""Linears of the torch runner on CPU, with weights packed once by oneDNN in the order in which this CPU reads them.

A plain linear reorders or strides through its weights in every call: 2 to 4 times slower at one row, 1.5 times at
sixteen. At few rows reading the weights is all the time a step takes, so their memory is asked for in 2 MiB pages,
which made a step of one row of GPT-2 1.16 times as fast: one entry of the page table covers what 512 did.
What is not here: the products themselves, which are oneDNN's.
"""

import ctypes
import mmap

import torch
from torch import Tensor, nn

from model import GPT

FUSED = {"gelu": "none", "gelu_new": "tanh"}  # our activations in oneDNN's words
HUGE = 2**21  # bytes of a huge page
MADV_COLLAPSE = 25  # Linux 6.1: make huge pages now, of memory that has been written


class PackedLinear(nn.Module):
    """y = activation(x W^T + b) for x (..., K), W (N, K); `activation` is one of model.ACTIVATIONS or None.

    Differs from a plain linear in rounding alone.
    """

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

    def memory(self) -> tuple[int, int]:
        """Return the address and the number of bytes of the packed weight."""
        return torch.ops.mkldnn.data_ptr(self.weight), torch.ops.mkldnn._nbytes(self.weight)


def can_pack(dtype: torch.dtype) -> bool:
    """Say whether this build of torch and this CPU have the packed product in a precision."""
    linear, x = nn.Linear(32, 32).requires_grad_(False).to(dtype), torch.ones(2, 32, dtype=dtype)
    try:
        return torch.allclose(PackedLinear(linear, 2)(x), linear(x), atol=1e-4 if dtype == torch.float32 else 1e-1)
    except (RuntimeError, AttributeError):  # no oneDNN, not these operators, or bf16 on a CPU that does not multiply it
        return False


def fewest_rows() -> int:
    """Return how many rows a step should be padded to.

    With AVX-512 oneDNN takes longer over 1 row than over 3 to 6 (why is unknown): at 4 all products of GPT-2 took 0.86
    of the time in fp32 and 0.93 in bf16. With AVX2 they took 1.09.
    """
    return 4 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 1


def pack(model: GPT, rows: int) -> None:
    """Replace a model's linears by packed ones, one by one, so that few weights exist twice at any time."""
    for block in model.transformer["h"]:  # type: ignore[attr-defined]
        block.attn.c_attn = PackedLinear(block.attn.c_attn, rows)
        block.attn.c_proj = PackedLinear(block.attn.c_proj, rows)
        block.mlp.c_fc = PackedLinear(block.mlp.c_fc, rows, model.config.activation)
        block.mlp.activation = nn.Identity()  # in c_fc now
        block.mlp.c_proj = PackedLinear(block.mlp.c_proj, rows)
    model.lm_head = PackedLinear(model.lm_head, rows)  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, PackedLinear):
            ask_for_huge_pages(*module.memory())


def ask_for_huge_pages(address: int, nbytes: int) -> None:
    """Ask Linux to put memory that is in use into huge pages; less than one, and other systems, stay as they are.

    It is advice: what lies around it may come along, and what cannot be had is done without.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_HUGEPAGE") else None
    if madvise is None or nbytes < HUGE:
        return
    for page in range(address // HUGE * HUGE, address + nbytes, HUGE):  # each alone: some may be beside the mapping
        for advice in (mmap.MADV_HUGEPAGE, MADV_COLLAPSE):
            madvise(ctypes.c_void_p(page), ctypes.c_size_t(HUGE), advice)
