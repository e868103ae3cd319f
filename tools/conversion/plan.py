"""What a conversion writes: the files of the other format, each a list of byte ranges and
boxes.
"""

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from nanoslime.models.rules import Piece, is_computed, optional_tensors
from nanoslime.storage.safetensors_file import (
    INDEX_FILE,
    METADATA_DIR,
    copy_other_files,
    parse_head,
    plan_files,
    read_headers,
)
from nanoslime.storage.shared_files import publish_json, read_json
from nanoslime.types import RunError
from tools.conversion import keys, torch_dist
from tools.conversion.checkpoint import (
    HEADERS,
    HUGGING_FACE,
    LATEST,
    TORCH_DIST,
    Checkpoint,
    Tensor,
    original_heads,
)
from tools.conversion.tensor_copy import PAGE_BYTES, Fill, TargetFile, fill
from tools.conversion.torch_dist import Chunk, StoredObject, StoredTensor
from tools.conversion.torch_pickle import (
    DTYPES,
    EMPTY_OBJECT,
    object_container,
    tensor_container,
)

RELEASE = "release"  # the directory of a torch_dist checkpoint that belongs to no iteration
# What megatron-core's load takes for the common state of a checkpoint without a trainer's
# state.
_COMMON_STATE: dict[str, Any] = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"non_homogeneous_layers": True, "singleton_local_shards": False},
}
# Rows that tensor parallelism splits are cut in so many chunks: a rank of TP=8 reads its
# own rows.
_MAX_ROW_CHUNKS = 8
_MIN_CHUNK_ELEMENTS = 1 << 12
# Content of this size is worth up to a page of padding before it.
_MIN_ALIGNED_BYTES = 1 << 16
# The sizes of a .distcp file: a rerun keeps whole files.
_MIN_FILE_BYTES = 64 << 20
_MAX_FILE_BYTES = 1 << 30
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """`finish` writes the small files into the output directory, once `files` are there.

    `left_out` are tensors of the original files that the output does not hold.
    """

    source: Checkpoint
    files: tuple[TargetFile, ...]
    finish: Callable[[Path], None]
    left_out: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def to_megatron(source: Checkpoint) -> ConversionPlan:
    """torch_dist as megatron-core loads it into any layout, with what Megatron-LM's
    --load asks for.

    Rows that tensor parallelism splits are chunks of their own, and so are experts; no
    vocabulary is padded. Raises RunError for a source that is no Hugging Face checkpoint.
    """
    if source.format != HUGGING_FACE:
        raise RunError(f"{source.path} is {source.format} already; give a Hugging Face directory")
    named = dict(sorted(source.megatron().items(), key=_by_layer))
    num_experts = source.shape.moe.num_experts if source.shape.moe else 0
    files = _DistcpFiles(file_bytes=_distcp_file_bytes(source.num_bytes))
    extra_state = files.append_object(EMPTY_OBJECT)
    objects = {key: extra_state for key in keys.extra_states(named, num_experts)}
    common_state = object_container([_COMMON_STATE])
    objects[torch_dist.COMMON_KEY] = files.append_object(common_state)
    growing: dict[str, _GrowingTensor] = {}
    for name, (tensor, piece) in named.items():
        key, expert = keys.key_of(name)
        expert_axis = () if expert is None else (num_experts,)
        if key not in growing:
            growing[key] = _GrowingTensor(tensor.dtype, (*expert_axis, *tensor.shape))
        target = growing[key]
        if target.dtype != tensor.dtype:
            file = tensor.links[0].stored.chunks[0].file
            raise RunError(
                f"{file}: {piece.hf} is {tensor.dtype}, but of other experts {target.dtype}; "
                f"{key} has both"
            )
        for start, shape in _row_chunks(piece, tensor.shape, source.shape.num_key_value_heads):
            item = fill(name, tensor.dtype, start, shape, tensor.links)
            target.chunks.append(files.append_chunk(item, start, expert))
    tensors = {key: target.stored() for key, target in growing.items()}
    # The same bytes have the name of the other layer spec, too.
    for name, (_, piece) in named.items():
        other_key, _ = keys.key_of(piece.local_spec_name)
        key, _ = keys.key_of(name)
        tensors[other_key] = tensors[key]

    def finish(directory: Path) -> None:
        torch_dist.write_metadata(directory / RELEASE, tensors, objects)
        (directory / LATEST).write_text(RELEASE)
        _keep_model_files(source.metadata_dir, directory / METADATA_DIR)

    left_out = tuple(name for name in read_headers(source.path) if is_computed(name))
    return ConversionPlan(source, files.target_files(), finish, left_out)


def _keep_model_files(metadata_dir: Path, target: Path) -> None:
    """Copy configuration, tokenizer, index and the heads of the original safetensors files."""
    copy_other_files(metadata_dir, target)
    if (metadata_dir / INDEX_FILE).exists():
        shutil.copy2(metadata_dir / INDEX_FILE, target)
    heads = original_heads(metadata_dir) or {}
    texts = {name: head.decode("latin-1") for name, head in heads.items()}
    publish_json(target / HEADERS, texts)


def to_huggingface(source: Checkpoint, dtype: str | None = None) -> ConversionPlan:
    """Safetensors files: those of the original, byte for byte, where its heads are kept.

    Without the heads the tensors stand layer by layer, in files of 5 GB, with the dtypes
    as stored. So they do, with the dtypes of the heads, where the heads have what the
    source has not and a model need not have: tensors that are computed, multi-token
    prediction that was not trained. `dtype` (BF16, F16, F32) asks for another dtype of
    all tensors.

    Raises RunError for a source that is no torch_dist checkpoint or does not fit the kept
    heads.
    """
    if source.format != TORCH_DIST:
        raise RunError(f"{source.path} is {source.format} already; give a Megatron directory")
    available = source.huggingface()
    missing = {piece.hf for piece in source.pieces()}
    kept_heads = original_heads(source.metadata_dir)
    kept_dtypes = _dtypes_in(kept_heads or {})
    optional = optional_tensors(source.shape)
    left_out = []
    for name in kept_dtypes.keys() - available.keys():
        if is_computed(name) or name in optional:
            left_out.append(name)
    if dtype or left_out:
        kept_heads = None
    index = None
    if kept_heads is None:
        specs = []
        for name in sorted(missing, key=_layer):
            tensor = available[name]
            specs.append((name, dtype or kept_dtypes.get(name, tensor.dtype), tensor.shape))
        heads, index = plan_files(specs)
    else:
        heads = kept_heads
    files = []
    for file_name, head in heads.items():
        content: list[bytes | Fill] = [head]
        for name, info in parse_head(source.metadata_dir / file_name, head).items():
            _check_kept_head(source, available, name, info.file, info.shape)
            missing.discard(name)
            origin = (0,) * len(info.shape)
            content.append(fill(name, info.dtype, origin, info.shape, available[name].links))
        files.append(TargetFile(file_name, tuple(content)))
    if missing:
        raise RunError(
            f"{source.metadata_dir}: the original has no {min(missing)}, which {source.path} holds"
        )

    def finish(directory: Path) -> None:
        copy_other_files(source.metadata_dir, directory)
        (directory / HEADERS).unlink(missing_ok=True)
        if dtype:
            _write_dtype(directory / "config.json", dtype)
        if index:
            publish_json(directory / INDEX_FILE, index)
        elif kept_heads and (source.metadata_dir / INDEX_FILE).exists():
            shutil.copy2(source.metadata_dir / INDEX_FILE, directory)

    return ConversionPlan(source, tuple(files), finish, tuple(sorted(left_out)))


def _dtypes_in(heads: dict[str, bytes]) -> dict[str, str]:
    """The dtype of every tensor that the heads of files name."""
    found = {}
    for file_name, head in heads.items():
        for name, info in parse_head(Path(file_name), head).items():
            found[name] = info.dtype
    return found


def _check_kept_head(
    source: Checkpoint,
    available: dict[str, Tensor],
    name: str,
    file: Path,
    shape: tuple[int, ...],
) -> None:
    """Raises RunError where the source has no tensor `name` of the shape that the head of
    `file` says.
    """
    if name not in available:
        raise RunError(
            f"{file} has {name} {list(shape)}, but {source.path} has nothing of that name"
        )
    if available[name].shape != shape:
        raise RunError(
            f"{file} has {name} {list(shape)}, but {source.path} has {list(available[name].shape)}"
        )


def _write_dtype(config_file: Path, dtype: str) -> None:
    """Change the dtype that config.json names, under whichever of its two names it does."""
    config = read_json(config_file)
    torch_dtype, _ = DTYPES[dtype]
    for name in ("dtype", "torch_dtype"):
        if name in config:
            config[name] = torch_dtype
    publish_json(config_file, config)


@dataclass(slots=True)
class _GrowingTensor:
    """A tensor of the target to which chunks are added."""

    dtype: str
    shape: tuple[int, ...]
    chunks: list[Chunk] = field(default_factory=list)

    def stored(self) -> StoredTensor:
        return StoredTensor(self.dtype, self.shape, tuple(self.chunks))


class _DistcpFiles:
    """Distributes containers over files __<i>_0.distcp of about `file_bytes` bytes, in
    order.
    """

    def __init__(self, file_bytes: int) -> None:
        self._file_bytes = file_bytes
        self._files: list[list[bytes | Fill]] = []
        self._position = 0

    def append_object(self, container: bytes) -> StoredObject:
        self._begin_file_if_full()
        stored = StoredObject(self._path(), self._position, len(container))
        self._files[-1].append(container)
        self._position += len(container)
        return stored

    def append_chunk(self, item: Fill, start: tuple[int, ...], expert: int | None) -> Chunk:
        """`start` is the place of `item` in its tensor, or in the tensor of this expert.

        Large content gets the place in its page that its source has.
        """
        self._begin_file_if_full()
        shape = item.shape
        if expert is not None:
            start = (expert, *start)
            shape = (1, *shape)
        head, tail = tensor_container(item.dtype, shape)
        padding = self._padding(item, len(head))
        offset = self._position + padding + len(head)
        chunk = Chunk(start, shape, self._path(), offset)
        self._files[-1] += [bytes(padding) + head, item, tail]
        self._position = offset + item.num_bytes + len(tail)
        return chunk

    def target_files(self) -> tuple[TargetFile, ...]:
        found = []
        for number, content in enumerate(self._files):
            found.append(TargetFile(f"{RELEASE}/{self._name(number)}", tuple(content)))
        return tuple(found)

    def _begin_file_if_full(self) -> None:
        if not self._files or self._position >= self._file_bytes:
            self._files.append([])
            self._position = 0

    def _padding(self, item: Fill, head_bytes: int) -> int:
        """Bytes that bring the content of `item` to the place in a page that its source has."""
        if item.num_bytes < _MIN_ALIGNED_BYTES:
            return 0
        ranges = item.ranges()
        if not ranges:
            return 0
        _, source_offset, _ = ranges[0]
        return (source_offset - self._position - head_bytes) % PAGE_BYTES

    def _path(self) -> Path:
        return Path(self._name(len(self._files) - 1))

    @staticmethod
    def _name(number: int) -> str:
        return f"__{number}_0.distcp"


def _distcp_file_bytes(num_bytes: int) -> int:
    """The size of a .distcp file of a model of `num_bytes` bytes."""
    return min(max(num_bytes // 8, _MIN_FILE_BYTES), _MAX_FILE_BYTES)


def _row_chunks(
    piece: Piece, shape: tuple[int, ...], num_query_groups: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(start, shape) of the boxes that a tensor is written in: the rows that one rank reads."""
    rule = piece.rule
    num_halves = 2 if rule.layout in ("cat", "halves") else 1
    half_rows = shape[0] // num_halves
    num_chunks = 1
    if rule.tp_dim == 0 and not rule.num_experts and prod(shape) >= _MIN_CHUNK_ELEMENTS:
        if rule.layout == "vocab":
            num_chunks = _MAX_ROW_CHUNKS
        elif rule.layout == "qkv":
            num_chunks = _largest_divisor(num_query_groups)
        else:
            num_chunks = _largest_divisor(half_rows)
    chunk_rows = -(-half_rows // num_chunks)
    edges = []
    for half in range(num_halves):
        for number in range(num_chunks):
            edges.append(half * half_rows + min(number * chunk_rows, half_rows))
    edges.append(shape[0])
    other_axes = (0,) * (len(shape) - 1)
    boxes = []
    for first, stop in pairwise(edges):
        if stop > first:
            boxes.append(((first, *other_axes), (stop - first, *shape[1:])))
    return boxes


def _largest_divisor(count: int) -> int:
    """The largest number of chunks that divides `count`."""
    for num_chunks in (_MAX_ROW_CHUNKS, 4, 2):
        if count % num_chunks == 0:
            return num_chunks
    return 1


def _layer(name: str) -> tuple[int, str]:
    """Sorts the embedding first, then layer by layer, then the rest."""
    match = _LAYER.search(name)
    if match:
        return int(match[1]), name
    if "embed" in name:
        return -1, name
    return sys.maxsize, name


def _by_layer(item: tuple[str, object]) -> tuple[int, str]:
    name, _ = item
    return _layer(name)
