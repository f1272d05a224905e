"""Write bfloat16 weights in 12 bits without loss, as native/compact.h reads and explains them."""

import torch
from torch import Tensor

PANEL = 32  # rows that lie together
CODES = 16  # high bytes of a panel's weights that have a code; 0 always has, the first
MOST_REST = 0.01  # of a matrix's weights, where twice as many bytes would not be slower


def compact_bytes(width: int) -> int:
    """Return the bytes of a panel of `width` inputs, a multiple of 4."""
    return 64 + width // 4 * 192


def compact(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the panels of bfloat16 weights (rows, width), and what has no code.

    Rows are a multiple of 32 and the width one of 4. Panels are uint8 (rows / 32, compact_bytes(width)). The rest is
    int32 (count, 4): panel, pair of inputs, row in the panel, and the bits of the pair, of which one half is 0; sorted.
    """
    panels, units = len(weights) // PANEL, weights.shape[1] // 4
    bits = weights.contiguous().view(torch.int16).view(panels, 2, 16, units, 2, 2).permute(0, 3, 4, 1, 2, 5)
    bits = bits.reshape(panels, units, 4, 32)  # four vectors of 16 rows by 2 inputs
    high = (bits >> 8 & 255).int()
    of_panel = (high + 256 * torch.arange(panels, dtype=torch.int32).view(-1, 1, 1, 1)).flatten()
    counts = torch.bincount(of_panel, minlength=256 * panels).view(panels, 256)
    counts[:, 0] = bits.numel() + 1  # so that it is the first
    table = counts.topk(CODES, dim=1).indices
    codes = torch.zeros(panels, 256, dtype=torch.uint8)
    codes.scatter_(1, table, torch.arange(CODES, dtype=torch.uint8).expand(panels, -1))
    code = codes.flatten().index_select(0, of_panel).view_as(bits)
    apart = (code == 0) & (high != 0)
    rest = _rest(bits, apart)
    low = bits.masked_fill(apart, 0).to(torch.uint8)
    low, code = (
        part.view(panels, units, 2, 2, 4, 8).transpose(3, 4).reshape(panels, units, 2, 64) for part in (low, code)
    )
    lines = torch.cat([low, code[:, :, :1] | code[:, :, 1:] << 4], 2)
    return torch.cat([table.to(torch.uint8).repeat(1, 4), lines.flatten(1)], 1), rest


def _rest(bits: Tensor, apart: Tensor) -> Tensor:
    panel, unit, vector, lane = apart.nonzero().int().unbind(1)
    pair = (bits[apart].int() & 0xFFFF) << 16 * (lane % 2)
    return torch.stack([panel, 2 * unit + vector // 2, vector % 2 * 16 + lane // 2, pair], 1)
