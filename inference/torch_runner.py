"""A ModelRunner in plain torch, on any device: the specification of every other runner.

It drives `GPT.hidden` with a KV cache, so that the model's mathematics is written once, in model.py.
A step's rows go through the linears together, whatever sequences they belong to.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from inference.kv_cache import KVCache
from inference.packed_linear import can_pack, pack
from model import GPT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TorchRunner:
    """Run a GPT; it takes the model over and changes it. In fp32 its greedy tokens are those of `GPT.generate`.

    Rows are computed in one matrix product whose rounding depends on how many there are. So in fp32 a
    logit may differ in its last bits with what else runs, and in bf16 in its last digit; a seeded text
    repeats exactly only when the same requests run together.
    """

    name = "torch"

    def __init__(self, model: GPT, slots: int, device: str = "cpu", dtype: str = "fp32"):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; the torch runner has {', '.join(DTYPES)}")
        config = model.config
        self.device, self.dtype, self.slots = device, dtype, slots
        self.block_size, self.vocab_size = config.block_size, config.vocab_size
        model = model.to(device=device, dtype=DTYPES[dtype]).eval().requires_grad_(False)
        if device == "cpu" and can_pack():
            pack(model, rows=slots)
        self._model: GPT | None = model
        shape = (config.n_layer, slots, config.n_head, config.block_size, config.head_size)
        self._cache: KVCache | None = KVCache(shape, torch.device(device), DTYPES[dtype])

    @torch.inference_mode()
    def rows(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[int]
    ) -> Tensor:
        """Compute one step; see `ModelRunner.rows`."""
        if self._model is None or self._cache is None:
            raise RuntimeError("the runner is closed")
        ids, places, wanted = (torch.tensor(x, dtype=torch.long, device=self.device) for x in (tokens, positions, want))
        self._cache.begin(slots, positions)
        hidden = self._model.hidden(ids[None], self._cache, places[None])[0]  # (N, C)
        logits: Tensor = self._model.lm_head(hidden[wanted])
        return logits.float()

    def close(self) -> None:
        """Give back weights and cache."""
        self._model = self._cache = None
