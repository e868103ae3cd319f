"""Safetensors files without torch: headers, read and checked, and checkpoints written as a stream.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the
tensors' bytes without holes; offsets count from the end of the header (https://github.com/huggingface/safetensors).
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
SIDE = "hf"  # beside a Megatron checkpoint: configuration and tokenizer of the Hugging Face one
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
Spec = tuple[
    str, str, tuple[int, ...]
]  # of a tensor: its name, dtype as safetensors names it, shape


class SafetensorsError(RunError):
    """A checkpoint's files are missing, damaged or contradict one another."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: bytes [start, stop) of `file`, counted from the file's beginning."""

    file: Path
    dtype: str  # as safetensors names it: F32, BF16 ...
    shape: tuple[int, ...]
    start: int
    stop: int


def read_headers(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a Hugging Face checkpoint directory, by name; no tensor data is read.

    Raises SafetensorsError for a missing or truncated file, a bad header, overlapping tensors, and an index
    that disagrees with its files.
    """
    if not (directory / INDEX_FILE).exists():
        if not (directory / SINGLE_FILE).exists():
            kind = "holds" if directory.is_dir() else "is not a directory: it holds"
            raise SafetensorsError(f"{directory} {kind} neither {SINGLE_FILE} nor {INDEX_FILE}")
        return read_file_header(directory / SINGLE_FILE)
    index = read_json(directory / INDEX_FILE).get("weight_map", {})
    found: dict[str, TensorInfo] = {}
    for file in sorted(set(index.values())):
        if not (directory / file).exists():
            raise SafetensorsError(f"{directory / file} is missing; {INDEX_FILE} lists it")
        held = read_file_header(directory / file)
        if twice := sorted(held.keys() & found.keys()):
            raise SafetensorsError(
                f"{directory / file} holds {twice[0]}, and so does {found[twice[0]].file}"
            )
        found |= held
    for name, file in index.items():
        if name not in found or found[name].file.name != file:
            raise SafetensorsError(
                f"{directory / file} does not hold {name}, although {INDEX_FILE} says so"
            )
    for name in found.keys() - index.keys():
        raise SafetensorsError(f"{found[name].file} holds {name}, which {INDEX_FILE} does not list")
    return found


def read_file_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes."""
    size, head = path.stat().st_size, read_head(path)
    tensors = parse_head(path, head)
    stop = max((info.stop for info in tensors.values()), default=len(head))
    if stop != size:
        kind = "truncated" if size < stop else "too long"
        raise SafetensorsError(f"{path} is {kind}: {size} bytes, its header describes {stop}")
    return tensors


def read_head(path: Path) -> bytes:
    """The first bytes of a safetensors file, up to its tensors."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
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
    ordered = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop))
    position = len(head)
    for name, info in ordered:
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
    return dict(ordered)


def _info(path: Path, entry: dict[str, Any], data_start: int) -> TensorInfo:
    if entry["dtype"] not in DTYPE_BYTES:
        raise ValueError(f"dtype {entry['dtype']!r} is none of {', '.join(DTYPE_BYTES)}")
    start, stop = entry["data_offsets"]
    return TensorInfo(
        path, entry["dtype"], tuple(entry["shape"]), data_start + start, data_start + stop
    )


def plan_files(
    tensors: Iterable[Spec], max_shard_bytes: int = 5_000_000_000
) -> tuple[dict[str, bytes], dict[str, Any] | None]:
    """File name -> its first bytes, for the tensors in order; and the content of the index, None for a single
    file. A file has at most `max_shard_bytes`, or one larger tensor.

    Raises ValueError for an unknown dtype, a name that stands twice, and no tensors at all.
    """
    shards: list[dict[str, Any]] = [{}]
    shard_of: dict[str, int] = {}
    stop = total = 0
    for name, dtype, shape in tensors:
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"{name}: dtype {dtype!r} is none of {', '.join(DTYPE_BYTES)}")
        if name in shard_of:
            raise ValueError(f"a tensor is declared twice: {name}")
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        if shards[-1] and stop + size > max_shard_bytes:
            shards.append({})
            stop = 0
        start, stop, total = stop, stop + size, total + size
        shards[-1][name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        shard_of[name] = len(shards)
    if not shard_of:
        raise ValueError("a checkpoint without tensors")
    if len(shards) == 1:
        return {SINGLE_FILE: _head(shards[0])}, None
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map = {name: files[shard - 1] for name, shard in shard_of.items()}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return {file: _head(shard) for file, shard in zip(files, shards, strict=True)}, index


def _head(tensors: dict[str, Any]) -> bytes:
    text = json.dumps({"__metadata__": {"format": "pt"}, **tensors}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_files(
    directory: Path,
    specs: Iterable[Spec],
    tensors: Iterable[tuple[str, Any]],
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Stream (name, contiguous buffer), in the order of `specs` (see plan_files), into safetensors files.

    At most one tensor is in memory: the caller's. Raises ValueError for one that is missing or not declared.
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
                data, size = memoryview(buffer), info.stop - info.start
                if data.nbytes != size:
                    raise ValueError(
                        f"{name}: {data.nbytes} bytes came, its dtype and shape declare {size}"
                    )
                if size:
                    file.write(data.cast("B"))
    if extra := next(incoming, None):
        raise ValueError(f"{extra[0]} was handed over after the last declared tensor")
    if index:
        publish_json(directory / INDEX_FILE, index)


def copy_other_files(source: Path, target: Path) -> None:
    """Copy what stands beside the weights of a Hugging Face checkpoint: configuration, tokenizer, code."""
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if (
            path.is_file()
            and not path.name.endswith(_WEIGHT_SUFFIXES)
            and path.name != "manifest.json"
        ):
            shutil.copy2(path, target / path.name)
