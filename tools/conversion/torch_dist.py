"""torch_dist checkpoints (torch's distributed checkpoint as megatron-core writes it) without torch.

A directory: metadata.json names the format, .metadata is a pickle that says which pieces of which tensor lie
where in the .distcp files, each piece in a container of torch.save; common.pt holds what is not sharded.
"""

import math
import os
import pickle
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from nanoslime.storage.safetensors_file import DTYPE_BYTES
from nanoslime.storage.shared_files import publish, publish_json, read_json
from tools.conversion import torch_pickle
from tools.conversion.torch_pickle import Foreign, TorchDistError, container, foreign, naming

METADATA, COMMON, CONFIG = ".metadata", "common.pt", "metadata.json"
_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_BACKEND |= {"common_backend": "torch", "common_backend_version": 1}
_DCP = "torch.distributed.checkpoint"
_THREADS = 8  # small reads, which a network filesystem answers late

_GLOBALS = {  # what .metadata may name: by torch, megatron-core (its plans), and torch before 2.3
    "torch": " ".join(["strided"] + [name for name, _ in torch_pickle.DTYPES.values()]),
    "torch.serialization": "_get_layout",
    f"{_DCP}.metadata": "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata"
    " TensorProperties MetadataIndex StorageMeta _MEM_FORMAT_ENCODING",
    f"{_DCP}.filesystem": "_StorageInfo",
    f"{_DCP}.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    "torch.distributed._shard.sharded_tensor.metadata": "TensorProperties MEM_FORMAT_ENCODING",
    "megatron.core.dist_checkpointing.strategies.torch": "MCoreMetadata MCoreSavePlan",
    "pathlib": "Path PurePath PosixPath PurePosixPath",
}
_ALLOWED = {f"{module}.{name}" for module, names in _GLOBALS.items() for name in names.split()}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor whose bytes lie row-major in one piece of a file."""

    start: tuple[int, ...]  # its first element in the tensor
    shape: tuple[int, ...]
    file: Path
    offset: int  # of its first byte in the file


@dataclass(frozen=True, slots=True)
class StoredTensor:
    dtype: str  # as safetensors names it: F32, BF16 ...
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]  # by start; none is empty

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


# A container: key, dtype (empty: an object), start and shape of the chunk, offset in the file, length.
_Piece = tuple[str, str, tuple[int, ...], tuple[int, ...], int, int]


def read(
    directory: Path, wanted: Callable[[str], bool] = lambda key: True
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The wanted tensors and the keys of all objects of a torch_dist directory; no tensor data is read.

    Raises TorchDistError, naming tensor and file, for what is missing, truncated, of another format,
    contradicts itself, or is a tensor whose chunks overlap or leave a hole. No pickle executes anything.
    """
    if (directory / CONFIG).exists() and (found := read_json(directory / CONFIG, 0)) != _BACKEND:
        raise TorchDistError(f"{directory / CONFIG} says {found}; only {_BACKEND} is read here")
    shapes, objects, pieces = _read_metadata(directory / METADATA, wanted)
    chunks: dict[str, list[Chunk]] = {key: [] for key in shapes}
    files = [directory / name for name in pieces]
    with ThreadPoolExecutor(_THREADS) as pool:
        for key, chunk in chain.from_iterable(pool.map(_locate, files, pieces.values())):
            chunks[key].append(chunk)
    for key, (_, shape) in shapes.items():
        chunks[key].sort(key=lambda chunk: chunk.start)
        with naming(f"{directory}: {key}"):
            boxes = [list(zip(chunk.start, chunk.shape, strict=True)) for chunk in chunks[key]]
            if not (_is_partition(boxes, shape) if math.prod(shape) else not boxes):
                raise TorchDistError(
                    f"the {len(boxes)} chunks of {list(shape)} overlap or leave a hole"
                )
    return {key: StoredTensor(*shapes[key], tuple(chunks[key])) for key in shapes}, objects


def _read_metadata(
    path: Path, wanted: Callable[[str], bool]
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], list[str], dict[str, list[_Piece]]]:
    """(dtype, shape) of the wanted tensors, keys of the objects, and the containers of both by file."""
    if not path.exists():
        raise TorchDistError(
            f"{path.parent} is no torch_dist checkpoint, or not a whole one: no {path.name}"
        )
    shapes, objects = {}, []
    boxes: list[tuple[str, tuple[int, ...] | None, str, tuple[int, ...]]] = []
    pieces: dict[str, list[_Piece]] = defaultdict(list)
    with naming(path):
        root = torch_pickle.load(path.read_bytes(), _ALLOWED)
        for key, entry in root.state_dict_metadata.items():
            if type(entry).__name__ == "BytesStorageMetadata":
                objects.append(key)
                boxes.append((key, None, "", ()))
            elif wanted(key):
                dtype = torch_pickle.DTYPE_NAMES[entry.properties.state[0].__name__]
                shapes[key] = (dtype, _sizes(entry.size))
                boxes += [(key, _sizes(c.offsets), dtype, _sizes(c.sizes)) for c in entry.chunks]
        places = {
            (index.fqn, index.state.get("offset")): info
            for index, info in root.storage_data.items()
        }
        for key, start, dtype, shape in boxes:
            if (key, start) not in places:
                raise TorchDistError(f"it does not say where {key} from {start} lies")
            info = places[key, start]
            if info.state.get("transform_descriptors"):
                raise TorchDistError(f"{key} is stored transformed: {info.transform_descriptors}")
            if os.path.basename(info.relative_path) != info.relative_path:
                raise TorchDistError(
                    f"{key} lies in {info.relative_path!r}, outside of the directory"
                )
            offset, length = _sizes((info.offset, info.length))
            if math.prod(shape):
                pieces[info.relative_path].append((key, dtype, start or (), shape, offset, length))
    return shapes, objects, pieces


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or any(
        type(value) is not int or value < 0 for value in values
    ):
        raise TorchDistError(f"sizes are {values!r}")
    return values


def _locate(file: Path, pieces: list[_Piece]) -> list[tuple[str, Chunk]]:
    """Opens every container among `pieces` of `file`, and checks it; (key, chunk) of those of tensors."""
    if not file.is_file():
        raise TorchDistError(f"{file} is missing; {METADATA} says that it holds {pieces[0][0]}")
    found = []
    with open(file, "rb", buffering=0) as opened:
        for key, dtype, start, shape, offset, length in pieces:
            with naming(f"{file}: {key}"):
                stored = torch_pickle.Container(opened.fileno(), offset, length)
                if not dtype:
                    continue
                *held, offset = stored.tensor()
                if held != [dtype, shape]:
                    raise TorchDistError(f"it holds {held}, {METADATA} says {[dtype, shape]}")
                found.append((key, Chunk(start, shape, file, offset)))
    return found


def _is_partition(
    boxes: list[list[tuple[int, int]]], shape: tuple[int, ...], axis: int = 0
) -> bool:
    """Whether boxes, (start, size) by axis, fill `shape` exactly once.

    A sweep: what is open between two neighbouring edges on this axis has to fill the axes after it.
    """
    if axis == len(shape) or not boxes:
        return len(boxes) == 1
    edges = sorted({edge for box in boxes for edge in (box[axis][0], sum(box[axis]))})
    if edges[0] != 0 or edges[-1] != shape[axis]:
        return False
    ahead = sorted(boxes, key=lambda box: box[axis][0], reverse=True)
    active: list[list[tuple[int, int]]] = []
    for edge in edges[:-1]:
        active = [box for box in active if sum(box[axis]) > edge]
        while ahead and ahead[-1][axis][0] == edge:
            active.append(ahead.pop())
        if not _is_partition(active, shape, axis + 1):
            return False
    return True


def read_common(directory: Path) -> dict[str, Any]:
    """What common.pt holds; objects of classes other than Python's own are `torch_pickle.Foreign`."""
    path = directory / COMMON
    if not path.is_file():
        raise TorchDistError(f"{path} is missing: {directory} is no whole torch_dist checkpoint")
    with naming(path), open(path, "rb", buffering=0) as file:
        stored = torch_pickle.Container(file.fileno(), 0, path.stat().st_size)
        values = torch_pickle.load(stored.content("data.pkl"), None)
        if not isinstance(values, dict):
            raise TorchDistError(f"it holds a {type(values).__name__}, not a dictionary")
    return values


def write_metadata(
    directory: Path, tensors: dict[str, StoredTensor], objects: dict[str, tuple[str, int, int]]
) -> None:
    """Write .metadata for chunks whose bytes stand between the two parts of `container(dtype, chunk.shape)`.

    objects: key -> (name of the file, offset, length). Two tensors may share their chunks.
    """
    size, layout = (
        foreign("torch.Size"),
        foreign("torch.serialization._get_layout")("torch.strided"),
    )
    memory_format = foreign(f"{_DCP}.metadata._MEM_FORMAT_ENCODING")(0)
    entries: dict[str, Foreign] = {}
    places: dict[Foreign, Foreign] = {}

    def place(key: str, file: str, offset: int, length: int, start: dict[str, Foreign]) -> None:
        index = _made("MetadataIndex", fqn=key, index=None, **start)
        fields = {"relative_path": file, "offset": offset, "length": length}
        places[index] = torch_pickle.made(f"{_DCP}.filesystem._StorageInfo", fields)

    for key, tensor in tensors.items():
        dtype, boxes = foreign(f"torch.{torch_pickle.DTYPES[tensor.dtype][0]}"), []
        for chunk in tensor.chunks:
            start = size(chunk.start)
            boxes.append(_made("ChunkStorageMetadata", offsets=start, sizes=size(chunk.shape)))
            head, tail = container(tensor.dtype, chunk.shape)
            length = len(head) + math.prod(chunk.shape) * DTYPE_BYTES[tensor.dtype] + len(tail)
            place(key, chunk.file.name, chunk.offset - len(head), length, {"offset": start})
        state = (dtype, layout, False, memory_format, False)
        properties = torch_pickle.made(f"{_DCP}.metadata.TensorProperties", state)
        shape = size(tensor.shape)
        entries[key] = _made(
            "TensorStorageMetadata", properties=properties, size=shape, chunks=boxes
        )
    for key, where in objects.items():
        entries[key] = _made("BytesStorageMetadata")
        place(key, *where, {})
    storage_meta = _made("StorageMeta", checkpoint_id=None, save_id=None, load_id=None, modules=[])
    content = {"state_dict_metadata": entries, "planner_data": None, "storage_data": places}
    root = _made("Metadata", **content, storage_meta=storage_meta, version="1.0.0")
    publish(directory / METADATA, torch_pickle.dump(root))


def write_common(directory: Path, values: dict[str, Any]) -> None:
    """Write common.pt, of Python's plain values only, and metadata.json."""
    pickled = pickle.dumps(values, 2)
    torch_pickle.load(pickled, frozenset())  # TorchDistError for a class
    publish(directory / COMMON, b"".join(torch_pickle.archive(pickled)))
    publish_json(directory / CONFIG, _BACKEND)


def _made(name: str, **state: Any) -> Foreign:
    return torch_pickle.made(f"{_DCP}.metadata.{name}", state)
