"""TensorBoard's event file of a run: `tensorboard --logdir out` shows every run that has one, under its name.

The format is simple enough to be written without TensorBoard: a file of records, each a length, a checksum of it,
a protocol buffer and a checksum of that. Which fields these messages have is in TensorFlow's event.proto,
summary.proto and tensor.proto; the records are described in its record_writer.h. Nothing here reads such a file.
"""

import functools
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

from training.metrics import append_whole, numbers

PATTERN = "events.out.tfevents.*"
LARGEST = 3e38  # of a float32, which is what TensorBoard keeps
DT_STRING, DATA_CLASS_TENSOR, SESSION_START = 7, 2, 1


# ---- protocol buffers: a field is its number and kind, then its value


def _varint(n: int) -> bytes:
    low, rest = n & 0x7F, n >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def _number(field: int, n: int) -> bytes:
    return _varint(field << 3) + _varint(n)


def _double(field: int, x: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", x)


def _float(field: int, x: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", x)


def _message(field: int, *parts: bytes) -> bytes:
    data = b"".join(parts)
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def scalar(tag: str, value: float) -> bytes:
    """Return a Summary.Value with a number."""
    return _message(1, _message(1, tag.encode()), _float(2, value))


def text(tag: str, content: str) -> bytes:
    """Return a Summary.Value for the text plugin, which reads Markdown: each line is indented, to stay as it is."""
    lines = "\n".join(f"    {line}" for line in content.split("\n")).encode("utf-8", "replace")
    metadata = _message(9, _message(1, _message(1, b"text")), _number(4, DATA_CLASS_TENSOR))
    tensor = _message(8, _number(1, DT_STRING), _message(2, _message(2, _number(1, 1))), _message(8, lines))
    return _message(1, _message(1, tag.encode()), metadata, tensor)


# ---- records


@functools.cache
def _table() -> tuple[int, ...]:
    found = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
        found.append(n)
    return tuple(found)


def checksum(data: bytes) -> int:
    """Return the CRC-32C of some bytes, turned and moved as these records have it."""
    table, crc = _table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record(event: bytes) -> bytes:
    """Return an event as a record of the file."""
    length = struct.pack("<Q", len(event))
    return length + struct.pack("<I", checksum(length)) + event + struct.pack("<I", checksum(event))


class EventFile:
    """The event file of one trainer in a run's folder. Every method may raise OSError."""

    name = "tensorboard"

    def __init__(self, folder: Path):
        """Begin a new file; those of trainers before, whose run this one goes on with, stay beside it."""
        self.path = folder / PATTERN.replace("*", f"{int(time.time())}.{socket.gethostname()}.{os.getpid()}")
        self._add(0, _message(3, b"brain.Event:2"))

    def _add(self, iter_num: int, content: bytes) -> None:
        append_whole(self.path, record(_double(1, time.time()) + _number(2, iter_num) + content))

    def row(self, row: dict[str, Any]) -> None:
        """Add the numbers of a row of metrics, by the names of its columns."""
        values = [scalar(name, value) for name, value in numbers(row).items() if abs(value) < LARGEST]
        self._add(row["iter_num"], _message(5, *values))

    def sample(self, iter_num: int, sample: str) -> None:
        """Add a text sample."""
        self._add(iter_num, _message(5, text("sample", sample)))

    def cut(self, iter_num: int) -> None:
        """Say that what came after `iter_num` will come again: readers then forget it."""
        self._add(iter_num + 1, _message(7, _number(1, SESSION_START)))
