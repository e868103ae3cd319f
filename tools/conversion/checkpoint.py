"""Opens a checkpoint directory of either format and checks that it is whole."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nanoslime.models.rules import ModelPartition, Piece, check_tensors, has_mtp, pieces, repeats
from nanoslime.models.shape import ModelShape
from nanoslime.storage import manifest
from nanoslime.storage.safetensors_file import (
    INDEX_FILE,
    SIDE,
    SINGLE_FILE,
    read_head,
    read_headers,
)
from nanoslime.storage.shared_files import read_json
from nanoslime.types import RunError
from tools.conversion import keys, torch_dist
from tools.conversion.tensor_copy import Fill, Link, fill, same
from tools.conversion.torch_dist import Chunk, StoredTensor

LATEST = "latest_checkpointed_iteration.txt"  # Megatron-LM's and slime's
HEADERS = "safetensors_headers.json"  # in the side directory: the first bytes of the original files


@dataclass(slots=True)
class Tensor:
    """A tensor of one format as boxes of stored tensors of either."""

    dtype: str
    shape: tuple[int, ...]
    links: list[Link] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`tensors`: by Hugging Face name, or by the weight map's Megatron name."""

    path: Path  # where the tensors lie
    format: Literal["Hugging Face", "torch_dist"]
    shape: ModelShape
    side: Path  # holds config.json and the tokenizer
    tensors: dict[str, StoredTensor]
    mtp: bool  # holds the multi-token prediction layers
    others: tuple[str, ...]  # keys that are no weights
    manifest: Path | None  # of the directory that has one; its checksums were compared

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def pieces(self) -> list[Piece]:
        return pieces(self.shape, ModelPartition(mtp=self.mtp))

    def huggingface(self) -> dict[str, Tensor]:
        """Every Hugging Face tensor of the model, and the repeats that a file may hold."""
        if self.format == "Hugging Face":
            return {name: Tensor(t.dtype, t.shape, [whole(t)]) for name, t in self.tensors.items()}
        found: dict[str, Tensor] = {}
        for piece in self.pieces():
            stored = self.tensors[piece.megatron]
            tensor = found.setdefault(piece.hf, Tensor(stored.dtype, piece.full_shape))
            tensor.links.append((stored, piece.local, piece.box))
        return found | {name: found[of] for name, of in repeats(self.shape).items() if of in found}

    def megatron(self) -> dict[str, tuple[Tensor, Piece]]:
        """Every Megatron tensor of the model, by the weight map's name, with one of its pieces; unpadded.

        Raises RunError where the parts of one differ in dtype.
        """
        found: dict[str, tuple[Tensor, Piece]] = {}
        for piece in self.pieces():
            stored = self.tensors[piece.hf]
            tensor, first = found.setdefault(piece.megatron, (Tensor(stored.dtype, (0,)), piece))
            if stored.dtype != tensor.dtype:
                where = (
                    f"{_file(stored)}: {piece.hf} is {stored.dtype}, but {first.hf} {tensor.dtype}"
                )
                raise RunError(f"{where}; {piece.megatron} is made of both")
            tensor.links.append((stored, piece.box, piece.local))
            sides = (*tensor.shape, *(0,) * len(piece.local))
            tensor.shape = tuple(
                max(n, side.stop) for n, side in zip(sides, piece.local, strict=False)
            )
        return found


def open_checkpoint(path: Path, side: Path | None = None, *, verify: bool = True) -> Checkpoint:
    """The checkpoint at `path`: a Hugging Face directory, a torch_dist directory, or one that holds the
    latter (of Megatron-LM, slime, or a run of nanoslime: checkpoints/step_<k>).

    side: where config.json of a Megatron checkpoint is, if not beside it. verify: compare the checksums of
    its manifest, if there is one. Raises RunError, naming file and tensor, for what is not as it should be.
    """
    if not path.is_dir():
        raise RunError(f"{path} is no directory")
    data = torch_dist_directory(path)
    checked = _verify(data or path, verify)
    if data is None:
        return _open_huggingface(path, checked)
    side = side or next(
        (d for d in (data / SIDE, data.parent / SIDE) if (d / "config.json").exists()), None
    )
    if side is None:
        raise RunError(
            f"{path} has no {SIDE}/config.json: say with --hf-checkpoint DIR which model it is"
        )
    return _open_torch_dist(data, side, checked)


def whole(tensor: StoredTensor) -> Link:
    box = tuple(slice(0, n) for n in tensor.shape)
    return tensor, box, box


def torch_dist_directory(path: Path) -> Path | None:
    """Where .metadata is, at `path` or below; None for a Hugging Face directory."""
    if (path / SINGLE_FILE).exists() or (path / INDEX_FILE).exists():
        return None
    places = [path, path / "trainer", path / "release"]
    if (path / LATEST).exists():
        latest = (path / LATEST).read_text(errors="replace").strip()
        if latest != "release" and not latest.isdecimal():
            raise RunError(f"{path / LATEST} says {latest!r}, neither release nor an iteration")
        places = [path / ("release" if latest == "release" else f"iter_{int(latest):07d}")]
    for place in places:
        if (place / torch_dist.METADATA).exists():
            return place
    files = f"{SINGLE_FILE}, {INDEX_FILE} (Hugging Face), {torch_dist.METADATA} (torch_dist)"
    raise RunError(f"{path} is no checkpoint: neither {files} nor {LATEST} is in it")


def original_heads(side: Path) -> dict[str, bytes] | None:
    """The first bytes of the original safetensors files: kept in `side`, or of the files there, or None."""
    if (side / HEADERS).exists():
        heads = {name: head.encode("latin-1") for name, head in read_json(side / HEADERS).items()}
        if wrong := [name for name in heads if Path(name).name != name]:
            raise RunError(
                f"{side / HEADERS} names {wrong[0]!r}, which is no file of that directory"
            )
        return heads
    headers = read_headers(side) if any(side.glob("*.safetensors")) else {}
    return {
        file.name: read_head(file) for file in sorted({info.file for info in headers.values()})
    } or None


def _verify(data: Path, verify: bool) -> Path | None:
    """Compares the checksums of the manifest of `data` or of the directory above it; that directory."""
    for place in (data, data.parent):
        text = (place / manifest.NAME).read_bytes() if (place / manifest.NAME).exists() else b""
        if b"xxh3_128" in text and (
            place == data or b'"%s/' % data.name.encode() in text
        ):  # one of ours
            try:
                if verify:
                    json.loads(text)
                    manifest.verify(place)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RunError(f"{place / manifest.NAME} is damaged: {error!r}") from error
            return place
    return None


def _open_huggingface(path: Path, checked: Path | None) -> Checkpoint:
    shape, headers = _shape(path), read_headers(path)
    try:
        where = path / (INDEX_FILE if (path / INDEX_FILE).exists() else SINGLE_FILE)
        files = {name: str(info.file) for name, info in headers.items()}
        check_tensors(
            shape, {name: info.shape for name, info in headers.items()}, str(where), files
        )
    except ValueError as error:
        raise RunError(str(error)) from error
    tensors = {
        name: StoredTensor(
            t.dtype, t.shape, (Chunk((0,) * len(t.shape), t.shape, t.file, t.start),)
        )
        for name, t in headers.items()
    }
    _check_dtypes(tensors)
    for name, of in repeats(shape).items():
        if name in tensors and not same(_fill(tensors[name]), _fill(tensors[of])):
            tied = name == "lm_head.weight"
            hint = "set tie_word_embeddings to false in config.json" if tied else "retrain"
            raise RunError(
                f"{_file(tensors[name])}: {name} has to repeat {of}, but differs; {hint}"
            )
    return Checkpoint(
        path, "Hugging Face", shape, path, tensors, has_mtp(shape, tensors), (), checked
    )


def _open_torch_dist(path: Path, side: Path, checked: Path | None) -> Checkpoint:
    shape = _shape(side)
    stored, objects = torch_dist.read(path, keys.is_weight)
    torch_dist.read_common(path)  # refuses classes that only harm
    tensors = keys.by_name(stored)
    mtp = shape.num_mtp_layers > 0 and any(name.startswith("mtp.") for name in tensors)
    expected: dict[str, tuple[Piece, list[int]]] = {}
    for piece in pieces(shape, ModelPartition(mtp=mtp)):
        _, extent = expected.setdefault(piece.megatron, (piece, [0] * len(piece.local)))
        extent[:] = [max(n, side.stop) for n, side in zip(extent, piece.local, strict=True)]
    found = {}
    for name, (piece, extent) in expected.items():
        tensor, twin = tensors.get(name, tensors.get(piece.other)), tensors.get(piece.other)
        if tensor and twin and tensor != twin and not same(_fill(tensor), _fill(twin)):
            raise RunError(f"{_file(twin)}: {piece.other} has to repeat {name}, but differs")
        if tensor is None:
            lack = f"no {name} {extent}, part of every {shape.model_type}"
            raise RunError(f"{path / torch_dist.METADATA} has {lack}")
        padded = (
            piece.rule.layout == "vocab" and len(tensor.shape) == 2 and tensor.shape[0] >= extent[0]
        )
        if tensor.shape != tuple(extent) and not (padded and tensor.shape[1] == extent[1]):
            where = f"{_file(tensor)}: {name}"
            raise RunError(
                f"{where} is {list(tensor.shape)}, {side / 'config.json'} asks for {extent}"
            )
        found[name] = tensor
    known = {name for piece, _ in expected.values() for name in (piece.megatron, piece.other)}
    if extra := sorted(tensors.keys() - known):
        where = f"{_file(tensors[extra[0]])}: {extra[0]}"
        raise RunError(f"{where} and {len(extra) - 1} others do not belong to a {shape.model_type}")
    _check_dtypes(found)
    return Checkpoint(path, "torch_dist", shape, side, found, mtp, tuple(objects), checked)


def _shape(directory: Path) -> ModelShape:
    try:
        return ModelShape.read(directory)
    except ValueError as error:
        raise RunError(str(error)) from error


def _check_dtypes(tensors: dict[str, StoredTensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in ("F64", "F32", "F16", "BF16"):
            raise RunError(
                f"{_file(tensor)}: {name} is {tensor.dtype}; dequantize the checkpoint first"
            )


def _fill(tensor: StoredTensor) -> Fill:
    return fill("", tensor.dtype, (0,) * len(tensor.shape), tensor.shape, [whole(tensor)])


def _file(tensor: StoredTensor) -> Path:
    return tensor.chunks[0].file if tensor.chunks else Path(torch_dist.METADATA)  # it may be empty
