"""What torch.save writes, without torch: zip containers and pickles, none of which gets to execute anything.

A container is a zip of uncompressed records: data.pkl describes the objects, data/<key> is the storage of a
tensor (torch/csrc/jit/serialization and caffe2/serialize/inline_container.cc of torch 2.13).
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from nanoslime.storage.safetensors_file import DTYPE_BYTES
from nanoslime.types import RunError

DTYPES = {  # as safetensors names it: torch's dtype, and the class in pickles of storages of their own
    "F64": ("float64", "DoubleStorage"),
    "F32": ("float32", "FloatStorage"),
    "F16": ("float16", "HalfStorage"),
    "BF16": ("bfloat16", "BFloat16Storage"),
    "BOOL": ("bool", "BoolStorage"),
    "U8": ("uint8", "ByteStorage"),
    "I8": ("int8", "CharStorage"),
    "I16": ("int16", "ShortStorage"),
    "I32": ("int32", "IntStorage"),
    "I64": ("int64", "LongStorage"),
    "U16": ("uint16", ""),
    "U32": ("uint32", ""),
    "U64": ("uint64", ""),
    "F8_E4M3": ("float8_e4m3fn", ""),
    "F8_E5M2": ("float8_e5m2", ""),
}
DTYPE_NAMES = {
    torch_name: name for name, names in DTYPES.items() for torch_name in names if torch_name
}
_OF_TENSORS = {f"torch.{name}" for name in DTYPE_NAMES} | {
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch.storage.UntypedStorage",
}
_PLAIN = {
    "torch.Size": tuple,
    "collections.OrderedDict": dict,
    "builtins.set": set,
    "__builtin__.set": set,
}
_HARMFUL = re.compile(  # no value is made of these: whoever wrote them wanted to execute something
    r"(os|posix|nt|sys|subprocess|shutil|socket|importlib|runpy|ctypes|pty|code|pdb|webbrowser)\."
    r"|(builtins|__builtin__)\.(eval|exec|compile|open|__import__|breakpoint)$"
)
_ENTRY = struct.Struct("<4s6H3I5H2I")  # of a zip's directory
_LOCAL = struct.Struct("<4s5H3I2H")  # in front of a record
_END = struct.Struct(
    "<4sQ2H2I4Q4sIQI4s4H2IH"
)  # zip64 end of directory, its locator, end of directory
_MAX32 = 0xFFFFFFFF
_ALIGNMENT = 64  # of a record in its container


class TorchDistError(RunError):
    """A checkpoint is damaged, not torch_dist, or holds what is refused; the message names the file."""


@contextmanager
def naming(place: object) -> Iterator[None]:
    """Whatever goes wrong in the block becomes a TorchDistError that names `place`."""
    try:
        yield
    except RunError as error:
        raise TorchDistError(f"{place}: {error}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise TorchDistError(f"{place} is damaged: {type(error).__name__}: {error}") from error


class Foreign:
    """An object of a class that is not imported here: the arguments it is made with, or its state.

    Entries of a state that is a dictionary are its attributes too. What was appended to it is dropped.
    """

    args: tuple[Any, ...]
    state: Any
    __slots__ = ("args", "state")

    def __new__(cls, *args: Any, **_: Any) -> Foreign:
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getattr__(self, name: str) -> Any:
        if isinstance(state := object.__getattribute__(self, "state"), dict) and name in state:
            return state[name]
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def __setitem__(self, key: Any, value: Any) -> None: ...
    def extend(self, values: Any) -> None: ...


@lru_cache(maxsize=4096)
def foreign(path: str) -> type[Foreign]:
    """Stands for the class or function `path`, "module.name"; calling it makes a Foreign."""
    module, _, name = path.rpartition(".")
    return type(name, (Foreign,), {"__module__": module, "__slots__": ()})


def made(path: str, state: Any) -> Foreign:
    """An object of the class `path` with this state."""
    made = foreign(path)()
    made.state = state
    return made


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: Collection[str] | None) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> type:
        path = f"{module}.{name}"
        if path in _PLAIN:
            return _PLAIN[path]
        if _HARMFUL.match(path) or (self._allowed is not None and path not in self._allowed):
            raise TorchDistError(f"its pickle names {path}, which does not belong there: refused")
        return foreign(path)

    def persistent_load(self, pid: Any) -> Any:
        return pid


def load(pickled: bytes, allowed: Collection[str] | None) -> Any:
    """The value with Foreign in place of everything that is not Python's own, so that nothing is executed.

    allowed: paths of the classes and functions that it may name (TorchDistError for another); None for any
    that does not serve to execute something. A damaged pickle raises anything.
    """
    return _Unpickler(pickled, allowed).load()


def dump(value: Any) -> bytes:
    """The pickle of plain values and Foreign: of `state` where there is one, else of the call with `args`."""
    return b"\x80\x02" + _fragment(value) + b"."


class Pid(tuple[Any, ...]):
    """A persistent id: how a pickle refers to a storage."""


def _fragment(value: Any) -> bytes:
    if isinstance(value, type):
        return f"c{value.__module__}\n{value.__name__}\n".encode()
    if isinstance(value, Foreign):
        kind = _fragment(type(value))
        if value.state is None:
            return kind + _fragment(value.args) + b"R"
        return kind + b")\x81" + _fragment(value.state) + b"b"
    if isinstance(value, dict):
        return b"}(" + b"".join(_fragment(k) + _fragment(v) for k, v in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_fragment, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_fragment, value)) + (b"tQ" if isinstance(value, Pid) else b"t")
    return pickle.dumps(value, 2)[2:-1]


class _View(io.RawIOBase):
    """Bytes [offset, offset + length) of an open file, as far as zipfile needs a file."""

    def __init__(self, file: int, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def seek(self, to: int, whence: int = os.SEEK_SET) -> int:
        self._position = to + (0, self._position, self._length)[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = self._length - self._position
        data = os.pread(
            self._file, left if size < 0 else min(size, left), self._offset + self._position
        )
        self._position += len(data)
        return data


class Container:
    """The records of what torch.save wrote into bytes [offset, offset + length) of an open file."""

    def __init__(self, file: int, offset: int, length: int) -> None:
        if offset + length > (size := os.fstat(file).st_size):
            raise TorchDistError(
                f"truncated: bytes {offset} to {offset + length} of {size} are expected"
            )
        self._file, self._offset, self._length = file, offset, length
        try:
            records = zipfile.ZipFile(_View(file, offset, length)).infolist()
        except zipfile.BadZipFile as error:
            raise TorchDistError(
                f"no container of torch.save, the only one read here: {error}"
            ) from error
        self._records = {record.filename.partition("/")[2]: record for record in records}

    def find(self, name: str) -> tuple[int, int]:
        """(offset in the file, size) of a record."""
        if (record := self._records.get(name)) is None:
            raise TorchDistError(
                f"its container has no record {name}, only {', '.join(self._records)}"
            )
        local = os.pread(self._file, _LOCAL.size, self._offset + record.header_offset)
        magic, *_, name_length, extra_length = _LOCAL.unpack(local)
        start, size = (
            record.header_offset + _LOCAL.size + name_length + extra_length,
            record.file_size,
        )
        stored = (
            not record.compress_type and not record.flag_bits & 1 and record.compress_size == size
        )
        if magic != b"PK\3\4" or not stored or start + size > self._length:
            raise TorchDistError(
                f"its container does not hold the record {name} as it is, uncompressed"
            )
        return self._offset + start, size

    def content(self, name: str) -> bytes:
        start, size = self.find(name)
        return os.pread(self._file, size, start)

    def tensor(self) -> tuple[str, tuple[int, ...], int]:
        """(dtype, shape, offset of the data in the file) of the one contiguous tensor that it holds."""
        dtype, shape, key = _describe(self.content("data.pkl"))
        if "byteorder" in self._records and self.content("byteorder") != b"little":
            raise TorchDistError("its bytes are not in little-endian order")
        start, size = self.find(f"data/{key}")
        if size != math.prod(shape) * DTYPE_BYTES[dtype]:
            raise TorchDistError(f"it describes {dtype} {list(shape)} and holds {size} bytes")
        return dtype, shape, start


@lru_cache(maxsize=4096)
def _describe(pickled: bytes) -> tuple[str, tuple[int, ...], str]:
    """(dtype, shape, key of the storage) of a tensor; TorchDistError if it is not all of a storage."""
    value = load(pickled, _OF_TENSORS)
    kind = type(value).__name__
    if not kind.startswith("_rebuild_tensor"):
        raise TorchDistError(f"it holds a {kind}, not one plain tensor")
    (_, storage, key, _, count), start, shape, strides, *_ = value.args
    untyped = storage.__name__ == "UntypedStorage"
    dtype = DTYPE_NAMES[(value.args[6] if untyped else storage).__name__]
    whole = math.prod(shape) * (DTYPE_BYTES[dtype] if untyped else 1)
    if start or count != whole or len(value.args) > 6 + untyped:  # one more marks a negated view
        raise TorchDistError(f"its tensor {list(shape)} is a view: {count} stored, offset {start}")
    by_axis = zip(shape, strides, _strides(shape), strict=True)
    if any(stride != dense for size, stride, dense in by_axis if size != 1):
        raise TorchDistError(f"its tensor {list(shape)} is not contiguous: strides {list(strides)}")
    return dtype, tuple(shape), key


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def archive(pickled: bytes, data_bytes: int | None = None) -> tuple[bytes, bytes]:
    """What torch.save writes before and after `data_bytes` bytes of one storage (None: has none).

    The checksum of the data stands as 0: torch does not look at it, and writes none after
    `torch.serialization.set_crc32_options(False)`.
    """
    head, directory = b"", b""
    records = {
        "data.pkl": pickled,
        ".format_version": b"1",
        ".storage_alignment": b"%d" % _ALIGNMENT,
    }
    records |= {"byteorder": b"little", "version": b"3\n"} | (
        {} if data_bytes is None else {"data/0": b""}
    )
    for name, content in records.items():
        path = f"archive/{name}".encode()
        size = data_bytes or 0 if name == "data/0" else len(content)
        wide = struct.pack("<2H2Q", 1, 16, size, size) if size >= _MAX32 else b""
        sizes = (zlib.crc32(content), min(size, _MAX32), min(size, _MAX32), len(path))
        padding = -(len(head) + _LOCAL.size + len(path) + len(wide) + 4) % _ALIGNMENT
        extra = wide + struct.pack("<2sH", b"FB", padding) + bytes(padding)
        directory += _ENTRY.pack(
            b"PK\1\2", 45, 45, 0, 0, 0, 0, *sizes, len(wide), 0, 0, 0, 0, len(head)
        )
        directory += path + wide
        head += _LOCAL.pack(b"PK\3\4", 45, 0, 0, 0, 0, *sizes, len(extra)) + path + extra + content
    count, start = len(records), len(head) + (data_bytes or 0)
    end = (b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start)
    locator = (b"PK\6\7", 0, start + len(directory), 1)
    old_end = (b"PK\5\6", 0, 0, count, count, len(directory), min(start, _MAX32), 0)
    return head, directory + _END.pack(*end, *locator, *old_end)


@lru_cache(maxsize=4096)
def container(dtype: str, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the bytes of a contiguous CPU tensor; see `archive`.

    The data begin at a multiple of 64 bytes of the container.
    """
    torch_name, storage = DTYPES[dtype]
    size, typed = math.prod(shape) * DTYPE_BYTES[dtype], bool(storage)
    kind = foreign(f"torch.{storage}" if typed else "torch.storage.UntypedStorage")
    stored = Pid(("storage", kind, "0", "cpu", math.prod(shape) if typed else size))
    rebuild = foreign(f"torch._utils._rebuild_tensor_v{2 if typed else 3}")
    last = () if typed else (foreign(f"torch.{torch_name}"),)
    hooks = foreign("collections.OrderedDict")()
    return archive(dump(rebuild(stored, 0, shape, _strides(shape), False, hooks, *last)), size)


OBJECT_STUB = b"".join(
    archive(dump([None]))
)  # what megatron-core saves for an _extra_state that is None
