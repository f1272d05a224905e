"""The pickle inside a `torch.save` file, interpreted without the pickle module and without torch.

Only the operations that torch.save writes are known here, and only the few globals listed below, each of
which makes a harmless description: a tensor becomes a `TensorInfo`. Everything else is refused by name and
never executed. Work and memory are bounded by the pickle's own length. The archive around it is torch_file.py.
"""

import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from storage.files import quoted

OPERATION_LIMIT = 1_000_000  # each makes at most about 100 bytes of objects

STORAGES = {  # name in torch: (our name of the type, bytes of an element)
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in the file: its type and shape, and where its first byte is, counted from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    dense: bool  # row-major without gaps


@dataclass(frozen=True, slots=True)
class _Element:
    dtype: str
    size: int


@dataclass(frozen=True, slots=True)
class _Storage:
    element: _Element
    start: int
    numel: int


class Refused(Exception):
    """What is wrong, without the file's name."""


# ---- globals: the functions and types that a checkpoint's pickle may name, as harmless descriptions


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise Refused(f"describes a tensor with the size {quoted(value)}")
    return value


def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, stride: Any, *_: Any) -> TensorInfo:
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise Refused("describes a tensor in a form that torch.save does not write")
    if len(shape) != len(stride) or len(shape) > 8:
        raise Refused(f"describes a tensor of {len(shape)} dimensions with {len(stride)} strides")
    offset, shape, stride = _natural(offset), tuple(map(_natural, shape)), tuple(map(_natural, stride))
    numel = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if numel else offset - 1
    if numel > storage.numel or last >= storage.numel:
        raise Refused(f"describes a tensor of {quoted(numel)} elements in a record that holds {storage.numel}")
    dense = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    is_dense = all(n == 1 or step == row for n, step, row in zip(shape, stride, dense, strict=True))
    return TensorInfo(storage.element.dtype, shape, storage.start + offset * storage.element.size, is_dense)


def _rebuild_parameter(data: object, *_: Any) -> TensorInfo:
    if not isinstance(data, TensorInfo):
        raise Refused("describes a parameter that is no tensor")
    return data


def _ordered_dict(*args: Any) -> dict[Any, Any]:
    if args:
        raise Refused("makes an OrderedDict in a form that torch.save does not write")
    return {}


def _size(values: object = ()) -> tuple[Any, ...]:
    if not isinstance(values, tuple):
        raise Refused("makes a torch.Size of something else than a tuple")
    return values


def _device(*args: Any) -> str:
    return ":".join(str(arg)[:20] for arg in args[:2] if isinstance(arg, str | int))


ALLOWED: Mapping[str, Callable[..., Any] | _Element] = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    "torch Size": _size,
    "torch device": _device,
    "torch.storage UntypedStorage": _Element("U8", 1),
    **{f"torch {name}": _Element(*element) for name, element in STORAGES.items()},
}


# ---- the pickle


class Interpreter:
    """Interpret a pickle of protocol 2 with the globals above; the stack machine of the pickle module, cut down."""

    def __init__(self, records: Mapping[str, tuple[int, int]]):
        self.records = records  # name -> where its bytes begin and end in the file
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.do: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), self.stack.append),
            "PROTO": self.protocol,
            "NONE": lambda _: self.stack.append(None),
            "NEWTRUE": lambda _: self.stack.append(True),
            "NEWFALSE": lambda _: self.stack.append(False),
            "EMPTY_DICT": lambda _: self.stack.append({}),
            "EMPTY_LIST": lambda _: self.stack.append([]),
            "EMPTY_TUPLE": lambda _: self.stack.append(()),
            "MARK": lambda _: self.marks.append(len(self.stack)),
            "TUPLE": lambda _: self.stack.append(tuple(self.above_mark())),
            "TUPLE1": lambda _: self.stack.append(tuple(self.top(1))),
            "TUPLE2": lambda _: self.stack.append(tuple(self.top(2))),
            "TUPLE3": lambda _: self.stack.append(tuple(self.top(3))),
            "APPEND": lambda _: self.extend(self.top(1)),
            "APPENDS": lambda _: self.extend(self.above_mark()),
            "SETITEM": lambda _: self.update(self.top(2)),
            "SETITEMS": lambda _: self.update(self.above_mark()),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self.put),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda key: self.stack.append(self.memo[key])),
            "GLOBAL": self.find,
            "REDUCE": self.reduce,
            "BUILD": self.build,
            "BINPERSID": self.storage,
        }

    def run(self, data: bytes) -> Any:
        """Return the pickle's value."""
        for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
            if operation.name == "STOP":
                return self.top(1)[0]
            if count >= OPERATION_LIMIT:
                raise Refused(f"has a data.pkl of more than {OPERATION_LIMIT} operations")
            if operation.name not in self.do:
                raise Refused(f"has a data.pkl with the operation {operation.name}, which torch.save does not write")
            self.do[operation.name](argument)
        raise Refused("has a data.pkl without an end")

    def protocol(self, version: int) -> None:
        if version != 2:
            raise Refused(f"has a data.pkl of protocol {version}; torch.save writes protocol 2")

    def top(self, n: int) -> list[Any]:
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < n:
            raise Refused("has a damaged data.pkl")
        values = self.stack[-n:]
        del self.stack[-n:]
        return values

    def above_mark(self) -> list[Any]:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise Refused("has a damaged data.pkl")
        self.stack[-1].extend(values)

    def update(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise Refused("has a damaged data.pkl")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int):  # hashing nested tuples may take for ever
                raise Refused(f"has a dictionary with a key of the type {type(key).__name__}")
            target[key] = value

    def find(self, name: str) -> None:
        if name not in ALLOWED:
            raise Refused(f"names {quoted(name.replace(' ', '.'))}, which no checkpoint needs; it was not executed")
        self.stack.append(ALLOWED[name])

    def reduce(self, _: object) -> None:
        function, arguments = self.top(2)
        if not callable(function) or not isinstance(arguments, tuple):
            raise Refused("has a damaged data.pkl")
        self.stack.append(function(*arguments))

    def build(self, _: object) -> None:
        self.top(1)  # a state dict's _metadata
        if not isinstance(self.stack[-1], dict):
            raise Refused("sets the state of an object that is no state dict")

    def storage(self, _: object) -> None:
        identity = self.top(1)[0]
        if not (isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage"):
            raise Refused("refers to something that is no tensor")
        _, element, record, _, numel = identity
        if not isinstance(element, _Element) or not isinstance(record, str) or record not in self.records:
            raise Refused(f"refers to the record {quoted(record)}, which it does not hold")
        start, end = self.records[record]
        if _natural(numel) * element.size > end - start:
            raise Refused(f"claims {quoted(numel)} elements of {element.dtype} in a record of {end - start} bytes")
        self.stack.append(_Storage(element, start, numel))
