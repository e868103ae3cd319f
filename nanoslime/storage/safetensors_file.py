"""Safetensors files without torch: headers, read and checked, and planned.

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

from nanoslime.storage.shared_files import read_json
from nanoslime.types import RunError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
METADATA_DIR = "hf"  # beside a Megatron checkpoint: configuration and tokenizer of the model
_DTYPES_BY_BYTES = {
    8: "F64 I64 U64",
    4: "F32 I32 U32",
    2: "F16 BF16 I16 U16",
    1: "F8_E4M3 F8_E5M2 BOOL I8 U8",
}
DTYPE_BYTES = {name: size for size, names in _DTYPES_BY_BYTES.items() for name in names.split()}
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".index.json", ".pt", ".pth")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_SHARD_BYTES = 5_000_000_000
_GIT_LFS_POINTER = b"version "  # how it begins
_COMPARED_BYTES = 16 << 20

# A tensor as it is declared: name, dtype (as safetensors names it), shape.
Spec = tuple[str, str, tuple[int, ...]]


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

    Raises RunError for a missing or truncated file, a bad header, overlapping
    tensors, and an index that disagrees with its files.
    """
    if (directory / INDEX_FILE).exists():
        index = read_json(directory / INDEX_FILE)
        headers = _read_sharded_headers(directory, _weight_map(directory / INDEX_FILE, index))
        if "metadata" not in index:
            raise RunError(
                f"{directory / INDEX_FILE} has no metadata, without which transformers does not "
                'load the model; add "metadata": {}'
            )
        return headers
    require_weights(directory)
    return read_file_header(directory / SINGLE_FILE)


def require_weights(directory: Path) -> None:
    """Raises RunError, saying what there is instead, for a directory without weights
    that could be read."""
    if not directory.is_dir():
        raise RunError(
            f"{directory} is not a directory: it holds neither {SINGLE_FILE} nor {INDEX_FILE}"
        )
    if (directory / SINGLE_FILE).exists() or (directory / INDEX_FILE).exists():
        return
    refuse_other_forms(directory)
    raise RunError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def refuse_other_forms(directory: Path) -> None:
    """Raises RunError for a directory with weights in a form that is not read."""
    names = sorted(path.name for path in directory.iterdir())
    if not {"adapter_config.json", "adapter_model.safetensors"}.isdisjoint(names):
        raise RunError(
            f"{directory} is no checkpoint but an adapter without its base model; merge the two "
            "first, with merge_and_unload() of peft, and save the result"
        )
    others = [name for name in names if name.endswith((".safetensors", ".bin", ".pth", ".gguf"))]
    if others:
        raise RunError(
            f"{directory} holds {others[0]}, but neither {SINGLE_FILE} nor {INDEX_FILE}, which "
            "are read; load the model with transformers and save it by save_pretrained()"
        )


def _weight_map(path: Path, content: Any) -> dict[str, str]:
    """The name of the file of each tensor, as the index says."""
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise RunError(f"{path} has no weight_map, which says in which file a tensor is")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise RunError(
                f"{path} says that {name} is in {file!r}; only files beside the index are read, "
                "by SGLang too: move them there and name them so"
            )
    return weight_map


def _read_sharded_headers(directory: Path, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
    """The tensors of all files that the index lists; `weight_map` maps a tensor to its file."""
    found: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        path = directory / file
        if not path.exists():
            raise RunError(f"{path} is missing; {INDEX_FILE} lists it")
        for name, info in read_file_header(path).items():
            if name in found:
                raise RunError(f"{path} holds {name}, and so does {found[name].file}")
            found[name] = info
    for name, file in weight_map.items():
        if name not in found or found[name].file.name != file:
            raise RunError(
                f"{directory / file} does not hold {name}, although {INDEX_FILE} says so"
            )
    for name, info in found.items():
        if name not in weight_map:
            raise RunError(f"{info.file} holds {name}, which {INDEX_FILE} does not list")
    return found


def read_file_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes."""
    try:
        size = path.stat().st_size
        head = read_head(path)
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    tensors = parse_head(path, head)
    described = max((info.stop for info in tensors.values()), default=len(head))
    if size < described:
        raise RunError(f"{path} is truncated: {size} bytes, its header describes {described}")
    if size > described:
        raise RunError(f"{path} is too long: {size} bytes, its header describes {described}")
    return tensors


def read_head(path: Path) -> bytes:
    """The first bytes of a safetensors file, up to its tensors."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = -1
        if prefix == _GIT_LFS_POINTER:
            raise RunError(
                f"{path} is a pointer of Git LFS and not the file itself; fetch it by git lfs pull"
            )
        if len(prefix) == 8:
            (length,) = struct.unpack("<Q", prefix)
        if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
            raise RunError(f"{path} is truncated or not safetensors: {size} bytes, header {length}")
        return prefix + file.read(length)


def same_content(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open(one.file, "rb") as file, open(other.file, "rb") as other_file:
        file.seek(one.start)
        other_file.seek(other.start)
        left = one.stop - one.start
        while left > 0:
            size = min(left, _COMPARED_BYTES)
            if file.read(size) != other_file.read(size):
                return False
            left -= size
    return True


def parse_head(path: Path, head: bytes) -> dict[str, TensorInfo]:
    """The tensors that the first bytes of `path` describe, in the order of their bytes."""
    try:
        entries = json.loads(head[8:])
        entries.pop("__metadata__", None)
        tensors = {name: _info(path, entry, len(head)) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} has a broken header: {type(error).__name__}: {error}") from error
    ordered = dict(sorted(tensors.items(), key=_place))
    position = len(head)
    for name, info in ordered.items():
        if info.start != position:
            raise RunError(
                f"{path}: {name} is at byte {info.start}, not {position}: overlap or hole"
            )
        size_bytes = info.stop - info.start
        if size_bytes != math.prod(info.shape) * DTYPE_BYTES[info.dtype]:
            raise RunError(
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
    tensors: Iterable[Spec], max_shard_bytes: int = MAX_SHARD_BYTES
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


def copy_other_files(source: Path, target: Path) -> None:
    """Copy what stands beside the weights of a Hugging Face checkpoint.

    That is configuration, tokenizer and code, but no manifest.
    """
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        is_weight = path.name.endswith(_WEIGHT_SUFFIXES)
        if path.is_file() and not is_weight and path.name != "manifest.json":
            shutil.copy2(path, target / path.name)
