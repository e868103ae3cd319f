"""What a conversion writes: the files of the other format, each a list of byte ranges and boxes."""

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

from nanoslime.models.rules import Piece
from nanoslime.storage.safetensors_file import (
    INDEX_FILE,
    SIDE,
    copy_other_files,
    parse_head,
    plan_files,
)
from nanoslime.storage.shared_files import publish_json, read_json
from nanoslime.types import RunError
from tools.conversion import keys, torch_dist
from tools.conversion.checkpoint import HEADERS, LATEST, Checkpoint, original_heads
from tools.conversion.tensor_copy import PAGE_BYTES, Fill, TargetFile, fill
from tools.conversion.torch_dist import Chunk, StoredTensor
from tools.conversion.torch_pickle import DTYPES, OBJECT_STUB, container

RELEASE = "release"  # the directory of a torch_dist checkpoint that belongs to no iteration
_MAX_ROW_CHUNKS = 8  # of what tensor parallelism splits: a rank of TP=8 reads its own rows
_MIN_CHUNK_ELEMENTS = 1 << 12
_MIN_ALIGNED_BYTES = 1 << 16  # of content that is worth up to a page of nothing before it
_FILE_BYTES = (64 << 20, 1 << 30)  # least and most of a .distcp file; a rerun keeps whole files
_LAYER = re.compile(r"(?:layers)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Plan:
    """`finish` writes the small files into the directory, once `files` are there."""

    source: Checkpoint
    files: tuple[TargetFile, ...]
    finish: Callable[[Path], None]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def to_megatron(source: Checkpoint) -> Plan:
    """torch_dist as megatron-core loads it into any layout, in release/, with what Megatron-LM's --load asks.

    Rows that tensor parallelism splits are chunks of their own, and so are experts; no vocabulary is padded.
    """
    if source.format != "Hugging Face":
        raise RunError(f"{source.path} is {source.format} already; give a Hugging Face directory")
    named = sorted(source.megatron().items(), key=lambda item: _layer(item[0]))
    num_experts = source.shape.moe.num_experts if source.shape.moe else 0
    files = _Appender(min(max(source.num_bytes // 8, _FILE_BYTES[0]), _FILE_BYTES[1]))
    stub = files.append(OBJECT_STUB)
    stored: dict[str, tuple[str, tuple[int, ...], list[Chunk]]] = {}
    for name, (tensor, piece) in named:
        key, expert = keys.key_of(name)
        outer = () if expert is None else (expert,)
        full = (*(num_experts for _ in outer), *tensor.shape)
        dtype, _, chunks = stored.setdefault(key, (tensor.dtype, full, []))
        if dtype != tensor.dtype:
            where = f"{tensor.links[0][0].chunks[0].file}: {piece.hf}"
            raise RunError(
                f"{where} is {tensor.dtype}, but of other experts {dtype}; {key} has both"
            )
        for start, shape in _row_chunks(piece, tensor.shape, source.shape.num_key_value_heads):
            box = (*(1 for _ in outer), *shape)
            head, tail = container(tensor.dtype, box)
            file, offset = files.append(
                head, fill(name, tensor.dtype, start, shape, tensor.links), tail
            )
            chunks.append(Chunk((*outer, *start), box, Path(file), offset + len(head)))
    tensors = {
        key: StoredTensor(dtype, full, tuple(chunks))
        for key, (dtype, full, chunks) in stored.items()
    }
    for name, (_, piece) in named:  # the same bytes under the name of the other layer spec
        tensors[keys.key_of(piece.other)[0]] = tensors[keys.key_of(name)[0]]
    objects = {
        key: (*stub, len(OBJECT_STUB)) for key in keys.extra_states(dict(named), num_experts)
    }

    def finish(directory: Path) -> None:
        torch_dist.write_metadata(directory / RELEASE, tensors, objects)
        content = {"non_homogeneous_layers": True, "singleton_local_shards": False}
        common = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": content}
        torch_dist.write_common(directory / RELEASE, common)
        (directory / LATEST).write_text(RELEASE)
        copy_other_files(source.side, directory / SIDE)
        if (source.side / INDEX_FILE).exists():
            shutil.copy2(source.side / INDEX_FILE, directory / SIDE)
        heads = original_heads(source.side) or {}
        texts = {name: head.decode("latin-1") for name, head in heads.items()}
        publish_json(directory / SIDE / HEADERS, texts)

    return Plan(source, files.done(), finish)


def to_huggingface(source: Checkpoint, dtype: str | None = None) -> Plan:
    """Safetensors files as the original's, byte for byte, where its headers are beside the checkpoint; else
    by layer, in files of 5 GB, with the dtypes as stored. `dtype` (BF16, F16, F32) asks for another one.
    """
    if source.format != "torch_dist":
        raise RunError(f"{source.path} is {source.format} already; give a Megatron directory")
    available, index = source.huggingface(), None
    own = {piece.hf for piece in source.pieces()}
    original = None if dtype else original_heads(source.side)
    if (heads := original) is None:
        wanted = [(name, available[name]) for name in sorted(own, key=_layer)]
        heads, index = plan_files(
            (name, dtype or tensor.dtype, tensor.shape) for name, tensor in wanted
        )
    files = []
    for name, head in heads.items():
        content: list[bytes | Fill] = [head]
        for hf, info in parse_head(source.side / name, head).items():
            if hf not in available or available[hf].shape != info.shape:
                what = list(available[hf].shape) if hf in available else "nothing of that name"
                raise RunError(
                    f"{info.file} has {hf} {list(info.shape)}, but {source.path} has {what}"
                )
            own.discard(hf)
            content.append(
                fill(hf, info.dtype, (0,) * len(info.shape), info.shape, available[hf].links)
            )
        files.append(TargetFile(name, tuple(content)))
    if own:
        raise RunError(f"{source.side}: the original has no {min(own)}, which {source.path} holds")

    def finish(directory: Path) -> None:
        copy_other_files(source.side, directory)
        (directory / HEADERS).unlink(missing_ok=True)
        if dtype:
            config = read_json(directory / "config.json")
            names = {"dtype", "torch_dtype"} & config.keys()
            publish_json(directory / "config.json", config | dict.fromkeys(names, DTYPES[dtype][0]))
        if index:
            publish_json(directory / INDEX_FILE, index)
        elif original and (source.side / INDEX_FILE).exists():
            shutil.copy2(source.side / INDEX_FILE, directory)

    return Plan(source, tuple(files), finish)


class _Appender:
    """Distributes content over files of about `limit` bytes, each __<i>_0.distcp, in order."""

    def __init__(self, limit: int) -> None:
        self._limit, self._files = limit, list[list[bytes | Fill]]()
        self._position = limit

    def append(
        self, head: bytes, content: Fill | None = None, tail: bytes = b""
    ) -> tuple[str, int]:
        """(file name, offset) of `head`. `content` gets the place in its page that its source has."""
        if self._position >= self._limit:
            self._files.append([])
            self._position = 0
        file, gap = self._files[-1], 0
        if content and content.num_bytes >= _MIN_ALIGNED_BYTES and (ranges := content.ranges()):
            gap = (ranges[0][1] - self._position - len(head)) % PAGE_BYTES
        offset = self._position + gap
        file += [bytes(gap) + head, content, tail] if content else [head]
        self._position = offset + len(head) + (content.num_bytes if content else 0) + len(tail)
        return f"__{len(self._files) - 1}_0.distcp", offset

    def done(self) -> tuple[TargetFile, ...]:
        return tuple(
            TargetFile(f"{RELEASE}/__{i}_0.distcp", tuple(c)) for i, c in enumerate(self._files)
        )


def _row_chunks(
    piece: Piece, shape: tuple[int, ...], num_groups: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(start, shape) of the boxes that a tensor is written in: rows that one rank reads."""
    rule = piece.rule
    halves = 2 if rule.layout in ("cat", "halves") else 1
    rows = shape[0] // halves
    units = num_groups if rule.layout == "qkv" else rows
    count = 1
    if rule.tp_dim == 0 and not rule.num_experts and prod(shape) >= _MIN_CHUNK_ELEMENTS:
        count = next(
            n for n in (_MAX_ROW_CHUNKS, 4, 2, 1) if units % n == 0 or rule.layout == "vocab"
        )
    step = -(-rows // count)
    edges = [half * rows + min(i * step, rows) for half in range(halves) for i in range(count)] + [
        shape[0]
    ]
    rest = (0,) * (len(shape) - 1)
    return [((a, *rest), (b - a, *shape[1:])) for a, b in pairwise(edges) if b > a]


def _layer(name: str) -> tuple[int, str]:
    """Sorts the embedding first, then layer by layer, then the rest."""
    match = _LAYER.search(name)
    outside = -1 if "embed" in name else sys.maxsize
    return (int(match[1]) if match else outside), name
