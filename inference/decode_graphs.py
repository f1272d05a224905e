"""Decode steps in static shapes, so that a GPU replays each as one recorded graph instead of launching its kernels.

A small model's step is a few hundred kernels of a few microseconds; launching them one by one from Python takes
longer than running them. A graph is recorded once for a number of rows and a span of keys, with inputs and logits
in fixed places, and replayed for every step that fits. Rows that pad a step write to a scratch slot. What is not
here: prefill and mixed steps, which `TorchRunner` computes in their own shapes.

Recording is all that needs CUDA. `EagerGraph` runs the same work at every replay, on any device: buckets, padding
and masks are then those of the GPU, and tests compare them with the plain path.

Letters: n rows of a graph, S slots without the scratch slot, nh heads, hs head size, V vocabulary.
"""

import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from inference.kv_cache import KVCache
from model import GPT

logger = logging.getLogger(__name__)

SHORTEST = 128  # span of keys of the first bucket
PASSES = 3  # over the keys of a row that are gathered first: read, written, read again
WARM_UP = 2  # runs before a recording, in which libraries choose kernels and take their workspaces
ONE_AT_A_TIME = threading.Lock()  # CUDA's own limit: a process records one graph at a time


class Graph(Protocol):
    """Work on fixed tensors that can be repeated."""

    def replay(self) -> None:
        """Do the work with what its inputs hold now."""
        ...


Record = Callable[[Callable[[], None]], Graph]  # from work, which may be run several times, to its graph


class EagerGraph:
    """Work that is simply run again."""

    def __init__(self, work: Callable[[], None]):
        self._work = work

    def replay(self) -> None:
        """Do the work; see `Graph.replay`."""
        self._work()


class CudaRecorder:
    """Record work as CUDA graphs, which share one pool of memory since only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # the default stream cannot be recorded

    def __call__(self, work: Callable[[], None]) -> Graph:
        """Run work to warm up and record it; errors are RuntimeErrors of torch."""
        graph = torch.cuda.CUDAGraph()
        with ONE_AT_A_TIME:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    work()
            torch.cuda.current_stream().wait_stream(self._stream)
            # thread_local: another thread may be loading a model, and its allocations must not spoil this
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                work()
        return graph


def recorder(device: str) -> Record | None:
    """Return what records decode steps on a device; None where launching costs too little for it."""
    return CudaRecorder() if torch.device(device).type == "cuda" else None


def return_memory(device: str) -> None:
    """Give a GPU's memory that torch keeps for later back to the system, for other models and programs."""
    if torch.device(device).type == "cuda":
        with ONE_AT_A_TIME:  # freeing would end a recording
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Shape:
    """What a graph is recorded for. In place, row i is slot i, for all slots; else rows are of any slots."""

    rows: int
    span: int  # positions 0 to span - 1 of every slot are read
    in_place: bool


def shape_for(count: int, end: int, slots: int, block_size: int) -> Shape:
    """Return the smallest shape for `count` decoding rows of which none looks past position `end` - 1.

    Rows are powers of two until reading all slots where they lie costs less than gathering those that run.
    Spans are multiples of an eighth to a quarter of themselves, so few exist and little is read in vain.
    """
    rows = 1 << (count - 1).bit_length()
    step = max(SHORTEST, 1 << max(0, end.bit_length() - 3))
    span = min(-(-end // step) * step, block_size)
    return Shape(slots, span, True) if PASSES * rows >= slots else Shape(rows, span, False)


class StaticAttention:
    """Attention of one row for each of several slots, in tensors whose shapes and places never change.

    Satisfies model.Cache. `slots` and `positions` (n,) say where each row's key and value go.
    """

    def __init__(self, cache: KVCache, slots: Tensor, positions: Tensor, shape: Shape):
        self._cache, self._slots, self._positions, self._shape = cache, slots, positions, shape
        later = torch.arange(shape.span, device=positions.device) > positions[:, None]
        mask = torch.zeros(later.shape, dtype=cache.dtype, device=later.device).masked_fill_(later, -math.inf)
        self._mask = mask[:, None, None]  # (n, 1, 1, span): made once, in the form that kernels take

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v, and return the attention of q; all are (1, nh, n, hs)."""
        used = []
        for whole, new in ((self._cache.keys[layer], k), (self._cache.values[layer], v)):
            whole[self._slots, :, self._positions] = new[0].transpose(0, 1).to(whole.dtype)
            span = whole[:, :, : self._shape.span]
            used.append(span[: self._shape.rows] if self._shape.in_place else span.index_select(0, self._slots))
        queries = q[0].transpose(0, 1)[:, :, None].to(used[0].dtype)  # (n, nh, 1, hs)
        out = F.scaled_dot_product_attention(queries, used[0], used[1], attn_mask=self._mask)
        return out[:, :, 0].transpose(0, 1)[None].to(q.dtype)


class DecodeGraphs:
    """The recorded decode steps of one model and its cache, in which slot `slots` is the scratch slot."""

    def __init__(self, model: GPT, cache: KVCache, slots: int, record: Record):
        self._model, self._cache, self._slots, self._record = model, cache, slots, record
        self._block_size = model.config.block_size
        most = 1 << (slots - 1).bit_length()
        self._inputs = torch.zeros(3, most, dtype=torch.long, device=cache.device)  # ids, slots, positions
        self._logits = torch.zeros(most, model.config.vocab_size, device=cache.device)
        self._graphs: dict[Shape, Graph] = {}

    @staticmethod
    def fit(slots: Sequence[int]) -> bool:
        """Say whether a step's rows belong to a slot each."""
        return 0 < len(slots) == len(set(slots))

    @torch.inference_mode()
    def prepare(self) -> None:
        """Record the shortest span for every number of rows, so that the first requests need not wait for it.

        Raises RuntimeError when one cannot be recorded.
        """
        shapes = {shape_for(count, 1, self._slots, self._block_size) for count in range(1, self._slots + 1)}
        for shape in sorted(shapes, key=lambda shape: -shape.rows):  # the others fit into the memory of the largest
            self._put([], [], [], [])
            self._graphs[shape] = self._record(partial(self._work, shape))

    def rows(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[int]
    ) -> Tensor | None:
        """Compute a step for which `fit` holds; see `ModelRunner.rows`. None: its graph cannot be recorded."""
        shape = shape_for(len(slots), max(positions) + 1, self._slots, self._block_size)
        places = slots if shape.in_place else range(len(slots))
        for slot, position in zip(slots, positions, strict=True):
            self._cache.note(slot, position, position + 1)
        self._put(places, tokens, slots, positions)
        if shape not in self._graphs:
            try:
                self._graphs[shape] = self._record(partial(self._work, shape))
            except RuntimeError:
                logger.exception("a decode step of %s cannot be recorded", shape)
                return None
        self._graphs[shape].replay()
        wanted = [places[i] for i in want]
        if wanted == list(range(len(wanted))):  # a view in place of a copy
            return self._logits[: len(wanted)]
        return self._logits[torch.tensor(wanted, dtype=torch.long, device=self._logits.device)]

    def _put(
        self, places: Sequence[int], tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]
    ) -> None:
        """Fill the inputs, in one transfer: rows at their places, elsewhere padding at the scratch slot's start."""
        most = self._inputs.size(1)
        values = [[0] * most, [self._slots] * most, [0] * most]
        for place, *row in zip(places, tokens, slots, positions, strict=True):
            for column, value in zip(values, row, strict=True):
                column[place] = value
        self._inputs.copy_(torch.tensor(values), non_blocking=True)  # pageable memory is read before this returns

    def _work(self, shape: Shape) -> None:
        """Compute the logits of what the inputs hold; twice is as good as once."""
        ids, slots, positions = self._inputs[:, : shape.rows].unbind(0)
        attention = StaticAttention(self._cache, slots, positions, shape)
        hidden = self._model.hidden(ids[None], attention, positions[None])[0]
        self._logits[: shape.rows] = self._model.lm_head(hidden)
