"""A ModelRunner in plain torch, on any device: the specification of every other runner.

It drives `GPT.hidden` with a KV cache, so that the model's mathematics is written once, in model.py.
A step's rows go through the linears together, whatever sequences they belong to. On CPU their weights
are packed (packed_linear.py). On CUDA, steps that only decode are replayed from graphs (decode_graphs.py).
"""

import hashlib
import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from inference.decode_graphs import DecodeGraphs, Record, return_memory
from inference.kv_cache import KVCache
from inference.native.machine import cpu_flags
from inference.packed_linear import can_pack, fewest_rows, pack
from inference.runner import Begin, check_copy, check_slot
from model import GPT

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _arithmetic(device: str) -> str:
    """Return a short hash of what computes: torch's version, and the GPU's name or the CPU's instructions."""
    instructions = sorted(flag for flag in cpu_flags() if flag.startswith(("avx", "amx")))
    where = [torch.cuda.get_device_name()] if device == "cuda" else instructions
    return hashlib.sha256(" ".join([torch.__version__, device, *where]).encode()).hexdigest()[:6]


class TorchRunner:
    """Run a GPT; it takes the model over and changes it. In fp32 its greedy tokens are those of `GPT.generate`.

    Rows are computed in one matrix product whose rounding depends on how many there are. So in fp32 a
    logit may differ in its last bits with what else runs, and in bf16 in its last digit; a seeded text
    repeats exactly only when the same requests run together.
    """

    name = "torch"
    independent = False
    own_threads = False
    greatest = draw = logprobs = None

    def __init__(self, model: GPT, slots: int, device: str = "cpu", dtype: str = "fp32", record: Record | None = None):
        """`record` makes graphs of decode steps, which take one more slot of the cache; None: every step is launched.

        Raises ValueError for a precision that it does not have.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; the torch runner has {', '.join(DTYPES)}")
        config = model.config
        self.device, self.dtype, self.slots = device, dtype, slots
        self.arithmetic = _arithmetic(device)
        self.block_size, self.vocab_size = config.block_size, config.vocab_size
        model = model.to(device=device, dtype=DTYPES[dtype]).eval().requires_grad_(False)
        self._fewest = 1  # rows that are computed at least
        if device == "cpu" and can_pack(DTYPES[dtype]):
            pack(model, rows=slots)
            self._fewest = fewest_rows()
        self._model: GPT | None = model
        places = slots if record is None else slots + 1
        shape = (config.n_layer, places, config.n_head, config.block_size, config.head_size)
        self._cache: KVCache | None = KVCache(shape, torch.device(device), DTYPES[dtype])
        self.position_bytes = self._cache.position_bytes
        self.last_argmax: list[int] | None = None
        self._begun: tuple[tuple[Sequence[int], ...], Tensor] | None = (
            None  # what begin() was asked for, and its logits
        )
        self._graphs = None if record is None else DecodeGraphs(model, self._cache, slots, record)
        if self._graphs is not None:
            try:
                self._graphs.prepare()
            except RuntimeError:
                logger.exception("decode steps cannot be recorded")
                self._launch_all()

    def _launch_all(self) -> None:
        """Do without graphs from now on."""
        logger.warning("every decode step is launched kernel by kernel from now on, which is slower")
        self._graphs = None

    @torch.inference_mode()
    def rows(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[int]
    ) -> Tensor:
        """Compute one step; see `ModelRunner.rows`."""
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] == (tokens, slots, positions, want):
            return begun[1]
        if self._graphs is not None and self._graphs.fit(slots):
            replayed = self._graphs.rows(tokens, slots, positions, want)
            if replayed is not None:
                return replayed
            self._launch_all()
        model, hidden = self._compute(tokens, slots, positions, want)
        if 0 < len(want) < self._fewest:
            hidden = F.pad(hidden, (0, 0, 0, self._fewest - len(want)))
        logits: Tensor = model.lm_head(hidden)
        return logits[: len(want)].float()

    @property
    def begin(self) -> Begin | None:
        """Launch a step (see `ModelRunner.begin`); on a CPU, where `rows` returns when it is done, there is no use."""
        return None if self._graphs is None else self._begin

    follow = None  # on CUDA the next step is launched when the tokens are known: they come to the host all the same

    def _begin(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        want: Sequence[int],
        plain: bool = False,
    ) -> None:
        """Launch a step, which a device computes while others work here; one that cannot be fails in `rows`."""
        try:
            logits = self.rows(tokens, slots, positions, want)
        except RuntimeError:
            logger.exception("a step of %d rows cannot be begun", len(tokens))
            return
        self._begun = (tokens, slots, positions, want), logits

    @torch.inference_mode()
    def hidden(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[int]
    ) -> Tensor:
        """Compute one step up to the head; see `ModelRunner.hidden`."""
        return self._compute(tokens, slots, positions, want)[1].float()

    def _compute(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[int]
    ) -> tuple[GPT, Tensor]:
        """Return the model and the final hidden states (len(want), C) of the wanted rows."""
        if self._model is None or self._cache is None:
            raise RuntimeError("the runner is closed")
        padding = [0] * (self._fewest - len(tokens))  # rows of no slot, which the cache neither stores nor attends to
        inputs = ([*tokens, *padding], [*positions, *padding], want)
        ids, places, wanted = (torch.tensor(x, dtype=torch.long, device=self.device) for x in inputs)
        self._cache.begin(slots, positions)
        return self._model, self._model.hidden(ids[None], self._cache, places[None])[0][wanted]

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Copy a slot's beginning to another; see `ModelRunner.copy`."""
        if self._cache is None:
            raise RuntimeError("the runner is closed")
        check_copy(self, source, target, length)
        self._cache.copy(source, target, length)

    def release(self, slot: int) -> None:
        """Give a slot's memory back; see `ModelRunner.release`."""
        if self._cache is None:
            raise RuntimeError("the runner is closed")
        check_slot(self, slot)
        self._cache.release(slot)

    def close(self) -> None:
        """Give back weights and cache."""
        self._model = self._cache = self._graphs = None
        return_memory(self.device)
