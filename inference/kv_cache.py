"""Keys and values of every slot, and attention over them: what `TorchRunner` passes to GPT as its cache.

A step's rows are flat: one batch row (B = 1) with T = N rows of any slots. The linears of the model
so run once over all of them, and only attention looks at who is whose, here. Nothing of the cache is
copied: attention reads views of the part that is in use.

Letters: L layers, S slots, nh heads, P positions, hs head size, N rows of the step.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

WASTE = 1.6  # decoding rows are attended to together while the padded span stays below this times the needed one


@dataclass(frozen=True)
class Run:
    """Neighbouring rows of one slot in a step; they attend to positions 0 to `end` - 1."""

    first: int  # row of the step
    count: int
    slot: int
    end: int

    @property
    def rows(self) -> slice:
        """Return the rows of the step."""
        return slice(self.first, self.first + self.count)

    def mask(self, device: torch.device) -> Tensor | None:
        """Return where a query may look (count, end); None: at everything, or causally from position 0."""
        if self.count in (1, self.end):
            return None
        return torch.ones(self.count, self.end, dtype=torch.bool, device=device).tril(self.end - self.count)


def find_runs(slots: Sequence[int], positions: Sequence[int]) -> list[Run]:
    """Split a step's rows into runs of one slot each."""
    runs = []
    first = 0
    for i in range(1, len(slots) + 1):
        if i == len(slots) or slots[i] != slots[first]:
            runs.append(Run(first, i - first, slots[first], positions[i - 1] + 1))
            first = i
    return runs


class Together:
    """Single rows of several slots, stored and attended to in one call, over a range of slots and the longest span.

    What lies between (idle slots, positions past a slot's end) is masked out: work wasted, but one launch
    where a GPU would need hundreds. All operations take a layer's keys and values (S, nh, P, hs).
    """

    def __init__(self, runs: list[Run], cache: Tensor):
        """Lay the runs out for a cache (L, S, nh, P, hs)."""
        self.device, (_, _, self.nh, self.P, _) = cache.device, cache.shape
        self.low, self.high = min(r.slot for r in runs), max(r.slot for r in runs) + 1
        self.end = max(r.end for r in runs)
        rows, places = [r.first for r in runs], [r.slot - self.low for r in runs]
        self.in_order = rows == places == list(range(self.high - self.low))  # as the scheduler lays them out
        self.rows, self.places, slots, ends = (
            torch.tensor(x, device=self.device) for x in (rows, places, [r.slot for r in runs], [r.end for r in runs])
        )
        heads = torch.arange(self.nh, device=self.device)
        self.lines = ((slots[:, None] * self.nh + heads) * self.P + ends[:, None] - 1).flatten()  # of (S nh P, hs)
        self.mask: Tensor | None = None
        hidden = torch.zeros(self.high - self.low, self.end, dtype=torch.bool, device=self.device)
        if len(runs) < self.high - self.low or min(r.end for r in runs) < self.end:
            shown = hidden.new_ones(len(hidden), dtype=torch.long)  # idle slots look at one position
            shown[self.places] = ends
            hidden = torch.arange(self.end, device=self.device) >= shown[:, None]
            mask = torch.zeros(hidden.shape, dtype=cache.dtype, device=self.device).masked_fill_(hidden, -math.inf)
            self.mask = mask[:, None, None]  # (slots, 1, 1, end)
        if self.device.type == "cpu":
            self._prepare_sums(hidden)

    def _prepare_sums(self, hidden: Tensor) -> None:
        """Say which lines of the values (S nh P, hs) each slot's heads sum; a hidden position is the first, again."""
        first = torch.arange(self.low * self.nh, self.high * self.nh, dtype=torch.int32).view(-1, self.nh, 1) * self.P
        shown = torch.arange(self.end, dtype=torch.int32).masked_fill(hidden, 0)[:, None]
        self.index = (first + shown).flatten(0, 1)  # (slots nh, end); 32 bits, as it is read in every layer
        self.bias = torch.zeros(1, 1, 1) if self.mask is None else self.mask[:, 0].repeat_interleave(self.nh, 0)

    @staticmethod
    def pays(runs: list[Run]) -> bool:
        """Say whether little is wasted by treating these runs together."""
        slots = [r.slot for r in runs]
        padded = (max(slots) + 1 - min(slots)) * max(r.end for r in runs)
        return padded <= WASTE * sum(r.end for r in runs)

    def store(self, cache: Tensor, new: Tensor) -> None:
        """Write the rows of new (1, nh, N, hs), at least one a run, where they belong."""
        lines = new[0].transpose(0, 1)  # (N, nh, hs)
        lines = lines[: len(self.rows)] if self.in_order else lines[self.rows]
        cache.view(-1, cache.size(-1)).index_copy_(0, self.lines, lines.reshape(len(self.lines), -1).to(cache.dtype))

    def attend(self, y: Tensor, q: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write into y (1, N, nh, hs) the attention of q (1, nh, N, hs)."""
        _, nh, _, hs = q.shape
        slots = self.high - self.low
        if self.in_order:  # views in place of four index operations a layer
            queries = q[0, :, :slots].transpose(0, 1)[:, :, None].to(keys.dtype)
        else:
            queries = keys.new_zeros(slots, nh, 1, hs)
            queries[self.places, :, 0] = q[0].transpose(0, 1)[self.rows].to(keys.dtype)
        if self.device.type == "cpu":
            out = self._sums(queries, keys, values)
        else:
            used = slice(self.low, self.high), slice(None), slice(self.end)
            out = F.scaled_dot_product_attention(queries, keys[used], values[used], attn_mask=self.mask)[:, :, 0]
        if self.in_order:
            y[0, :slots] = out
        else:
            y[0, self.rows] = out[self.places].to(y.dtype)

    def _sums(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention (slots, nh, hs) of queries (slots, nh, 1, hs) on CPU.

        Embedding bags are sums of lines by weight. torch's flash attention multiplies small matrices for one query,
        which took 1.25 times as long as this at 16 slots of 128 positions; hidden values are not even read.
        """
        used = keys[self.low : self.high].flatten(0, 1)[:, : self.end]  # (slots nh, end, hs)
        scores = torch.baddbmm(self.bias, queries.flatten(0, 1), used.mT, alpha=queries.size(-1) ** -0.5)
        weights = scores.softmax(-1)[:, 0]
        lines = values.view(-1, values.size(-1))
        return F.embedding_bag(self.index, lines, per_sample_weights=weights, mode="sum").view(*queries.shape[:2], -1)


class KVCache:
    """The cache of one model; satisfies model.Cache once `begin` has said which rows come.

    On CPU it is always fp32: bf16 attention there takes longer than reading twice the bytes does.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype):
        """Reserve (L, S, nh, P, hs) twice; on CPU the system gives memory only as positions are used."""
        self.dtype = torch.float32 if device.type == "cpu" else dtype
        self.device = device
        self.keys, key_pages = _lazy_zeros(shape, device, self.dtype)
        self.values, value_pages = _lazy_zeros(shape, device, self.dtype)
        self._pages = [(c, p) for c, p in ((self.keys, key_pages), (self.values, value_pages)) if p is not None]
        self.position_bytes = 2 * shape[0] * shape[2] * shape[4] * self.dtype.itemsize
        self._written = [0] * shape[1]  # positions of each slot that hold anything
        self._together: Together | None = None
        self._runs: list[tuple[Run, Tensor | None]] = []

    def begin(self, slots: Sequence[int], positions: Sequence[int]) -> None:
        """Announce a step: row i is at positions[i] of slots[i]."""
        runs = find_runs(slots, positions)
        for run in runs:
            self.note(run.slot, run.end - run.count, run.end)
        single = [r for r in runs if r.count == 1]
        self._together = None
        if len(single) > 1 and (self.device.type != "cpu" or Together.pays(single)):
            self._together = Together(single, self.keys)
            runs = [r for r in runs if r.count > 1]
        self._runs = [(r, r.mask(self.device)) for r in runs]

    def note(self, slot: int, start: int, end: int) -> None:
        """Expect positions `start` to `end` - 1 of a slot to be written now, and forget what it held from there on."""
        self._forget(slot, start)
        self._written[slot] = end

    def _forget(self, slot: int, start: int) -> None:
        """Zero a slot from `start` on: a masked position counts 0 times its value, and may hold no number."""
        if start < self._written[slot]:
            for cache in (self.keys, self.values):
                cache[:, slot, :, start : self._written[slot]].zero_()

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` positions of slot `target` those of slot `source`, and forget its others."""
        if source != target:
            for cache in (self.keys, self.values):
                cache[:, target, :, :length] = cache[:, source, :, :length]
        self._forget(target, length)
        self._written[target] = length

    def release(self, slot: int) -> None:
        """Forget a slot; on CPU its pages go back to the system."""
        self._forget(slot, 0)  # also what shares a page with another slot
        self._written[slot] = 0
        for cache, pages in self._pages:
            for layer in cache[:, slot]:  # each lies in one piece
                _give_back(layer, pages)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v, and return the attention of q; all are (1, nh, N, hs), rows of no slot at the end."""
        keys, values = self.keys[layer], self.values[layer]  # (S, nh, P, hs)
        _, nh, N, hs = q.shape
        y = q.new_zeros(1, N, nh, hs)
        if self._together is not None:
            self._together.store(keys, k)
            self._together.store(values, v)
            self._together.attend(y, q, keys, values)
        for run, mask in self._runs:
            rows = run.rows
            keys[run.slot, :, run.end - run.count : run.end] = k[0, :, rows]
            values[run.slot, :, run.end - run.count : run.end] = v[0, :, rows]
            if run.count == run.end and run.count > 1:  # a prompt from its beginning needs nothing of the cache
                out = F.scaled_dot_product_attention(q[:, :, rows], k[:, :, rows], v[:, :, rows], is_causal=True)
            else:
                used = (slice(run.slot, run.slot + 1), slice(None), slice(run.end))
                query = q[:, :, rows].to(self.dtype)
                out = F.scaled_dot_product_attention(query, keys[used], values[used], attn_mask=mask)
            y[:, rows] = out.transpose(1, 2)
        return y.transpose(1, 2)


def _lazy_zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, mmap.mmap | None]:
    """Return zeros whose pages, on CPU, take no memory before they are written: mapped, where torch would fill them."""
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype), None
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape), pages


def _give_back(part: Tensor, pages: mmap.mmap) -> None:
    """Return the whole pages of a contiguous part of a mapped tensor to the system; they read as zeros."""
    first = part.storage_offset() * part.itemsize
    start, end = -(-first // mmap.PAGESIZE), (first + part.numel() * part.itemsize) // mmap.PAGESIZE
    if start < end and hasattr(mmap, "MADV_REMOVE"):  # the mapping is shared, which MADV_DONTNEED would not free
        pages.madvise(mmap.MADV_REMOVE, start * mmap.PAGESIZE, (end - start) * mmap.PAGESIZE)
