"""The model on CPUs with AVX-512: packs a GPT's weights once and runs native/step.cpp on them through ctypes.

Satisfies runner.ModelRunner. Rows do not depend on each other: a row's logits are the same bit for bit alone, in any
step, prefilled in one piece or token by token, on any number of threads. What each dtype does:
fp32: everything in float32. bf16: weights and the activations they meet in bfloat16, sums in float32, cache in
half precision. int8: weights in 8 bits with a scale per row, activations in 8 bits with a scale per row of the step
and far values apart (product.h), cache in half precision.
"""

import ctypes
import mmap
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from inference.native.build import CannotBuild, library
from inference.native.machine import available_cores
from inference.runner import check_copy, check_slot
from model import GPTConfig

VERSION = 2  # as in step.cpp
PANEL = 32  # rows of weights that lie together
CACHE_BLOCK = 64  # positions of a slot that lie together, as in attention.h
KINDS = {"fp32": (0, torch.float32), "bf16": (1, torch.bfloat16), "int8": (2, torch.uint8)}  # number in C++, stored as
GREATEST_WIDTH = 16384  # beyond it int8 sums could leave 32 bits

_P, _L = ctypes.c_void_p, ctypes.c_long


class _Matrix(ctypes.Structure):
    _fields_ = [("weights", _P), ("scale", _P), ("bias", _P), ("rows", _L), ("width", _L)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("norm1", "norm1_bias", "norm2", "norm2_bias")),
        *((name, _Matrix) for name in ("qkv", "out", "up", "down")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _L) for name in ("layers", "heads", "width", "vocabulary", "block", "slots")),
        *((name, _L) for name in ("kind", "gelu_new", "threads")),
        *((name, _P) for name in ("positions", "norm", "norm_bias")),
        *((name, _Matrix) for name in ("tokens", "head")),
        ("layer", ctypes.POINTER(_Layer)),
        ("cache", _P),
    ]


def _load() -> ctypes.CDLL:
    """Return the library, compiled if need be. Raises CannotBuild. CDLL and not PyDLL: a step runs without the GIL."""
    path = library()
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as e:
        raise CannotBuild(f"the compiled library does not load: {e}") from e
    lib.step_agrees.argtypes, lib.step_agrees.restype = [_L, _L], ctypes.c_bool
    lib.step_open.argtypes, lib.step_open.restype = [ctypes.POINTER(_Model)], _P
    lib.step_close.argtypes, lib.step_close.restype = [_P], None
    lib.step_rows.argtypes, lib.step_rows.restype = [_P, _L, _P, _P, _P, _L, *[_P] * 4], _L
    if not lib.step_agrees(VERSION, ctypes.sizeof(_Model)):
        raise CannotBuild(f"{path} has another version of the interface")
    return lib


def _up_to(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps what lies between blocks in use, here up to 3 times the model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _Arena:
    """One stretch of anonymous memory that tensors are cut from; pages come when they are first written.

    `huge` asks for 2 MiB pages, which make long streams faster; without it little is touched for little use.
    """

    def __init__(self, nbytes: int, huge: bool):
        memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared has no huge pages
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        self._bytes, self._used, self._memory = torch.frombuffer(memory, dtype=torch.uint8), 0, memory

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the next tensor, all zero, beginning at a multiple of 64 bytes."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        start, self._used = self._used, self._used + _up_to(nbytes, 64)
        return self._bytes[start : start + nbytes].view(dtype).view(shape)

    def release(self, start: int, end: int) -> None:
        """Give whole pages between two offsets back; they read as zeros."""
        start, end = _up_to(start, mmap.PAGESIZE), end // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, start, end - start)


class Weights(Protocol):
    """What is packed: a GPT, or a model whose weights are still in its files."""

    @property
    def config(self) -> GPTConfig: ...

    def get_parameter(self, target: str, /) -> Tensor:
        """Return a parameter by its name in GPT."""
        ...

    def parts(self, name: str, /) -> Iterable[Tensor]:
        """Give a parameter's rows in order; parts but the last have a multiple of PANEL rows."""
        ...


class _Packer:
    """Turns a model's parameters into what the step reads, one after the other, and keeps the results alive."""

    def __init__(self, config: GPTConfig, dtype: str):
        self.kind, self.stored = KINDS[dtype]
        self.kept: list[Tensor] = []
        C, V = config.n_embd, config.vocab_size
        shapes = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)] * config.n_layer + [(V, C)] * (1 if config.tied else 2)
        self.nbytes = sum(_up_to(_up_to(n, PANEL) * k * self.stored.itemsize, 64) for n, k in shapes)
        self._arena = _Arena(self.nbytes, huge=True)

    def floats(self, tensor: Tensor | None, length: int | None = None) -> int | None:
        """Keep a float32 copy, with zeros up to `length`; return its address, None for None."""
        if tensor is None:
            return None
        copy = torch.zeros(length or tensor.numel())
        copy[: tensor.numel()] = tensor.detach().reshape(-1)
        self.kept.append(copy)
        return copy.data_ptr()

    def matrix(self, shape: tuple[int, int], parts: Iterable[Tensor], bias: Tensor | None = None) -> _Matrix:
        """Pack weights (rows, width) in panels of 32 rows. Raises ValueError if one is not finite."""
        rows, width = shape
        padded, group = _up_to(rows, PANEL), 4 // self.stored.itemsize
        packed = self._arena.take((padded // PANEL, width // group, PANEL), torch.int32)  # of a group of weights each
        scale, start = torch.zeros(padded), 0
        for part in (
            small for large in parts for small in torch.split(large.detach(), 16 * PANEL)
        ):  # so that copies are small
            part = F.pad(part.float(), (0, 0, 0, -len(part) % PANEL))
            most = part.abs().amax(1)
            if not most.isfinite().all():
                raise ValueError("the model's weights hold a value that is not finite")
            if self.stored is torch.uint8:
                scale[start : start + len(part)] = most / 127
                part = (part * (127 / most.clamp(min=1e-30))[:, None]).round_().add_(128)
            words = part.to(self.stored).view(torch.int32).view(-1, PANEL, width // group)
            first, start = start // PANEL, start + len(part)
            packed[first : first + len(words)] = words.transpose(1, 2)
        _give_back()
        self.kept += [packed, scale]
        return _Matrix(packed.data_ptr(), scale.data_ptr(), self.floats(bias, padded), padded, width)


def _pack(model: Weights, packer: _Packer, native: _Model) -> None:
    """Pack a model weight by weight: of one that is still in its files only one is in memory unpacked."""
    config = model.config

    def floats(name: str) -> int | None:
        return packer.floats(model.get_parameter(name))

    def norm(name: str) -> tuple[int | None, int | None]:
        return floats(f"{name}.weight"), floats(f"{name}.bias") if config.bias else None

    def matrix(name: str, rows: int, width: int) -> _Matrix:
        bias = model.get_parameter(f"{name}.bias") if config.bias else None
        return packer.matrix((rows, width), model.parts(f"{name}.weight"), bias)

    C, V = config.n_embd, config.vocab_size
    native.tokens = packer.matrix((V, C), model.parts("transformer.wte.weight"))
    native.head = native.tokens if config.tied else packer.matrix((V, C), model.parts("lm_head.weight"))
    native.positions = floats("transformer.wpe.weight")
    native.norm, native.norm_bias = norm("transformer.ln_f")
    for i, layer in enumerate(native.layer[: config.n_layer]):
        block = f"transformer.h.{i}"
        layer.norm1, layer.norm1_bias = norm(f"{block}.ln_1")
        layer.norm2, layer.norm2_bias = norm(f"{block}.ln_2")
        layer.qkv, layer.out = matrix(f"{block}.attn.c_attn", 3 * C, C), matrix(f"{block}.attn.c_proj", C, C)
        layer.up, layer.down = matrix(f"{block}.mlp.c_fc", 4 * C, C), matrix(f"{block}.mlp.c_proj", C, 4 * C)


class NativeRunner:
    """A model in the native step: packed weights, cache and threads of its own. Several may live in one process."""

    name = "native"
    device = "cpu"

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
        self.last_argmax: list[int] | None = []  # where the greatest logit of each row is; vocab_size where one is NaN
        packer = _Packer(config, dtype)
        native = _Model(config.n_layer, config.n_head, config.n_embd, config.vocab_size, config.block_size, slots)
        native.kind, native.gelu_new, native.threads = packer.kind, config.activation == "gelu_new", self.threads
        native.layer = (_Layer * config.n_layer)()
        _pack(model, packer, native)
        span, element = _up_to(config.block_size, CACHE_BLOCK), 4 if dtype == "fp32" else 2
        self._block_bytes = 2 * config.n_layer * config.n_embd * CACHE_BLOCK * element
        self.position_bytes = self._block_bytes // CACHE_BLOCK
        self._slot_bytes = span // CACHE_BLOCK * self._block_bytes
        cache = _Arena(slots * self._slot_bytes, huge=True)
        self._arena: _Arena | None = cache
        native.cache = self._cache = cache.take((1,), torch.uint8).data_ptr()
        self.packed_bytes = packer.nbytes
        self._width = native.head.rows  # of a row of logits, with padding
        self._logits = torch.empty(slots, self._width)  # kept: fresh memory would cost its first touch
        self._lib = _load()
        step = self._lib.step_open(ctypes.byref(native))
        if step is None:
            raise MemoryError("no memory or threads for the native step")
        self._step: int | None = step
        self._close = weakref.finalize(self, _release, self._lib.step_close, step, [packer, cache, native])

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
        order = sorted(set(want))
        few = len(order) <= self.slots
        logits = self._logits[: len(order)] if few else torch.empty(len(order), self._width)
        best = array("q", order)
        self._compute(tokens, slots, positions, want, order, (logits.data_ptr(), best.buffer_info()[0], None))
        if list(want) != order:  # each row once and rising is what the step knows
            where = [order.index(row) for row in want]
            logits, best = logits[where], array("q", [best[i] for i in where])
        self.last_argmax = best.tolist()
        return logits[:, : self.vocab_size]

    def hidden(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[int]
    ) -> Tensor:
        """Compute one step up to the head (see ModelRunner.hidden). Raises ValueError as `rows` does."""
        order = sorted(set(want))
        hidden = torch.empty(len(order), self._n_embd)
        self._compute(tokens, slots, positions, want, order, (None, None, hidden.data_ptr()))
        return hidden if list(want) == order else hidden[[order.index(row) for row in want]]

    def _compute(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        want: Sequence[int],
        order: list[int],
        results: tuple[int | None, int | None, int | None],
    ) -> None:
        """Let the step write results, the addresses of logits, argmax and hidden states; `order` is `want`, rising."""
        if self._step is None:
            raise ValueError("the runner is closed")
        if not len(tokens) == len(slots) == len(positions):
            raise ValueError(f"{len(tokens)} tokens, {len(slots)} slots and {len(positions)} positions do not match")
        arrays = [array("q", part) for part in (tokens, slots, positions, order)]
        ids, at, to, wanted = (a.buffer_info()[0] for a in arrays)
        bad = self._lib.step_rows(self._step, len(tokens), ids, at, to, len(order), wanted, *results)
        if bad == len(tokens):
            raise ValueError(f"want is {list(want)}; the step has rows 0 to {len(tokens) - 1}")
        if bad >= 0:
            raise ValueError(
                f"row {bad} is token {tokens[bad]} in slot {slots[bad]} at position {positions[bad]}; the model has"
                f" {self.vocab_size} tokens, {self.slots} slots and {self.block_size} positions"
            )

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy a slot's beginning to another (see ModelRunner.copy): whole blocks, which lie one after the other."""
        if self._step is None:
            raise ValueError("the runner is closed")
        check_copy(self, source, target, length)
        to, at = (self._cache + slot * self._slot_bytes for slot in (target, source))
        ctypes.memmove(to, at, _up_to(length, CACHE_BLOCK) // CACHE_BLOCK * self._block_bytes)

    def release(self, slot: int) -> None:
        """Give a slot's memory back to the system (see ModelRunner.release)."""
        if self._arena is None:
            raise ValueError("the runner is closed")
        check_slot(self, slot)
        self._arena.release(slot * self._slot_bytes, (slot + 1) * self._slot_bytes)

    def close(self) -> None:
        """Give back weights, cache and threads. Logits returned before stay valid."""
        self._step = self._arena = None
        self._close()


def _release(close: Callable[[int], None], step: int, kept: list[object]) -> None:
    close(step)
    kept.clear()
