"""What a `torch.save` file holds, read without torch and without unpickling.

Such a file is a zip archive: a pickle that describes everything (data.pkl) and one stored record for each
tensor's numbers. `read_torch_file` checks the archive, then has the pickle interpreted (torch_pickle.py), so
that tensors come back as descriptions and nothing large is allocated. It does not know what a model is, and it
loads no numbers: that is torch.load(weights_only=True), afterwards.
"""

import os
import struct
import zipfile
from typing import Any, BinaryIO

from storage.errors import NotLoadable
from storage.files import quoted
from storage.torch_pickle import Interpreter, Refused

PICKLE_LIMIT = 16 * 2**20  # bytes; a model of 500 layers with its optimizer needs 7 MB
DIRECTORY_LIMIT = 8 * 2**20  # bytes of the zip directory, about 90 for each record


def _explain_start(f: BinaryIO) -> None:
    """Raise Refused for what is no zip archive, saying what it is instead."""
    start = f.read(64)
    if start.startswith(b"PK\x03\x04"):
        return
    if not start:
        raise Refused("is empty")
    if start.startswith(b"version https://git-lfs"):
        raise Refused("is a Git LFS pointer and not the file itself; run `git lfs pull` where it came from")
    if not start.strip(b"\0"):
        raise Refused("begins with zeros; it was never written completely")
    if start[:1] == b"\x80":
        raise Refused("is a bare pickle (PyTorch's format before 1.6), which is never opened")
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        raise Refused("is a text file, not a checkpoint")
    raise Refused("is not a PyTorch checkpoint")


def _directory_bytes(f: BinaryIO, size: int) -> int:
    """Return the length of the zip directory, from the records at the end of the file."""
    tail = os.pread(f.fileno(), min(size, 98), max(0, size - 98))  # 56 + 20 + 22: zip64 record, its locator, end
    if len(tail) < 22 or tail[-22:-18] != b"PK\x05\x06":
        raise Refused("is cut short or damaged: it has no zip directory at its end")
    length: int = struct.unpack("<I", tail[-10:-6])[0]
    if length == 0xFFFFFFFF and len(tail) == 98:
        length = struct.unpack("<Q", tail[40:48])[0]
    return length


def _open_archive(f: BinaryIO, size: int) -> zipfile.ZipFile:
    if _directory_bytes(f, size) > DIRECTORY_LIMIT:
        raise Refused(f"has a zip directory of more than {DIRECTORY_LIMIT} bytes")
    try:
        return zipfile.ZipFile(f)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, OSError, struct.error):
        raise Refused("is damaged: its zip directory cannot be read") from None


def _data_range(f: BinaryIO, info: zipfile.ZipInfo, size: int) -> tuple[int, int]:
    """Return where a record's bytes begin and end, by its local header, as torch finds them."""
    header = os.pread(f.fileno(), 30, info.header_offset)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise Refused(f"is damaged: the record {quoted(info.filename)} is not where the directory says")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start: int = info.header_offset + 30 + name_length + extra_length
    if start + info.file_size > size:
        raise Refused(f"is cut short: the record {quoted(info.filename)} ends after the file")
    return start, start + info.file_size


def _check_records(f: BinaryIO, archive: zipfile.ZipFile, size: int) -> tuple[str, dict[str, tuple[int, int]]]:
    """Check every record of the archive; return the folder that all are in, and where the bytes of each are."""
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    folder = infos[0].filename.partition("/")[0] if infos else ""
    ranges: dict[str, tuple[int, int]] = {}
    end = 0
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise Refused(f"has the compressed or encrypted record {quoted(info.filename)}")
        if info.header_offset < end or (end == 0) != (info.header_offset == 0):
            raise Refused("is damaged: its records overlap or do not begin at its start")
        _, end = ranges[info.filename] = _data_range(f, info, size)
        if not info.filename.startswith(folder + "/"):
            raise Refused(f"is no checkpoint: the record {quoted(info.filename)} is not in the folder of the first")
    if len({info.filename.casefold() for info in infos}) != len(infos):  # torch finds records whatever the case
        raise Refused("has two records of one name")
    return folder, ranges


def _read(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    try:
        if archive.getinfo(name).file_size > limit:
            raise Refused(f"has a {name.partition('/')[2]} of more than {limit} bytes")
        return archive.read(name)
    except KeyError:
        raise Refused(f"is no checkpoint: it has no {name.partition('/')[2]}") from None
    except (zipfile.BadZipFile, EOFError, ValueError, OSError, struct.error, NotImplementedError):
        raise Refused(f"is damaged: its {name.partition('/')[2]} cannot be read") from None


def _value(f: BinaryIO) -> Any:
    _explain_start(f)
    size = os.fstat(f.fileno()).st_size
    with _open_archive(f, size) as archive:
        folder, ranges = _check_records(f, archive, size)
        if f"{folder}/constants.pkl" in ranges:
            raise Refused("is a TorchScript program, which is never opened")
        if f"{folder}/byteorder" in ranges and _read(archive, f"{folder}/byteorder", 16) != b"little":
            raise Refused("was saved on a machine of another byte order")
        data, prefix = _read(archive, f"{folder}/data.pkl", PICKLE_LIMIT), f"{folder}/data/"
    records = {name.removeprefix(prefix): place for name, place in ranges.items() if name.startswith(prefix)}
    try:
        return Interpreter(records).run(data)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeError, RecursionError):
        raise Refused("has a damaged data.pkl") from None


def read_torch_file(f: BinaryIO, shown: str) -> Any:
    """Return what the open file `f` holds, tensors as TensorInfo; NotLoadable, in one sentence, for anything odd."""
    try:
        return _value(f)
    except Refused as e:
        raise NotLoadable(f"{shown} {e}") from None


def crc_damage(f: BinaryIO, shown: str) -> str | None:
    """Return None if every record of a file that read_torch_file took has its checksum, else a sentence."""
    try:
        with zipfile.ZipFile(f) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, struct.error):
        return f"{shown} is damaged"
    return None if bad is None else f"{shown} is damaged: the checksum of its record {quoted(bad)} is wrong"
