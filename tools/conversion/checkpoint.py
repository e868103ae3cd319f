"""Opens a checkpoint directory of either format and checks that it is whole."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nanoslime.models.checkpoint_files import read_tensors
from nanoslime.models.rules import (
    Box,
    ModelPartition,
    Piece,
    has_mtp,
    pieces,
    repeats,
)
from nanoslime.models.shape import ModelShape
from nanoslime.storage import manifest
from nanoslime.storage.safetensors_file import (
    INDEX_FILE,
    METADATA_DIR,
    SINGLE_FILE,
    read_head,
    read_headers,
    refuse_other_forms,
)
from nanoslime.storage.shared_files import read_json
from nanoslime.types import RunError
from tools.conversion import keys, torch_dist
from tools.conversion.tensor_copy import Fill, Link, fill, same
from tools.conversion.torch_dist import Chunk, StoredTensor

HUGGING_FACE: Literal["Hugging Face"] = "Hugging Face"
TORCH_DIST: Literal["torch_dist"] = "torch_dist"
LATEST = "latest_checkpointed_iteration.txt"  # written by Megatron-LM and slime
HEADERS = "safetensors_headers.json"  # in the metadata directory: the heads of the original files
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(slots=True)
class Tensor:
    """A tensor of one format as boxes of stored tensors of either."""

    dtype: str
    shape: tuple[int, ...]
    links: list[Link] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose structure was checked.

    `tensors` has Hugging Face's names or the weight map's Megatron names. `metadata_dir`
    holds config.json and the tokenizer. `other_keys` are keys that are no weights.
    `manifest_dir` is the directory whose manifest covers the tensors, if there is one.
    """

    path: Path
    format: Literal["Hugging Face", "torch_dist"]
    shape: ModelShape
    metadata_dir: Path
    tensors: dict[str, StoredTensor]
    mtp: bool  # whether it holds the multi-token prediction layers
    other_keys: tuple[str, ...]
    manifest_dir: Path | None

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def pieces(self) -> list[Piece]:
        return pieces(self.shape, ModelPartition(mtp=self.mtp))

    def huggingface(self) -> dict[str, Tensor]:
        """Every Hugging Face tensor of the model, and the repeats that a file may hold."""
        found: dict[str, Tensor] = {}
        if self.format == HUGGING_FACE:
            for name, stored in self.tensors.items():
                found[name] = Tensor(stored.dtype, stored.shape, [whole(stored)])
            return found
        for piece in self.pieces():
            stored = self.tensors[piece.megatron]
            tensor = found.setdefault(piece.hf, Tensor(stored.dtype, piece.full_shape))
            tensor.links.append(Link(stored, piece.local, piece.box))
        for name, original in repeats(self.shape).items():
            if original in found:
                found[name] = found[original]
        return found

    def megatron(self) -> dict[str, tuple[Tensor, Piece]]:
        """Every Megatron tensor of the model by the weight map's name, and its first piece.

        No vocabulary is padded. Raises RunError where the pieces of one tensor differ in dtype.
        """
        found: dict[str, tuple[Tensor, Piece]] = {}
        for piece in self.pieces():
            stored = self.tensors[piece.hf]
            if piece.megatron not in found:
                no_elements = (0,) * len(piece.local)
                found[piece.megatron] = (Tensor(stored.dtype, no_elements), piece)
            tensor, first = found[piece.megatron]
            if stored.dtype != tensor.dtype:
                raise RunError(
                    f"{_file(stored)}: {piece.hf} is {stored.dtype}, but {first.hf} "
                    f"{tensor.dtype}; {piece.megatron} is made of both"
                )
            tensor.links.append(Link(stored, piece.box, piece.local))
            tensor.shape = _extended(tensor.shape, piece.local)
        return found


def open_checkpoint(
    path: Path, metadata_dir: Path | None = None, *, verify: bool = True
) -> Checkpoint:
    """The checkpoint at `path`: a Hugging Face directory, a torch_dist directory, or one
    that holds a torch_dist directory (of Megatron-LM, of slime, or a run's
    checkpoints/step_<k>).

    `metadata_dir` is where config.json of a Megatron checkpoint is, if not beside it.
    `verify` compares the checksums of the manifest, if there is one.

    Raises RunError, naming file and tensor, for everything that is not as it should be.
    """
    if not path.is_dir():
        raise RunError(f"{path} is no directory")
    data_dir = torch_dist_directory(path)
    manifest_dir = _find_manifest(data_dir or path, verify)
    if data_dir is None:
        return _open_huggingface(path, manifest_dir)
    if metadata_dir is None:
        metadata_dir = _metadata_dir_beside(data_dir)
    if metadata_dir is None:
        raise RunError(
            f"{path} has no {METADATA_DIR}/config.json: "
            "say with --hf-checkpoint DIR which model it is"
        )
    return _open_torch_dist(data_dir, metadata_dir, manifest_dir)


def _metadata_dir_beside(data_dir: Path) -> Path | None:
    """The directory with config.json in or beside a torch_dist directory."""
    for place in (data_dir / METADATA_DIR, data_dir.parent / METADATA_DIR):
        if (place / "config.json").exists():
            return place
    return None


def whole(tensor: StoredTensor) -> Link:
    """All of a stored tensor, for a target tensor of the same shape."""
    box = tuple(slice(0, size) for size in tensor.shape)
    return Link(tensor, box, box)


def torch_dist_directory(path: Path) -> Path | None:
    """Where .metadata is, at `path` or below; None for a Hugging Face directory.

    Raises RunError for a directory that is neither.
    """
    if (path / SINGLE_FILE).exists() or (path / INDEX_FILE).exists():
        return None
    places = [path, path / "trainer", path / "release"]
    if (path / LATEST).exists():
        places = [path / _latest_name(path / LATEST)]
    for place in places:
        if (place / torch_dist.METADATA).exists():
            return place
    refuse_other_forms(path)
    raise RunError(
        f"{path} is no checkpoint: neither {SINGLE_FILE}, {INDEX_FILE} (Hugging Face), "
        f"{torch_dist.METADATA} (torch_dist) nor {LATEST} is in it"
    )


def _latest_name(file: Path) -> str:
    """The directory that latest_checkpointed_iteration.txt names."""
    latest = file.read_text(errors="replace").strip()
    if latest == "release":
        return "release"
    if latest.isdecimal():
        return f"iter_{int(latest):07d}"
    raise RunError(f"{file} says {latest!r}, neither release nor an iteration")


def original_heads(metadata_dir: Path) -> dict[str, bytes] | None:
    """The first bytes of the original safetensors files by file name, or None.

    They are kept in `metadata_dir`, or they are those of the files there.
    """
    kept = metadata_dir / HEADERS
    if kept.exists():
        heads = {name: text.encode("latin-1") for name, text in read_json(kept).items()}
        for name in heads:
            if Path(name).name != name:
                raise RunError(f"{kept} names {name!r}, which is no file of that directory")
        return heads
    if not any(metadata_dir.glob("*.safetensors")):
        return None
    files = {info.file for info in read_headers(metadata_dir).values()}
    return {file.name: read_head(file) for file in sorted(files)} or None


def _find_manifest(data_dir: Path, verify: bool) -> Path | None:
    """The directory whose manifest covers `data_dir`, itself or its parent; None if there
    is none.

    With `verify` the checksums are compared. A manifest of another program is not looked at.
    """
    for place in (data_dir, data_dir.parent):
        file = place / manifest.NAME
        content = file.read_bytes() if file.exists() else b""
        is_ours = b"xxh3_128" in content
        covers = place == data_dir or b'"%s/' % data_dir.name.encode() in content
        if is_ours and covers:
            if verify:
                _verify_manifest(place, content)
            return place
    return None


def _verify_manifest(directory: Path, content: bytes) -> None:
    try:
        json.loads(content)
        manifest.verify(directory)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{directory / manifest.NAME} is damaged: {error!r}") from error


def _open_huggingface(path: Path, manifest_dir: Path | None) -> Checkpoint:
    shape = ModelShape.read(path)
    tensors = {}
    for name, info in read_tensors(path, shape).items():
        chunk = Chunk((0,) * len(info.shape), info.shape, info.file, info.start)
        tensors[name] = StoredTensor(info.dtype, info.shape, (chunk,))
    _check_repeats(shape, tensors)
    mtp = has_mtp(shape, tensors)
    return Checkpoint(path, HUGGING_FACE, shape, path, tensors, mtp, (), manifest_dir)


def _check_repeats(shape: ModelShape, tensors: dict[str, StoredTensor]) -> None:
    """Raises RunError for a tensor that has to repeat another one, but differs."""
    for name, original in repeats(shape).items():
        if name in tensors and not _same_tensor(tensors[name], tensors[original]):
            file = _file(tensors[name])
            raise RunError(f"{file}: {name} has to repeat {original}, but differs; retrain")


def _open_torch_dist(path: Path, metadata_dir: Path, manifest_dir: Path | None) -> Checkpoint:
    shape = ModelShape.read(metadata_dir)
    contents = torch_dist.read(path, keys.is_weight)
    contents.read_common()  # refuses a pickle that wants to execute something
    tensors = keys.by_name(contents.tensors)
    mtp = shape.num_mtp_layers > 0 and any(name.startswith("mtp.") for name in tensors)
    expected = _expected_tensors(pieces(shape, ModelPartition(mtp=mtp)))
    found = {}
    for name, (tensor_shape, piece) in expected.items():
        tensor = _one_of_both_names(tensors, name, piece.local_spec_name)
        if tensor is None:
            raise RunError(
                f"{path / torch_dist.METADATA} has no {name} {list(tensor_shape)}, "
                f"part of every {shape.model_type}"
            )
        if not _has_shape(tensor, tensor_shape, may_be_padded=piece.rule.layout == "vocab"):
            raise RunError(
                f"{_file(tensor)}: {name} is {list(tensor.shape)}, "
                f"{metadata_dir / 'config.json'} asks for {list(tensor_shape)}"
            )
        found[name] = tensor
    known = expected.keys() | {piece.local_spec_name for _, piece in expected.values()}
    extra = sorted(tensors.keys() - known)
    if extra:
        raise RunError(
            f"{_file(tensors[extra[0]])}: {extra[0]} and {len(extra) - 1} others "
            f"do not belong to a {shape.model_type}"
        )
    _check_dtypes(found)
    other_keys = tuple(contents.objects)
    return Checkpoint(path, TORCH_DIST, shape, metadata_dir, found, mtp, other_keys, manifest_dir)


def _expected_tensors(
    model_pieces: Iterable[Piece],
) -> dict[str, tuple[tuple[int, ...], Piece]]:
    """(shape, first piece) of every Megatron tensor that the pieces make up, unpadded."""
    found: dict[str, tuple[tuple[int, ...], Piece]] = {}
    for piece in model_pieces:
        no_elements = (0,) * len(piece.local)
        shape, first = found.get(piece.megatron, (no_elements, piece))
        found[piece.megatron] = (_extended(shape, piece.local), first)
    return found


def _extended(shape: tuple[int, ...], box: Box) -> tuple[int, ...]:
    """`shape`, made as large as the box needs it."""
    return tuple(max(size, extent.stop) for size, extent in zip(shape, box, strict=True))


def _one_of_both_names(
    tensors: dict[str, StoredTensor], name: str, other: str
) -> StoredTensor | None:
    """The tensor under the name of either layer spec; both have to agree where both are
    there.
    """
    tensor = tensors.get(name)
    twin = tensors.get(other)
    if tensor is None or twin is None:
        return tensor or twin
    if tensor != twin and not _same_tensor(tensor, twin):
        raise RunError(f"{_file(twin)}: {other} has to repeat {name}, but differs")
    return tensor


def _has_shape(tensor: StoredTensor, expected: tuple[int, ...], *, may_be_padded: bool) -> bool:
    """Whether a tensor has the shape that the model asks for; a vocabulary may have rows
    more.
    """
    if tensor.shape == expected:
        return True
    if not may_be_padded or len(tensor.shape) != 2:
        return False
    return tensor.shape[0] >= expected[0] and tensor.shape[1] == expected[1]


def _check_dtypes(tensors: dict[str, StoredTensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOAT_DTYPES:
            raise RunError(
                f"{_file(tensor)}: {name} is {tensor.dtype}; dequantize the checkpoint first"
            )


def _same_tensor(one: StoredTensor, other: StoredTensor) -> bool:
    return same(_all_of(one), _all_of(other))


def _all_of(tensor: StoredTensor) -> Fill:
    origin = (0,) * len(tensor.shape)
    return fill("", tensor.dtype, origin, tensor.shape, [whole(tensor)])


def _file(tensor: StoredTensor) -> Path:
    """A file that holds the tensor; a tensor without elements is in .metadata alone."""
    if not tensor.chunks:
        return Path(torch_dist.METADATA)
    return tensor.chunks[0].file
