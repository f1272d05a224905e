"""Pack a GPT's weights into what the native step reads: its structures, its memory, and the formats of its matrices.

A model is packed weight by weight: of one that is still in its files only one is in memory unpacked. bf16 is kept in
12 bits (compact.py), unless the weights of a matrix spread too far for them: then all of the model is kept in 16.
"""

import ctypes
import mmap
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from inference.native.build import screens
from inference.native.compact import MOST_REST, PANEL, compact, compact_bytes
from model import GPTConfig

CACHE_BLOCK = 32  # positions of a slot that lie together, as in attention.h
F32, BF16, INT8, COMPACT = range(4)  # as in product.h; COMPACT: bfloat16 in 12 bits
KINDS = {"fp32": (F32,), "bf16": (COMPACT, BF16), "int8": (INT8,)}  # the first that a model's weights fit into
LEAST_SCREENED = 4096  # rows of a head that is screened: of fewer, a step takes little time
LONG = 1e15  # as in screen.h
STORED = (torch.float32, torch.bfloat16, torch.uint8, torch.bfloat16)

_P, _L = ctypes.c_void_p, ctypes.c_long


class Matrix(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("weights", "scale", "bias")),
        ("rows", _L),
        ("width", _L),
        ("rest", _P),
        ("rest_of", _P),
    ]


class Screen(ctypes.Structure):
    _fields_ = [("head", Matrix), ("lost", _P), ("length", _P)]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("norm1", "norm1_bias", "norm2", "norm2_bias")),
        *((name, Matrix) for name in ("qkv", "out", "up", "down")),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *((name, _L) for name in ("layers", "heads", "width", "vocabulary", "block", "slots")),
        *((name, _L) for name in ("kind", "gelu_new", "threads")),
        *((name, _P) for name in ("positions", "norm", "norm_bias")),
        *((name, Matrix) for name in ("tokens", "head")),
        ("screen", Screen),
        ("layer", ctypes.POINTER(Layer)),
        ("cache", _P),
    ]


def up_to(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps what lies between blocks in use, here up to 3 times the model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Arena:
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
        start, self._used = self._used, self._used + up_to(nbytes, 64)
        return self._bytes[start : start + nbytes].view(dtype).view(shape)

    def release(self, start: int, end: int) -> None:
        """Give whole pages between two offsets back; they read as zeros."""
        start, end = up_to(start, mmap.PAGESIZE), end // mmap.PAGESIZE * mmap.PAGESIZE
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


def matrices(config: GPTConfig) -> list[tuple[int, int]]:
    """Return rows and width of each matrix that is packed."""
    C, V = config.n_embd, config.vocab_size
    return [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)] * config.n_layer + [(V, C)] * (1 if config.tied else 2)


def panel_bytes(width: int, kind: int) -> int:
    """Return the bytes of PANEL rows of a matrix."""
    return compact_bytes(width) if kind == COMPACT else PANEL * width * STORED[kind].itemsize


def screen_bytes(config: GPTConfig, kind: int) -> int:
    """Return the bytes of the head in 8 bits, in which the greatest logits of a model in bf16 are looked for first."""
    few = config.vocab_size < LEAST_SCREENED or kind not in (BF16, COMPACT)
    return 0 if few or not screens() else up_to(config.vocab_size, PANEL) * config.n_embd


def packed_bytes(config: GPTConfig, kind: int) -> int:
    """Return the bytes of a model's matrices when they are packed."""
    return screen_bytes(config, kind) + sum(
        up_to(rows, PANEL) // PANEL * panel_bytes(width, kind) for rows, width in matrices(config)
    )


class _Spread(Exception):
    """Too many weights of a matrix have a high byte without a code: 12 bits would be slower than 16."""


def _pieces(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Give a matrix's rows as floats, with zero ones to whole panels, in pieces so small that copies are, too."""
    for large in parts:
        for part in torch.split(large.detach(), 4 * PANEL):
            yield F.pad(part.float(), (0, 0, 0, -len(part) % PANEL))


def _quantised(part: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows, of which `most` are the greatest, in 8 bits, whole numbers from 1 to 255 around 128, and scales."""
    return (part * (127 / most.clamp(min=1e-30))[:, None]).round_().add_(128), most / 127


def _lay(part: Tensor, panels: Tensor) -> None:
    """Lay rows out in panels: of each row, in turn, the weights that fill 4 bytes."""
    words = part.view(torch.int32).view(len(panels), PANEL, -1)
    panels.view(torch.int32).view(len(panels), -1, PANEL).copy_(words.transpose(1, 2))


class Packer:
    """Turns a model's parameters into what the step reads, one after the other, and keeps the results alive."""

    def __init__(self, config: GPTConfig, kind: int):
        self.kind, self.stored = kind, STORED[kind]
        self.kept: list[Tensor] = []
        self.nbytes = packed_bytes(config, kind)
        self._arena = Arena(self.nbytes, huge=True)

    def floats(self, tensor: Tensor | None, length: int | None = None) -> int | None:
        """Keep a float32 copy, with zeros up to `length`; return its address, None for None."""
        if tensor is None:
            return None
        copy = torch.zeros(length or tensor.numel())
        copy[: tensor.numel()] = tensor.detach().reshape(-1)
        self.kept.append(copy)
        return copy.data_ptr()

    def matrix(self, shape: tuple[int, int], parts: Iterable[Tensor], bias: Tensor | None = None) -> Matrix:
        """Pack weights (rows, width) in panels of 32 rows. Raises ValueError if one is not finite."""
        rows, width = shape
        padded = up_to(rows, PANEL)
        packed, rest = self._arena.take((padded // PANEL, panel_bytes(width, self.kind)), torch.uint8), []
        scale, start = torch.zeros(padded), 0
        for part in _pieces(parts):
            most = part.abs().amax(1)
            if not most.isfinite().all():
                raise ValueError("the model's weights hold a value that is not finite")
            target = packed[start // PANEL : (start + len(part)) // PANEL]
            if self.kind == COMPACT:
                panels, apart = compact(part.to(self.stored))
                target.copy_(panels)
                rest.append(apart.add_(torch.tensor([start // PANEL, 0, 0, 0], dtype=torch.int32)))
            else:
                if self.kind == INT8:
                    part, scale[start : start + len(part)] = _quantised(part, most)
                _lay(part.to(self.stored), target)
            start += len(part)
        matrix = Matrix(packed.data_ptr(), scale.data_ptr(), self.floats(bias, padded), padded, width)
        if self.kind == COMPACT:
            matrix.rest, matrix.rest_of = self._rest(torch.cat(rest), rows * width, len(packed))
        _give_back()
        self.kept += [packed, scale]
        return matrix

    def screen(self, shape: tuple[int, int], parts: Iterable[Tensor]) -> Screen | None:
        """Pack a head of finite weights a second time, in 8 bits, with what is lost by that (screen.h).

        Return None for one whose rows are too long for its bounds.
        """
        rows, width = shape
        padded = up_to(rows, PANEL)
        packed = self._arena.take((padded // PANEL, PANEL * width), torch.uint8)
        (scale, lost, length), start = torch.zeros(3, padded), 0
        for part in (piece.bfloat16().float() for piece in _pieces(parts)):
            end = start + len(part)
            digits, scale[start:end] = _quantised(part, part.abs().amax(1))
            _lay(digits.to(torch.uint8), packed[start // PANEL : end // PANEL])
            exact, near = part.double(), (digits.double() - 128) * scale[start:end, None].double()
            lost[start:end] = (exact - near).norm(dim=1)
            length[start:end] = torch.maximum(exact.norm(dim=1), near.norm(dim=1))
            start = end
        if not length.max() < LONG:
            return None
        length[:rows].clamp_(min=1 / LONG)
        self.kept += [packed, scale, lost, length]
        _give_back()
        return Screen(
            Matrix(packed.data_ptr(), scale.data_ptr(), None, padded, width), lost.data_ptr(), length.data_ptr()
        )

    def _rest(self, rest: Tensor, weights: int, panels: int) -> tuple[int, int]:
        """Keep what has no code in a compact matrix; return its address and that of the panels' beginnings in it."""
        if len(rest) > MOST_REST * weights:
            raise _Spread
        ends = torch.bincount(rest[:, 0], minlength=panels).cumsum(0)
        of_panel = F.pad(ends, (1, 0)).to(torch.int32)
        rest = rest[:, 1:].contiguous()
        self.kept += [rest, of_panel]
        return rest.data_ptr(), of_panel.data_ptr()


def _pack(model: Weights, packer: Packer, native: Model) -> None:
    """Pack a model weight by weight: of one that is still in its files only one is in memory unpacked."""
    config = model.config

    def floats(name: str) -> int | None:
        return packer.floats(model.get_parameter(name))

    def norm(name: str) -> tuple[int | None, int | None]:
        return floats(f"{name}.weight"), floats(f"{name}.bias") if config.bias else None

    def matrix(name: str, rows: int, width: int) -> Matrix:
        bias = model.get_parameter(f"{name}.bias") if config.bias else None
        return packer.matrix((rows, width), model.parts(f"{name}.weight"), bias)

    C, V = config.n_embd, config.vocab_size
    native.tokens = packer.matrix((V, C), model.parts("transformer.wte.weight"))
    native.head = native.tokens if config.tied else packer.matrix((V, C), model.parts("lm_head.weight"))
    if screen_bytes(config, packer.kind):
        head = "transformer.wte.weight" if config.tied else "lm_head.weight"
        native.screen = packer.screen((V, C), model.parts(head)) or Screen()
    native.positions = floats("transformer.wpe.weight")
    native.norm, native.norm_bias = norm("transformer.ln_f")
    for i, layer in enumerate(native.layer[: config.n_layer]):
        block = f"transformer.h.{i}"
        layer.norm1, layer.norm1_bias = norm(f"{block}.ln_1")
        layer.norm2, layer.norm2_bias = norm(f"{block}.ln_2")
        layer.qkv, layer.out = matrix(f"{block}.attn.c_attn", 3 * C, C), matrix(f"{block}.attn.c_proj", C, C)
        layer.up, layer.down = matrix(f"{block}.mlp.c_fc", 4 * C, C), matrix(f"{block}.mlp.c_proj", C, 4 * C)


def pack(model: Weights, dtype: str, native: Model) -> Packer:
    """Pack a model into `native`, whose shape and layers are set; return what keeps its memory alive.

    Raises ValueError for a weight that is not finite.
    """
    for kind in KINDS[dtype]:
        packer = Packer(model.config, kind)
        try:
            _pack(model, packer, native)
        except _Spread:
            del packer  # and with it what was packed
            continue
        native.kind = kind
        return packer
    raise AssertionError(f"no format takes {dtype}")
