"""The model on CPUs with AVX-512: packs a GPT's weights once and runs native/step.h on them through ctypes.

Satisfies runner.ModelRunner. Rows do not depend on each other: a row's logits are the same bit for bit alone, in any
step, prefilled in one piece or token by token, on any number of threads. What each dtype does:
fp32: everything in float32. bf16: weights and the activations they meet in bfloat16, sums in float32, cache in
half precision; the weights are kept in 12 bits without loss (native/compact.py). int8: weights in 8 bits with a scale
per row, activations in 8 bits with a scale per row of the step and far values apart (activations.h), cache in half
precision.
"""

import ctypes
import weakref
from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.native.build import CannotBuild, library
from inference.native.machine import available_cores
from inference.native.packing import CACHE_BLOCK, KINDS, Arena, Layer, Model, Weights, pack, up_to
from inference.penalties import Penalties
from inference.runner import Begin, Follow, Greatest, Knobs, Scored, check_copy, check_slot
from inference.speculation import ROWS
from model import GPTConfig

VERSION = 13  # as in step.cpp
GREATEST_WIDTH = 16384  # beyond it int8 sums could leave 32 bits

_P, _L = ctypes.c_void_p, ctypes.c_long


def _load() -> ctypes.CDLL:
    """Return the library, compiled if need be. Raises CannotBuild. CDLL and not PyDLL: a step runs without the GIL."""
    path = library()
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as e:
        raise CannotBuild(f"the compiled library does not load: {e}") from e
    lib.step_agrees.argtypes, lib.step_agrees.restype = [_L, _L], ctypes.c_bool
    lib.step_open.argtypes, lib.step_open.restype = [ctypes.POINTER(Model)], _P
    lib.step_close.argtypes, lib.step_close.restype = [_P], None
    lib.step_rows.argtypes, lib.step_rows.restype = [_P, _L, _P, _P, _P, _L, *[_P] * 4, ctypes.c_bool], _L
    lib.step_begin.argtypes, lib.step_begin.restype = [_P, _L, _P, _P, _P, _L, *[_P] * 2, ctypes.c_bool], _L
    lib.step_follow.argtypes, lib.step_follow.restype = [_P, _L, _P, _P, _P, _L], ctypes.c_bool
    lib.step_join.argtypes, lib.step_join.restype = [_P, _L, _P], None
    lib.step_settle.argtypes, lib.step_settle.restype = [_P, ctypes.c_bool], None
    lib.step_draw.argtypes, lib.step_draw.restype = [_P, _L, _P, _L, _L, *[_P] * 4], ctypes.c_bool
    lib.step_logprobs.argtypes, lib.step_logprobs.restype = [_P, _L, _P, _L, _L, *[_P] * 3, _L, *[_P] * 3], None
    if not lib.step_agrees(VERSION, ctypes.sizeof(Model)):
        raise CannotBuild(f"{path} has another version of the interface")
    return lib


class NativeRunner:
    """A model in the native step: packed weights, cache and threads of its own. Several may live in one process."""

    name = "native"
    device = "cpu"
    independent = True
    own_threads = True

    def __init__(self, model: Weights, slots: int, dtype: str, threads: int | None = None):
        """Pack `model`, which may be freed afterwards. `threads` None is every core that is ours.

        Raises ValueError for a model that `unsupported` refuses, or with weights that are not finite; CannotBuild;
        MemoryError.
        """
        if (reason := self.unsupported(model.config, dtype)) is not None:
            raise ValueError(reason)
        if slots < 1:
            raise ValueError(f"slots is {slots}; it must be at least 1")
        config = model.config
        self.dtype, self.slots = dtype, slots
        self.block_size, self.vocab_size, self._n_embd = config.block_size, config.vocab_size, config.n_embd
        self.threads = max(1, available_cores() if threads is None else threads)
        self.last_argmax: list[int] | None = []
        native = Model(config.n_layer, config.n_head, config.n_embd, config.vocab_size, config.block_size, slots)
        native.gelu_new, native.threads = config.activation == "gelu_new", self.threads
        native.layer = (Layer * config.n_layer)()
        packer = pack(model, dtype, native)
        self._screens = bool(native.screen.head.weights)
        span, element = up_to(config.block_size, CACHE_BLOCK), 4 if dtype == "fp32" else 2
        self._block_bytes = 2 * config.n_layer * config.n_embd * CACHE_BLOCK * element
        self.position_bytes = self._block_bytes // CACHE_BLOCK
        self._slot_bytes = span // CACHE_BLOCK * self._block_bytes
        cache = Arena(slots * self._slot_bytes, huge=True)
        self._arena: Arena | None = cache
        native.cache = self._cache = cache.take((1,), torch.uint8).data_ptr()
        self.packed_bytes = packer.nbytes
        self._width = native.head.rows  # of a row of logits, with padding
        self._logits = torch.empty(max(slots, ROWS), self._width)  # kept: fresh memory would cost its first touch
        self._best = array("q", bytes(8 * len(self._logits)))
        self._begun: tuple[Sequence[int] | bool, ...] | None = None  # what begin() was asked for
        self._lib = _load()
        self.arithmetic = Path(self._lib._name).stem[-6:]  # a hash of sources, compiler and instructions
        step = self._lib.step_open(ctypes.byref(native))
        if step is None:
            raise MemoryError("no memory or threads for the native step")
        self._step: int | None = step
        kept = [packer, cache, native, self._logits, self._best]
        self._close = weakref.finalize(self, _release, self._lib.step_close, step, kept)

    @staticmethod
    def unsupported(config: GPTConfig, dtype: str) -> str | None:
        """Return why this machine or model cannot use the native step, or None. Compiles it if need be."""
        if dtype not in KINDS:
            return f"dtype is {dtype!r}; the native step has {', '.join(KINDS)}"
        if config.head_size % 16:
            return f"the head size {config.head_size} is not a multiple of 16"
        if config.n_embd > GREATEST_WIDTH:
            return f"n_embd {config.n_embd} is above {GREATEST_WIDTH}"
        try:
            _load()
        except CannotBuild as e:
            return str(e)
        return None

    def rows(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[int]
    ) -> Tensor:
        """Compute one step (see ModelRunner.rows). Raises ValueError for a row or a wanted row out of bounds."""
        return self._compute(tokens, slots, positions, want, False)

    @property
    def greatest(self) -> Greatest | None:
        """Say where the greatest logits are without computing all (see ModelRunner.greatest); None without a screen."""
        return self._greatest if self._screens else None

    def _greatest(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[int]
    ) -> list[int]:
        self._compute(tokens, slots, positions, want, True)
        return self.last_argmax or []

    def _compute(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        want: Sequence[int],
        plain: bool,
    ) -> Tensor:
        """Compute one step; of a `plain` one the logits may be anything."""
        if self._begun == (tokens, slots, positions, want, plain):
            self._require_open()
            self._lib.step_join(self._step, len(want), _address(self._best))
            self._begun = None
            self.last_argmax = self._best[: len(want)].tolist()
            return self._logits[: len(want), : self.vocab_size]
        order = sorted(set(want))
        few = len(order) <= len(self._logits)
        logits = self._logits[: len(order)] if few else torch.empty(len(order), self._width)
        best = array("q", order)
        self._begun = None
        to = (logits.data_ptr(), _address(best), None, plain)
        self._call(self._lib.step_rows, tokens, slots, positions, order, to)
        if list(want) != order:  # each row once and rising is what the step knows
            where = [order.index(row) for row in want]
            logits, best = logits[where], array("q", [best[i] for i in where])
        self.last_argmax = best.tolist()
        return logits[:, : self.vocab_size]

    @property
    def begin(self) -> Begin | None:
        """Begin a step on the other threads (see ModelRunner.begin); with one thread there is no other."""
        return self._begin if self.threads > 1 else None

    def _begin(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        want: Sequence[int],
        plain: bool = False,
    ) -> None:
        """Begin a step that fits the buffers, which those of decode and short prompts do; leave others to `rows`."""
        if len(want) > len(self._logits) or list(want) != sorted(set(want)):
            return
        self._begun = None
        if self._call(self._lib.step_begin, tokens, slots, positions, want, (self._logits.data_ptr(), plain)):
            self._begun = (tokens, slots, positions, want, plain)

    @property
    def follow(self) -> Follow | None:
        """Say what follows the step that was begun (see ModelRunner.follow)."""
        return self._follow if self.threads > 1 else None

    def _follow(self, after: Sequence[int], slots: Sequence[int], positions: Sequence[int], below: int) -> bool:
        if self._begun is None:
            return False
        arrays = [array("q", part) for part in (after, slots, positions)]
        return bool(self._lib.step_follow(self._step, len(after), *map(_address, arrays), below))

    def _require_open(self) -> None:
        """Raise ValueError once closed."""
        if self._step is None:
            raise ValueError("the runner is closed")

    def _settle(self) -> None:
        """Have what was begun computed to its end; what only followed is dropped. Raises ValueError once closed."""
        self._require_open()
        self._lib.step_settle(self._step, self._begun is None)

    def hidden(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[int]
    ) -> Tensor:
        """Compute one step up to the head (see ModelRunner.hidden). Raises ValueError as `rows` does."""
        order = sorted(set(want))
        hidden = torch.empty(len(order), self._n_embd)
        self._begun = None
        self._call(self._lib.step_rows, tokens, slots, positions, order, (None, None, hidden.data_ptr(), False))
        return hidden if list(want) == order else hidden[[order.index(row) for row in want]]

    def draw(
        self, logits: Tensor, rows: Sequence[int], knobs: Sequence[Knobs], penalties: Sequence[Penalties | None]
    ) -> list[int]:
        """Return a token for each of the rows of logits (see ModelRunner.draw)."""
        self._check(logits, rows, knobs, penalties)
        at, numbers, chosen = array("q", rows), array("d", chain.from_iterable(knobs)), array("q", bytes(8 * len(rows)))
        lie = array("q", chain.from_iterable(map(_lie_of, penalties)))
        apart = len(logits) == 1 or logits.stride(0) >= logits.size(1)
        if any(lie) and not (apart and len(set(rows)) == len(rows)):
            raise ValueError(f"rows are {list(rows)}; with penalties, which change a row for a while, each comes once")
        to = (_address(numbers), _address(lie), _address(chosen))
        if not self._lib.step_draw(self._step, *_lie(logits, at), *to):
            raise ValueError(f"a penalty is for a token id that is not among the {logits.size(1)} of a row")
        return chosen.tolist()

    def logprobs(self, logits: Tensor, rows: Sequence[int], ids: Sequence[int], tops: Sequence[int]) -> list[Scored]:
        """Return the log-probabilities in each of the rows of logits (see ModelRunner.logprobs)."""
        self._check(logits, rows, ids, tops)
        count, most = len(rows), max(tops, default=0)
        if count and not (0 <= min(ids) and max(ids) < logits.size(1) and 0 <= min(tops) and most <= logits.size(1)):
            raise ValueError(f"ids are {list(ids)} and tops {list(tops)}; a row has {logits.size(1)} logits")
        at, given, tells = array("q", rows), array("q", ids), array("q", tops)
        own, values, places = array("d", bytes(8 * count)), *(array(c, bytes(8 * count * most)) for c in "dq")
        to = (_address(given), _address(tells), most, _address(own), _address(values), _address(places))
        self._lib.step_logprobs(self._step, *_lie(logits, at), *to)
        pairs = tuple(zip(places, values, strict=True))
        return [(own[i], pairs[i * most : i * most + top]) for i, top in enumerate(tops)]

    def _check(self, logits: Tensor, rows: Sequence[int], *entries: Sequence[object]) -> None:
        """Raise ValueError unless there are such rows, and `entries` have one for each of them."""
        self._require_open()
        if logits.dtype != torch.float32 or logits.stride(1) != 1:
            raise ValueError("the logits of a row must be float32 and lie one after the other")
        if any(len(part) != len(rows) for part in entries):
            raise ValueError(f"{len(rows)} rows do not match {[len(part) for part in entries]} entries")
        if rows and not 0 <= min(rows) <= max(rows) < len(logits):
            raise ValueError(f"rows are {list(rows)}; there are {len(logits)}")

    def _call(
        self,
        function: Callable[..., int],
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        want: Sequence[int],
        results: tuple[int | None, ...],
    ) -> bool:
        """Call step_rows or step_begin; return whether it took the rows. Raises ValueError for one out of bounds."""
        self._require_open()
        if not len(tokens) == len(slots) == len(positions):
            raise ValueError(f"{len(tokens)} tokens, {len(slots)} slots and {len(positions)} positions do not match")
        arrays = [array("q", part) for part in (tokens, slots, positions, want)]
        ids, at, to, wanted = map(_address, arrays)
        bad = function(self._step, len(tokens), ids, at, to, len(want), wanted, *results)
        if bad == len(tokens):
            raise ValueError(f"want is {list(want)}; the step has rows 0 to {len(tokens) - 1}")
        if bad >= 0:
            raise ValueError(
                f"row {bad} is token {tokens[bad]} in slot {slots[bad]} at position {positions[bad]}; the model has"
                f" {self.vocab_size} tokens, {self.slots} slots and {self.block_size} positions"
            )
        return bad == -1

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy a slot's beginning to another (see ModelRunner.copy): whole blocks, which lie one after the other."""
        self._settle()
        check_copy(self, source, target, length)
        to, at = (self._cache + slot * self._slot_bytes for slot in (target, source))
        ctypes.memmove(to, at, up_to(length, CACHE_BLOCK) // CACHE_BLOCK * self._block_bytes)

    def release(self, slot: int) -> None:
        """Give a slot's memory back to the system (see ModelRunner.release)."""
        self._settle()
        check_slot(self, slot)
        if self._arena is not None:
            self._arena.release(slot * self._slot_bytes, (slot + 1) * self._slot_bytes)

    def close(self) -> None:
        """Give back weights, cache and threads. Logits returned before stay valid."""
        self._step = self._arena = None
        self._close()


def _address(numbers: "array[Any]") -> int:
    return numbers.buffer_info()[0]


def _lie_of(penalties: Penalties | None) -> tuple[int, int, int]:
    """Return how many there are, and where their ids and values are."""
    return (0, 0, 0) if penalties is None else (len(penalties.ids), _address(penalties.ids), _address(penalties.values))


def _lie(logits: Tensor, rows: "array[int]") -> tuple[int, int, int, int, int]:
    """Return how many rows are meant and which, how long they are, how far apart, and where the first is."""
    return len(rows), _address(rows), logits.size(1), logits.stride(0), logits.data_ptr()


def _release(close: Callable[[int], None], step: int, kept: list[object]) -> None:
    close(step)
    kept.clear()
