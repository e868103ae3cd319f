"""What torch.save writes, read and written without torch: zip containers and pickles.

Loading a pickle here executes nothing that the pickle names. A container is a zip of
uncompressed records: data.pkl describes the objects, data/<key> is the storage of a
tensor (the format is that of torch/csrc/jit/serialization and
caffe2/serialize/inline_container.cc of torch 2.13).
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

# A dtype as safetensors names it: torch's dtype, and the class of its storage in a
# pickle. A dtype without a storage class lies in an UntypedStorage.
DTYPES = {
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
# torch's dtype or storage class: the dtype as safetensors names it.
DTYPE_NAMES = {
    torch_name: dtype
    for dtype, torch_names in DTYPES.items()
    for torch_name in torch_names
    if torch_name
}
_TENSOR_GLOBALS = {f"torch.{name}" for name in DTYPE_NAMES} | {
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
# No value is made by these: whoever wrote them into a pickle wanted to execute something.
_HARMFUL = re.compile(
    r"(os|posix|nt|sys|subprocess|shutil|socket|importlib|runpy|ctypes|pty|code|pdb|webbrowser)\."
    r"|(builtins|__builtin__)\.(eval|exec|compile|open|__import__|breakpoint)$"
)

# The structures of a zip file, as PKWARE's APPNOTE.TXT lays them out.
_DIRECTORY_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_ZIP64_SIZES = struct.Struct("<2H2Q")
_ZIP64_END = struct.Struct("<4sQ2H2I4Q")
_ZIP64_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")
_ZIP_VERSION = 45  # the first version of the format that knows zip64
_MAX_UINT32 = 0xFFFFFFFF
_ALIGNMENT = 64  # of the records in a container, in bytes


class TorchDistError(RunError):
    """A checkpoint is damaged, is not torch_dist, or holds something that is refused.

    The message names the file.
    """


@contextmanager
def naming(place: object) -> Iterator[None]:
    """Turns every error of the block into a TorchDistError that names `place`."""
    try:
        yield
    except RunError as error:
        raise TorchDistError(f"{place}: {error}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise TorchDistError(f"{place} is damaged: {type(error).__name__}: {error}") from error


class Foreign:
    """Stands for an object whose class is not imported here.

    It holds the arguments that the object is made with, or its state. The entries of a
    state that is a dictionary can be read as attributes. Items that a pickle appends to
    the object are dropped.
    """

    args: tuple[Any, ...]
    state: Any
    __slots__ = ("args", "state")

    def __new__(cls, *args: Any, **_: Any) -> Foreign:
        instance = super().__new__(cls)
        instance.args = args
        instance.state = None
        return instance

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getattr__(self, name: str) -> Any:
        state = object.__getattribute__(self, "state")
        if isinstance(state, dict) and name in state:
            return state[name]
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def __setitem__(self, key: Any, value: Any) -> None: ...
    def extend(self, values: Any) -> None: ...


@lru_cache(maxsize=4096)
def foreign(path: str) -> type[Foreign]:
    """The class that stands for the class or function `path` ("module.name").

    Calling the result makes a Foreign with these arguments.
    """
    module, _, name = path.rpartition(".")
    return type(name, (Foreign,), {"__module__": module, "__slots__": ()})


def foreign_object(path: str, state: Any) -> Foreign:
    """An object of the class `path` that has this state."""
    instance = foreign(path)()
    instance.state = state
    return instance


class _Unpickler(pickle.Unpickler):
    """Replaces every class and function that a pickle names by a Foreign."""

    def __init__(self, pickled: bytes, allowed: Collection[str] | None) -> None:
        super().__init__(io.BytesIO(pickled))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> type:
        path = f"{module}.{name}"
        if path in _PLAIN:
            return _PLAIN[path]
        unexpected = self._allowed is not None and path not in self._allowed
        if unexpected or _HARMFUL.match(path):
            raise TorchDistError(f"its pickle names {path}, which does not belong there: refused")
        return foreign(path)

    def persistent_load(self, pid: Any) -> Any:
        return pid


def load(pickled: bytes, allowed: Collection[str] | None) -> Any:
    """The value of a pickle, with a Foreign in place of every object that is not Python's own.

    Nothing that the pickle names is executed. `allowed` lists the paths of the classes
    and functions that the pickle may name; None allows every path that does not serve to
    execute something.

    Raises TorchDistError for a path that is not allowed. A damaged pickle may raise any
    exception.
    """
    return _Unpickler(pickled, allowed).load()


class PersistentId(tuple[Any, ...]):
    """How a pickle refers to a storage."""


def dump(value: Any) -> bytes:
    """The pickle (protocol 2) of plain values and Foreign objects.

    A Foreign that has a state is written as class and state, any other one as a call with
    its `args`.
    """
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value: Any) -> bytes:
    """The pickle opcodes that push `value` onto the stack."""
    if isinstance(value, type):
        return f"c{value.__module__}\n{value.__name__}\n".encode()
    if isinstance(value, Foreign):
        kind = _opcodes(type(value))
        if value.state is None:
            return kind + _opcodes(value.args) + b"R"
        return kind + b")\x81" + _opcodes(value.state) + b"b"
    if isinstance(value, dict):
        items = b"".join(_opcodes(key) + _opcodes(item) for key, item in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_opcodes, value)) + b"e"
    if isinstance(value, tuple):
        pushed = b"(" + b"".join(map(_opcodes, value)) + b"t"
        if isinstance(value, PersistentId):
            return pushed + b"Q"
        return pushed
    protocol_and_stop_removed = pickle.dumps(value, 2)[2:-1]
    return protocol_and_stop_removed


class _FileRange(io.RawIOBase):
    """Bytes [offset, offset + length) of an open file, as far as zipfile needs a file."""

    def __init__(self, file: int, offset: int, length: int) -> None:
        self._file = file
        self._offset = offset
        self._length = length
        self._position = 0

    def seek(self, to: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}
        self._position = to + base[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = self._length - self._position
        count = left if size < 0 else min(size, left)
        data = os.pread(self._file, count, self._offset + self._position)
        self._position += len(data)
        return data


class Container:
    """The records that torch.save wrote into bytes [offset, offset + length) of an open
    file.
    """

    def __init__(self, file: int, offset: int, length: int) -> None:
        size = os.fstat(file).st_size
        if offset + length > size:
            raise TorchDistError(
                f"truncated: bytes {offset} to {offset + length} of {size} are expected"
            )
        self._file = file
        self._offset = offset
        self._length = length
        try:
            records = zipfile.ZipFile(_FileRange(file, offset, length)).infolist()
        except zipfile.BadZipFile as error:
            raise TorchDistError(
                f"no container of torch.save, the only one read here: {error}"
            ) from error
        self._records = {record.filename.partition("/")[2]: record for record in records}

    def find(self, name: str) -> tuple[int, int]:
        """(offset in the file, size) of a record, in bytes."""
        record = self._records.get(name)
        if record is None:
            held = ", ".join(self._records)
            raise TorchDistError(f"its container has no record {name}, only {held}")
        header = os.pread(self._file, _LOCAL_HEADER.size, self._offset + record.header_offset)
        magic, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        size = record.file_size
        start = record.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        compressed = record.compress_type != 0 or record.compress_size != size
        encrypted = record.flag_bits & 1 != 0
        outside = start + size > self._length
        if magic != b"PK\3\4" or compressed or encrypted or outside:
            raise TorchDistError(
                f"its container does not hold the record {name} as it is, uncompressed"
            )
        return self._offset + start, size

    def content(self, name: str) -> bytes:
        """The bytes of a record."""
        start, size = self.find(name)
        return os.pread(self._file, size, start)

    def tensor(self) -> tuple[str, tuple[int, ...], int]:
        """(dtype, shape, offset of the data in the file) of the one contiguous tensor it
        holds.
        """
        dtype, shape, key = _describe(self.content("data.pkl"))
        if "byteorder" in self._records and self.content("byteorder") != b"little":
            raise TorchDistError("its bytes are not in little-endian order")
        start, size = self.find(f"data/{key}")
        if size != math.prod(shape) * DTYPE_BYTES[dtype]:
            raise TorchDistError(f"it describes {dtype} {list(shape)} and holds {size} bytes")
        return dtype, shape, start


@lru_cache(maxsize=4096)
def _describe(pickled: bytes) -> tuple[str, tuple[int, ...], str]:
    """(dtype, shape, key of the storage) of the tensor that data.pkl describes.

    Raises TorchDistError for a tensor that is not all of its storage, row by row.
    """
    value = load(pickled, _TENSOR_GLOBALS)
    kind = type(value).__name__
    if not kind.startswith("_rebuild_tensor"):
        raise TorchDistError(f"it holds a {kind}, not one plain tensor")
    (_, storage, key, _, storage_length), start, shape, strides, *_ = value.args
    # An UntypedStorage counts bytes, and its tensor has one argument more: the dtype.
    # A tensor with a further argument is a negated or conjugated view.
    if storage.__name__ == "UntypedStorage":
        dtype = DTYPE_NAMES[value.args[6].__name__]
        expected_length = math.prod(shape) * DTYPE_BYTES[dtype]
        num_arguments = 7
    else:
        dtype = DTYPE_NAMES[storage.__name__]
        expected_length = math.prod(shape)
        num_arguments = 6
    if start or storage_length != expected_length or len(value.args) > num_arguments:
        raise TorchDistError(
            f"its tensor {list(shape)} is a view: {storage_length} stored, offset {start}"
        )
    for size, stride, dense_stride in zip(shape, strides, _strides(shape), strict=True):
        if size != 1 and stride != dense_stride:
            raise TorchDistError(
                f"its tensor {list(shape)} is not contiguous: strides {list(strides)}"
            )
    return dtype, tuple(shape), key


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def archive(pickled: bytes, data_bytes: int | None = None) -> tuple[bytes, bytes]:
    """What torch.save writes before and after `data_bytes` bytes of one storage.

    None: the container has no storage. The checksum of the data is written as 0: torch
    does not look at it, and writes none itself after
    `torch.serialization.set_crc32_options(False)`.
    """
    records = {
        "data.pkl": pickled,
        ".format_version": b"1",
        ".storage_alignment": b"%d" % _ALIGNMENT,
        "byteorder": b"little",
        "version": b"3\n",
    }
    head = b""
    directory = b""
    for name, content in records.items():
        header, entry = _record_headers(name, zlib.crc32(content), len(content), len(head))
        head += header + content
        directory += entry
    num_records = len(records)
    if data_bytes is not None:
        header, entry = _record_headers("data/0", 0, data_bytes, len(head))
        head += header
        directory += entry
        num_records += 1
    directory_start = len(head) + (data_bytes or 0)
    return head, directory + _end_of_archive(num_records, len(directory), directory_start)


def _record_headers(name: str, crc32: int, size: int, offset: int) -> tuple[bytes, bytes]:
    """(the bytes in front of a record that lies at `offset`, its entry in the zip's
    directory).
    """
    path = f"archive/{name}".encode()
    zip64_sizes = b""
    if size >= _MAX_UINT32:
        zip64_sizes = _ZIP64_SIZES.pack(1, 16, size, size)
    sizes = (crc32, min(size, _MAX_UINT32), min(size, _MAX_UINT32), len(path))
    padding_header_bytes = 4
    unpadded = offset + _LOCAL_HEADER.size + len(path) + len(zip64_sizes) + padding_header_bytes
    padding = -unpadded % _ALIGNMENT
    extra = zip64_sizes + struct.pack("<2sH", b"FB", padding) + bytes(padding)
    header = _LOCAL_HEADER.pack(b"PK\3\4", _ZIP_VERSION, 0, 0, 0, 0, *sizes, len(extra))
    versions = (_ZIP_VERSION, _ZIP_VERSION)
    rest = (len(zip64_sizes), 0, 0, 0, 0, offset)
    entry = _DIRECTORY_ENTRY.pack(b"PK\1\2", *versions, 0, 0, 0, 0, *sizes, *rest)
    return header + path + extra, entry + path + zip64_sizes


def _end_of_archive(num_records: int, directory_bytes: int, directory_start: int) -> bytes:
    """Everything after the directory of a zip file: the ends of zip64 and of zip."""
    bytes_after_this_field = 44
    zip64_end = _ZIP64_END.pack(
        b"PK\6\6",
        bytes_after_this_field,
        _ZIP_VERSION,
        _ZIP_VERSION,
        0,
        0,
        num_records,
        num_records,
        directory_bytes,
        directory_start,
    )
    locator = _ZIP64_LOCATOR.pack(b"PK\6\7", 0, directory_start + directory_bytes, 1)
    end = _END.pack(
        b"PK\5\6",
        0,
        0,
        num_records,
        num_records,
        directory_bytes,
        min(directory_start, _MAX_UINT32),
        0,
    )
    return zip64_end + locator + end


@lru_cache(maxsize=4096)
def tensor_container(dtype: str, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the bytes of a contiguous CPU tensor; see
    `archive`.

    The data begin at a multiple of 64 bytes of the container.
    """
    num_elements = math.prod(shape)
    num_bytes = num_elements * DTYPE_BYTES[dtype]
    torch_dtype, storage_class = DTYPES[dtype]
    no_hooks = foreign("collections.OrderedDict")()
    if storage_class:
        storage = foreign(f"torch.{storage_class}")
        stored = PersistentId(("storage", storage, "0", "cpu", num_elements))
        rebuild = foreign("torch._utils._rebuild_tensor_v2")
        tensor = rebuild(stored, 0, shape, _strides(shape), False, no_hooks)
    else:
        storage = foreign("torch.storage.UntypedStorage")
        stored = PersistentId(("storage", storage, "0", "cpu", num_bytes))
        rebuild = foreign("torch._utils._rebuild_tensor_v3")
        element_type = foreign(f"torch.{torch_dtype}")
        tensor = rebuild(stored, 0, shape, _strides(shape), False, no_hooks, element_type)
    return archive(dump(tensor), num_bytes)


def object_container(value: Any) -> bytes:
    """What torch.save writes for a value that consists of Python's plain values only.

    Raises TorchDistError for an object of any class.
    """
    pickled = pickle.dumps(value, 2)
    no_classes = frozenset[str]()
    load(pickled, no_classes)
    head, tail = archive(pickled)
    return head + tail


# megatron-core saves an _extra_state that is None so.
EMPTY_OBJECT = object_container([None])
