"""Keys and values of every slot, and attention over them: what `TorchRunner` passes to GPT as its cache.

A step's rows are flat: one batch row (B = 1) with T = N rows of any slots. The linears of the model
so run once over all of them, and only attention looks at who is whose, here. Nothing of the cache is
copied: attention reads views of the part that is in use.

Letters: L layers, S slots, nh heads, P positions, hs head size, N rows of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Run:
    """Neighbouring rows of one slot in a step; they attend to positions 0 to `end` - 1."""

    first: int  # row of the step
    count: int
    slot: int
    end: int
    mask: Tensor | None  # (count, end), where a query may look; None: everywhere, or causal from position 0

    @property
    def causal(self) -> bool:
        """Say whether the run is a whole prompt from position 0, where plain causal attention serves."""
        return self.count > 1 and self.mask is None


def find_runs(slots: Sequence[int], positions: Sequence[int], device: torch.device) -> list[Run]:
    """Split a step's rows into runs of one slot each."""
    runs = []
    first = 0
    for i in range(1, len(slots) + 1):
        if i == len(slots) or slots[i] != slots[first]:
            count, end = i - first, positions[i - 1] + 1
            mask = None
            if 1 < count < end:  # a later piece of a prompt: query j of the run is at position end - count + j
                mask = torch.ones(count, end, dtype=torch.bool, device=device).tril(end - count)
            runs.append(Run(first, count, slots[first], end, mask))
            first = i
    return runs


class KVCache:
    """The cache of one model; satisfies model.Cache once `begin` has said which rows come."""

    def __init__(self, shape: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype):
        """Reserve (L, S, nh, P, hs) twice; on CPU the system gives memory only as positions are used."""
        self.keys, self.values = (_lazy_zeros(shape, device, dtype) for _ in range(2))
        self._slots = self._positions = torch.empty(0, dtype=torch.long)
        self._runs: list[Run] = []
        self._singles: list[Run] = []

    @property
    def nbytes(self) -> int:
        """Return the size of a cache in full use."""
        return self.keys.nbytes + self.values.nbytes

    def begin(self, slots: Sequence[int], positions: Sequence[int]) -> None:
        """Announce a step: row i is at positions[i] of slots[i]."""
        device = self.keys.device
        self._slots = torch.tensor(slots, dtype=torch.long, device=device)
        self._positions = torch.tensor(positions, dtype=torch.long, device=device)
        self._runs = find_runs(slots, positions, device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v, and return the attention of q; all are (1, nh, N, hs)."""
        keys, values = self.keys[layer], self.values[layer]  # (S, nh, P, hs)
        keys[self._slots, :, self._positions] = k[0].transpose(0, 1)
        values[self._slots, :, self._positions] = v[0].transpose(0, 1)
        _, nh, N, hs = q.shape
        y = q.new_empty(1, N, nh, hs)
        for run in self._runs:
            rows = slice(run.first, run.first + run.count)
            y[:, rows] = F.scaled_dot_product_attention(
                q[:, :, rows],
                keys[run.slot, :, : run.end][None],
                values[run.slot, :, : run.end][None],
                attn_mask=run.mask,
                is_causal=run.causal,
            ).transpose(1, 2)
        return y.transpose(1, 2)


def _lazy_zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return zeros whose pages, on CPU, take no memory before they are written (numpy asks calloc, torch fills)."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)
