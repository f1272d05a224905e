"""What a safetensors file holds: its header, checked against the file's size. No numbers are read here.

The format: 8 bytes with the header's length, the header (JSON: name -> dtype, shape, offsets), the numbers.
"""

import math
import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from storage.errors import NotLoadable
from storage.files import parse_json, quoted

HEADER_LIMIT = 4 * 2**20  # bytes; GPT-2 XL needs 70 kB. The format allows 100 MB, which cost 2 GB to parse
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in the file: type, shape, and the range of its bytes, counted from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def _explain_start(start: bytes, shown: str) -> None:
    if not start:
        raise NotLoadable(f"{shown} is empty")
    if start.startswith(b"version https://git-lfs"):
        raise NotLoadable(
            f"{shown} is a Git LFS pointer and not the file itself; run `git lfs pull` where it came from"
        )
    if start.startswith((b"PK\x03\x04", b"\x80")):
        raise NotLoadable(f"{shown} is a PyTorch file and not safetensors")
    if len(start) < 10 or not start[8:].lstrip(b" ").startswith(b"{"):
        raise NotLoadable(f"{shown} is not a safetensors file, or damaged")


def _is_natural(value: object) -> bool:
    return type(value) is int and value >= 0


def _stored(name: str, entry: Any, body: int, shown: str) -> StoredTensor:
    """Return one entry of the header; `body` is where the numbers begin."""
    fields = (entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")) if isinstance(entry, dict) else ()
    match fields:
        case (str() as dtype, list() as shape, [begin, end]) if (
            dtype in ITEM_BYTES and len(shape) <= 8 and all(map(_is_natural, (*shape, begin, end)))
        ):
            if math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
                raise NotLoadable(f"{shown} is damaged: the size of {quoted(name)} does not fit its shape")
            return StoredTensor(dtype, tuple(shape), body + begin, body + end)
    raise NotLoadable(f"{shown} is damaged: its header describes {quoted(name)} wrongly")


def read_header(f: BinaryIO, shown: str) -> dict[str, StoredTensor]:
    """Return the tensors that the open file `f` holds; NotLoadable, in one sentence, for anything odd."""
    size, start = os.fstat(f.fileno()).st_size, f.read(64)
    _explain_start(start, shown)
    length: int = struct.unpack("<Q", start[:8])[0]
    if length > size - 8:
        raise NotLoadable(f"{shown} is cut short or damaged: its header of {length} bytes ends after the file")
    if length > HEADER_LIMIT:
        raise NotLoadable(f"{shown} has a header of {length} bytes; at most {HEADER_LIMIT} are read")
    header = parse_json(os.pread(f.fileno(), length, 8), f"the header of {shown}")
    if not isinstance(header, dict):
        raise NotLoadable(f"{shown} is damaged: its header is no JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _stored(name, entry, 8 + length, shown) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start < end:
            raise NotLoadable(f"{shown} is damaged: {quoted(name)} overlaps another tensor")
        end = tensor.end
    if end > size:
        raise NotLoadable(f"{shown} is cut short: its tensors need {end} bytes and it has {size}")
    return tensors
