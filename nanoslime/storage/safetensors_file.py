"""Safetensors files without torch: headers, read and checked, and a streaming writer of checkpoints.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the
tensors' bytes without holes; offsets count from the end of the header (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nanoslime.storage.shared_files import publish_json, read_json
from nanoslime.types import RunError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


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
        found.update(read_file_header(directory / file))
    for name, file in index.items():
        if name not in found or found[name].file.name != file:
            raise SafetensorsError(f"{directory / file} does not hold {name}, although {INDEX_FILE} says so")
    for name in found.keys() - index.keys():
        raise SafetensorsError(f"{found[name].file} holds {name}, which {INDEX_FILE} does not list")
    return found


def read_file_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise SafetensorsError(
                f"{path} is truncated or no safetensors file: {size} bytes, header {length}"
            )
        header = file.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _info(path, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SafetensorsError(f"{path} has a broken header: {type(error).__name__}: {error}") from error
    ordered = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop))
    position = 8 + length
    for name, info in ordered:
        if info.start != position:
            raise SafetensorsError(
                f"{path}: {name} starts at byte {info.start}, not {position}: overlap or hole"
            )
        size_bytes = info.stop - info.start
        if size_bytes != math.prod(info.shape) * DTYPE_BYTES[info.dtype]:
            raise SafetensorsError(f"{path}: {name} is {info.dtype} {list(info.shape)} in {size_bytes} bytes")
        position = info.stop
    if position != size:
        kind = "truncated" if size < position else "too long"
        raise SafetensorsError(f"{path} is {kind}: {size} bytes, its header describes {position}")
    return dict(ordered)


def _info(path: Path, entry: dict[str, Any], data_start: int) -> TensorInfo:
    if entry["dtype"] not in DTYPE_BYTES:
        raise ValueError(f"dtype {entry['dtype']!r} is none of {', '.join(DTYPE_BYTES)}")
    start, stop = entry["data_offsets"]
    return TensorInfo(path, entry["dtype"], tuple(entry["shape"]), data_start + start, data_start + stop)


class HFCheckpointWriter(AbstractContextManager["HFCheckpointWriter"]):
    """Writes tensors, declared beforehand and handed over in that order, into sharded safetensors files.

    tensors: (name, safetensors dtype, shape). As a context manager it closes when the block succeeds.
    At most one tensor is in memory: the caller's.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Iterable[tuple[str, str, tuple[int, ...]]],
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        self._directory = directory
        self._shards = _split(tensors, max_shard_bytes)
        count = len(self._shards)
        self._files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            self._files = [SINGLE_FILE]
        parts = [(i, name, entry) for i, shard in enumerate(self._shards) for name, entry in shard.items()]
        self._todo = [(name, _num_bytes(entry), i) for i, name, entry in reversed(parts)]
        self._open_shard = -1
        self._file: BinaryIO | None = None

    def write(self, name: str, buffer: Any) -> None:
        """Append the bytes of the next tensor; `buffer` is contiguous and supports the buffer protocol."""
        expected, size, shard = self._todo[-1] if self._todo else ("no further tensor", 0, 0)
        if name != expected:
            raise ValueError(f"{name} was handed over where {expected} is next in the declared order")
        data = memoryview(buffer)
        if data.nbytes != size:
            raise ValueError(f"{name}: {data.nbytes} bytes handed over, dtype and shape declare {size}")
        if shard != self._open_shard:
            self._start_shard(shard)
        if size:
            assert self._file is not None
            self._file.write(data.cast("B"))
        self._todo.pop()

    def close(self) -> None:
        """End the last file; write the index where there are several. ValueError if a tensor is missing."""
        if self._todo:
            raise ValueError(f"{len(self._todo)} declared tensors not written, first {self._todo[-1][0]}")
        self._end_shard()
        if len(self._shards) > 1:
            named = zip(self._files, self._shards, strict=True)
            weight_map = {name: file for file, shard in named for name in shard}
            total = sum(_num_bytes(entry) for shard in self._shards for entry in shard.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            publish_json(self._directory / INDEX_FILE, index)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._end_shard()

    def _start_shard(self, shard: int) -> None:
        self._end_shard()
        header = {"__metadata__": {"format": "pt"}, **self._shards[shard]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = open(self._directory / self._files[shard], "wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._open_shard = shard

    def _end_shard(self) -> None:
        if self._file is not None:
            self._file.close()


def _split(tensors: Iterable[tuple[str, str, tuple[int, ...]]], max_shard_bytes: int) -> list[dict[str, Any]]:
    """The headers of shards of at most `max_shard_bytes` (a larger tensor goes alone), in the given order."""
    shards: list[dict[str, Any]] = [{}]
    stop = 0
    for name, dtype, shape in tensors:
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"{name}: dtype {dtype!r} is none of {', '.join(DTYPE_BYTES)}")
        if any(name in shard for shard in shards):
            raise ValueError(f"a tensor is declared twice: {name}")
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        if shards[-1] and stop + size > max_shard_bytes:
            shards.append({})
            stop = 0
        start, stop = stop, stop + size
        shards[-1][name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    if not shards[0]:
        raise ValueError("a checkpoint without tensors")
    return shards


def _num_bytes(entry: dict[str, Any]) -> int:
    start, stop = entry["data_offsets"]
    return int(stop - start)
