"""Safetensors files without torch: headers, read and checked, and checkpoints written as
a stream.

A file is 8 bytes with the little-endian length of the header, a JSON header {name:
{dtype, shape, data_offsets}}, and the tensors' bytes without holes; the offsets count
from the end of the header (https://github.com/huggingface/safetensors).
"""

import json
import math
import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoslime.storage.shared_files import publish_json, read_json
from nanoslime.types import RunError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
METADATA_DIR = "hf"  # beside a Megatron checkpoint: configuration and tokenizer of the model
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "BOOL": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
}
_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
)
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_SHARD_BYTES = 5_000_000_000

# A tensor as it is declared: name, dtype (as safetensors names it), shape.
Spec = tuple[str, str, tuple[int, ...]]


class SafetensorsError(RunError):
    """A checkpoint's files are missing, damaged or contradict one another."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: bytes [start, stop) of `file`, counted from the file's beginning.

    The dtype is named as safetensors does: F32, BF16 ...
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_headers(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a Hugging Face checkpoint directory, by name; no tensor data is read.

    Raises SafetensorsError for a missing or truncated file, a bad header, overlapping
    tensors, and an index that disagrees with its files.
    """
    if (directory / INDEX_FILE).exists():
        weight_map = read_json(directory / INDEX_FILE).get("weight_map", {})
        return _read_sharded_headers(directory, weight_map)
    if (directory / SINGLE_FILE).exists():
        return read_file_header(directory / SINGLE_FILE)
    if directory.is_dir():
        raise SafetensorsError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    raise SafetensorsError(
        f"{directory} is not a directory: it holds neither {SINGLE_FILE} nor {INDEX_FILE}"
    )


def _read_sharded_headers(directory: Path, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
    """The tensors of all files that the index lists; `weight_map` maps a tensor to its file."""
    found: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        path = directory / file
        if not path.exists():
            raise SafetensorsError(f"{path} is missing; {INDEX_FILE} lists it")
        for name, info in read_file_header(path).items():
            if name in found:
                raise SafetensorsError(f"{path} holds {name}, and so does {found[name].file}")
            found[name] = info
    for name, file in weight_map.items():
        if name not in found or found[name].file.name != file:
            raise SafetensorsError(
                f"{directory / file} does not hold {name}, although {INDEX_FILE} says so"
            )
    for name, info in found.items():
        if name not in weight_map:
            raise SafetensorsError(f"{info.file} holds {name}, which {INDEX_FILE} does not list")
    return found


def read_file_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes."""
    size = path.stat().st_size
    head = read_head(path)
    tensors = parse_head(path, head)
    described = max((info.stop for info in tensors.values()), default=len(head))
    if size < described:
        raise SafetensorsError(
            f"{path} is truncated: {size} bytes, its header describes {described}"
        )
    if size > described:
        raise SafetensorsError(
            f"{path} is too long: {size} bytes, its header describes {described}"
        )
    return tensors


def read_head(path: Path) -> bytes:
    """The first bytes of a safetensors file, up to its tensors."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = -1
        if len(prefix) == 8:
            (length,) = struct.unpack("<Q", prefix)
        if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise SafetensorsError(
                f"{path} is truncated or not safetensors: {size} bytes, header {length}"
            )
        return prefix + file.read(length)


def parse_head(path: Path, head: bytes) -> dict[str, TensorInfo]:
    """The tensors that the first bytes of `path` describe, in the order of their bytes."""
    try:
        entries = json.loads(head[8:])
        entries.pop("__metadata__", None)
        tensors = {name: _info(path, entry, len(head)) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SafetensorsError(
            f"{path} has a broken header: {type(error).__name__}: {error}"
        ) from error
    ordered = dict(sorted(tensors.items(), key=_place))
    position = len(head)
    for name, info in ordered.items():
        if info.start != position:
            raise SafetensorsError(
                f"{path}: {name} is at byte {info.start}, not {position}: overlap or hole"
            )
        size_bytes = info.stop - info.start
        if size_bytes != math.prod(info.shape) * DTYPE_BYTES[info.dtype]:
            raise SafetensorsError(
                f"{path}: {name} is {info.dtype} {list(info.shape)} in {size_bytes} bytes"
            )
        position = info.stop
    return ordered


def _place(item: tuple[str, TensorInfo]) -> tuple[int, int]:
    _, info = item
    return info.start, info.stop


def _info(path: Path, entry: dict[str, Any], data_start: int) -> TensorInfo:
    dtype = entry["dtype"]
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPE_BYTES)}")
    start, stop = entry["data_offsets"]
    return TensorInfo(path, dtype, tuple(entry["shape"]), data_start + start, data_start + stop)


def plan_files(
    tensors: Iterable[Spec], max_shard_bytes: int = _MAX_SHARD_BYTES
) -> tuple[dict[str, bytes], dict[str, Any] | None]:
    """(file name -> its first bytes, content of the index) for the tensors in order.

    The index is None for a single file. A file has at most `max_shard_bytes`, or one
    larger tensor.

    Raises ValueError for an unknown dtype, a name that stands twice, and no tensors at all.
    """
    shards: list[dict[str, Any]] = [{}]
    shard_of: dict[str, int] = {}
    position = 0
    total_bytes = 0
    for name, dtype, shape in tensors:
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"{name}: dtype {dtype!r} is none of {', '.join(DTYPE_BYTES)}")
        if name in shard_of:
            raise ValueError(f"a tensor is declared twice: {name}")
        num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
        if shards[-1] and position + num_bytes > max_shard_bytes:
            shards.append({})
            position = 0
        offsets = [position, position + num_bytes]
        shards[-1][name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        shard_of[name] = len(shards)
        position += num_bytes
        total_bytes += num_bytes
    if not shard_of:
        raise ValueError("a checkpoint without tensors")
    if len(shards) == 1:
        return {SINGLE_FILE: _head(shards[0])}, None
    heads = {}
    for number, shard in enumerate(shards, 1):
        heads[_shard_name(number, len(shards))] = _head(shard)
    weight_map = {name: _shard_name(number, len(shards)) for name, number in shard_of.items()}
    return heads, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}


def _shard_name(number: int, num_shards: int) -> str:
    return f"model-{number:05d}-of-{num_shards:05d}.safetensors"


def _head(tensors: dict[str, Any]) -> bytes:
    """The first bytes of a file with these entries; transformers wants the format named."""
    entries = {"__metadata__": {"format": "pt"}, **tensors}
    text = json.dumps(entries, separators=(",", ":")).encode()
    padding = b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) + len(padding)) + text + padding


def write_files(
    directory: Path,
    specs: Iterable[Spec],
    tensors: Iterable[tuple[str, Any]],
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """Stream (name, contiguous buffer), in the order of `specs`, into the files of
    `plan_files`.

    At most one tensor is in memory: the caller's. Raises ValueError for a tensor that is
    missing or not declared.
    """
    heads, index = plan_files(specs, max_shard_bytes)
    incoming = iter(tensors)
    for file_name, head in heads.items():
        path = directory / file_name
        with open(path, "wb") as file:
            file.write(head)
            for expected, info in parse_head(path, head).items():
                name, buffer = next(incoming, ("no further tensor", b""))
                if name != expected:
                    raise ValueError(
                        f"{name} was handed over where {expected} is next in the declared order"
                    )
                data = memoryview(buffer)
                declared_bytes = info.stop - info.start
                if data.nbytes != declared_bytes:
                    raise ValueError(
                        f"{name}: {data.nbytes} bytes came, "
                        f"its dtype and shape declare {declared_bytes}"
                    )
                if declared_bytes:  # an empty view cannot be cast
                    file.write(data.cast("B"))
    extra = next(incoming, None)
    if extra is not None:
        raise ValueError(f"{extra[0]} was handed over after the last declared tensor")
    if index is not None:
        publish_json(directory / INDEX_FILE, index)


def copy_other_files(source: Path, target: Path) -> None:
    """Copy what stands beside the weights of a Hugging Face checkpoint.

    That is configuration, tokenizer and code, but no manifest.
    """
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        is_weight = path.name.endswith(_WEIGHT_SUFFIXES)
        if path.is_file() and not is_weight and path.name != "manifest.json":
            shutil.copy2(path, target / path.name)
