"""torch_dist checkpoints (torch's distributed checkpoint as megatron-core writes it)
without torch.

A directory holds these files:

    metadata.json   names the format
    .metadata       a pickle: which chunk of which tensor lies where in the .distcp files
    *.distcp        the chunks and the objects, each in a container of torch.save
    common.pt       the common state: the values that are not sharded; up to megatron-core 0.18 only

Since megatron-core 0.19 the common state is an object in the .distcp files, under the key
`common_state/shard_0_1`, and metadata.json names no backend for it. Both forms are read
here; the form of 0.19 is written.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoslime.storage.safetensors_file import DTYPE_BYTES
from nanoslime.storage.shared_files import publish, publish_json, read_json
from tools.conversion import torch_pickle
from tools.conversion.torch_pickle import Foreign, TorchDistError, foreign, naming, tensor_container

METADATA = ".metadata"
COMMON_FILE = "common.pt"
COMMON_KEY = "common_state/shard_0_1"
CONFIG = "metadata.json"
_SHARDED_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON_BACKEND = {"common_backend": "torch", "common_backend_version": 1}
_READABLE_CONFIGS = (_SHARDED_BACKEND, _SHARDED_BACKEND | _COMMON_BACKEND)
_NUM_THREADS = 8  # the reads are small, and a network filesystem answers late
_DCP = "torch.distributed.checkpoint"

# The classes and functions that .metadata may name: those of torch, of megatron-core (its
# plans), and of torch before 2.3.
_GLOBALS = {
    "torch": ["strided", *(torch_dtype for torch_dtype, _ in torch_pickle.DTYPES.values())],
    "torch.serialization": ["_get_layout"],
    f"{_DCP}.metadata": [
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ],
    f"{_DCP}.filesystem": ["_StorageInfo"],
    f"{_DCP}.planner": [
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    ],
    "torch.distributed._shard.sharded_tensor.metadata": ["TensorProperties", "MEM_FORMAT_ENCODING"],
    "megatron.core.dist_checkpointing.strategies.torch": ["MCoreMetadata", "MCoreSavePlan"],
    "pathlib": ["Path", "PurePath", "PosixPath", "PurePosixPath"],
}
_ALLOWED = {f"{module}.{name}" for module, names in _GLOBALS.items() for name in names}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor whose bytes lie row-major in one place of a file.

    `start` is the position of its first element in the tensor, `offset` the position of
    its first byte in the file.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    offset: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in chunks, sorted by their start; no chunk is empty.

    The dtype is named as safetensors does: F32, BF16 ...
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class StoredObject:
    """The container of an object: `length` bytes of `file`, from byte `offset` on."""

    file: Path
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What a torch_dist directory holds: tensors and objects by key, and the common state."""

    directory: Path
    tensors: dict[str, StoredTensor]
    objects: dict[str, StoredObject]
    common_state: StoredObject | None

    def read_common(self) -> dict[str, Any]:
        """The common state. Objects of other classes than Python's own are
        `torch_pickle.Foreign`.

        As in megatron-core, common.pt comes first where a directory has both forms.

        Raises TorchDistError, naming the file, where neither form is there or the state
        is damaged.
        """
        path = self.directory / COMMON_FILE
        if path.is_file():
            whole_file = StoredObject(path, 0, path.stat().st_size)
            with naming(path):
                return _dictionary(_load_object(whole_file))
        if self.common_state is None:
            raise TorchDistError(
                f"{path} is missing, and {METADATA} has no {COMMON_KEY}: "
                f"{self.directory} is no whole torch_dist checkpoint"
            )
        with naming(f"{self.common_state.file}: {COMMON_KEY}"):
            values = _load_object(self.common_state)
            if not isinstance(values, list) or len(values) != 1:
                raise TorchDistError(f"it holds a {type(values).__name__}, not a list of one value")
            return _dictionary(values[0])


def _load_object(stored: StoredObject) -> Any:
    with open(stored.file, "rb", buffering=0) as file:
        container = torch_pickle.Container(file.fileno(), stored.offset, stored.length)
        return torch_pickle.load(container.content("data.pkl"), None)


def _dictionary(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TorchDistError(f"it holds a {type(value).__name__}, not a dictionary")
    return value


@dataclass(frozen=True, slots=True)
class _ListedChunk:
    """A chunk of a tensor as .metadata describes it; its container begins at `offset`."""

    key: str
    dtype: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _ListedObject:
    """An object as .metadata describes it; its container begins at `offset`."""

    key: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Listing:
    """What .metadata says: dtype and shape by key, and by file the containers in it."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    containers: dict[str, list[_ListedChunk | _ListedObject]]


def _every_key(key: str) -> bool:
    return True


def read(directory: Path, wanted: Callable[[str], bool] = _every_key) -> Contents:
    """The wanted tensors and all objects of a torch_dist directory; no tensor data is read.

    Raises TorchDistError, naming tensor and file, for a file that is missing, truncated,
    of another format or contradicts another one, and for a tensor whose chunks overlap or
    leave a hole. No pickle gets to execute anything.
    """
    _check_config(directory / CONFIG)
    listing = _read_metadata(directory / METADATA, wanted)
    chunks: dict[str, list[Chunk]] = {key: [] for key in listing.tensors}
    objects: dict[str, StoredObject] = {}
    files = [directory / name for name in listing.containers]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for located in pool.map(_locate, files, listing.containers.values()):
            for key, place in located:
                if isinstance(place, Chunk):
                    chunks[key].append(place)
                else:
                    objects[key] = place
    tensors = {}
    for key, (dtype, shape) in listing.tensors.items():
        ordered = sorted(chunks[key], key=lambda chunk: chunk.start)
        with naming(f"{directory}: {key}"):
            _check_partition(ordered, shape)
        tensors[key] = StoredTensor(dtype, shape, tuple(ordered))
    common_state = objects.pop(COMMON_KEY, None)
    return Contents(directory, tensors, objects, common_state)


def _check_config(path: Path) -> None:
    if not path.exists():
        return
    found = read_json(path, 0)
    if found not in _READABLE_CONFIGS:
        raise TorchDistError(
            f"{path} says {found}; only {_SHARDED_BACKEND}, with or without {_COMMON_BACKEND}, "
            "is read here"
        )


def _read_metadata(path: Path, wanted: Callable[[str], bool]) -> _Listing:
    """What .metadata says of the wanted tensors and of all objects."""
    if not path.exists():
        raise TorchDistError(
            f"{path.parent} is no torch_dist checkpoint, or not a whole one: no {path.name}"
        )
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    containers: dict[str, list[_ListedChunk | _ListedObject]] = defaultdict(list)
    with naming(path):
        root = torch_pickle.load(path.read_bytes(), _ALLOWED)
        # The place of a chunk is known by key and start, the place of an object by its
        # key alone.
        places = {
            (index.fqn, index.state.get("offset")): info
            for index, info in root.storage_data.items()
        }
        for key, entry in root.state_dict_metadata.items():
            if type(entry).__name__ == "BytesStorageMetadata":
                file, offset, length = _place(places, key, None)
                containers[file].append(_ListedObject(key, offset, length))
            elif wanted(key):
                dtype = torch_pickle.DTYPE_NAMES[entry.properties.state[0].__name__]
                tensors[key] = (dtype, _sizes(entry.size))
                for chunk in entry.chunks:
                    start = _sizes(chunk.offsets)
                    shape = _sizes(chunk.sizes)
                    file, offset, length = _place(places, key, start)
                    if math.prod(shape):
                        listed = _ListedChunk(key, dtype, start, shape, offset, length)
                        containers[file].append(listed)
    return _Listing(tensors, containers)


def _place(
    places: dict[tuple[str, Any], Foreign], key: str, start: tuple[int, ...] | None
) -> tuple[str, int, int]:
    """(file name, offset, length) of the container of an object, or of the chunk at `start`."""
    if (key, start) not in places:
        raise TorchDistError(f"it does not say where {key} from {start} lies")
    info = places[key, start]
    if info.state.get("transform_descriptors"):
        raise TorchDistError(f"{key} is stored transformed: {info.transform_descriptors}")
    if os.path.basename(info.relative_path) != info.relative_path:
        raise TorchDistError(f"{key} lies in {info.relative_path!r}, outside of the directory")
    offset, length = _sizes((info.offset, info.length))
    return info.relative_path, offset, length


def _sizes(values: Any) -> tuple[int, ...]:
    """`values`, checked to be a tuple of whole numbers from 0 on."""
    if not isinstance(values, tuple):
        raise TorchDistError(f"sizes are {values!r}")
    if any(type(value) is not int or value < 0 for value in values):
        raise TorchDistError(f"sizes are {values!r}")
    return values


def _locate(
    file: Path, containers: list[_ListedChunk | _ListedObject]
) -> list[tuple[str, Chunk | StoredObject]]:
    """Opens every container that `file` should hold and checks it; (key, where its
    content lies).
    """
    if not file.is_file():
        raise TorchDistError(
            f"{file} is missing; {METADATA} says that it holds {containers[0].key}"
        )
    found: list[tuple[str, Chunk | StoredObject]] = []
    with open(file, "rb", buffering=0) as opened:
        for listed in containers:
            with naming(f"{file}: {listed.key}"):
                container = torch_pickle.Container(opened.fileno(), listed.offset, listed.length)
                if isinstance(listed, _ListedObject):
                    place = StoredObject(file, listed.offset, listed.length)
                    found.append((listed.key, place))
                    continue
                dtype, shape, offset = container.tensor()
                if (dtype, shape) != (listed.dtype, listed.shape):
                    raise TorchDistError(
                        f"it holds {[dtype, shape]}, {METADATA} says {[listed.dtype, listed.shape]}"
                    )
                found.append((listed.key, Chunk(listed.start, shape, file, offset)))
    return found


# A box as (start, size) by axis.
_Extents = list[tuple[int, int]]


def _check_partition(chunks: list[Chunk], shape: tuple[int, ...]) -> None:
    """Raises TorchDistError where the chunks of a tensor are no boxes of it, overlap or
    leave a hole.
    """
    for chunk in chunks:
        if len(chunk.shape) != len(shape):
            raise TorchDistError(
                f"its chunk {list(chunk.shape)} has {len(chunk.shape)} axes, "
                f"and {list(shape)} has {len(shape)}"
            )
    boxes = [list(zip(chunk.start, chunk.shape, strict=True)) for chunk in chunks]
    if math.prod(shape):
        complete = _is_partition(boxes, shape)
    else:
        complete = not boxes
    if not complete:
        raise TorchDistError(f"the {len(boxes)} chunks of {list(shape)} overlap or leave a hole")


def _is_partition(boxes: list[_Extents], shape: tuple[int, ...], axis: int = 0) -> bool:
    """Whether the boxes fill `shape` exactly once, from `axis` on.

    A sweep along the axis: the boxes that are open between two neighbouring edges have to
    fill the axes after it.
    """
    if axis == len(shape) or not boxes:
        return len(boxes) == 1
    edges = _edges(boxes, axis)
    if edges[0] != 0 or edges[-1] != shape[axis]:
        return False
    ahead = sorted(boxes, key=lambda box: box[axis][0], reverse=True)
    active: list[_Extents] = []
    for edge in edges[:-1]:
        active = [box for box in active if sum(box[axis]) > edge]
        while ahead and ahead[-1][axis][0] == edge:
            active.append(ahead.pop())
        if not _is_partition(active, shape, axis + 1):
            return False
    return True


def _edges(boxes: list[_Extents], axis: int) -> list[int]:
    """Where boxes begin and end on an axis, in order."""
    edges = set()
    for box in boxes:
        start, size = box[axis]
        edges.add(start)
        edges.add(start + size)
    return sorted(edges)


def write_metadata(
    directory: Path, tensors: dict[str, StoredTensor], objects: dict[str, StoredObject]
) -> None:
    """Write .metadata and metadata.json, in the form of megatron-core 0.19.

    The bytes of every chunk have to stand between the two parts of
    `tensor_container(dtype, chunk.shape)`. Two tensors may share their chunks. The common
    state is one of the objects.
    """
    entries: dict[str, Foreign] = {}
    places: dict[Foreign, Foreign] = {}
    for key, tensor in tensors.items():
        entries[key] = _tensor_entry(tensor)
        for chunk in tensor.chunks:
            head, tail = tensor_container(tensor.dtype, chunk.shape)
            data_bytes = math.prod(chunk.shape) * DTYPE_BYTES[tensor.dtype]
            length = len(head) + data_bytes + len(tail)
            index = _metadata_object(
                "MetadataIndex", fqn=key, index=None, offset=_torch_size(chunk.start)
            )
            places[index] = _storage_info(chunk.file, chunk.offset - len(head), length)
    for key, stored in objects.items():
        entries[key] = _metadata_object("BytesStorageMetadata")
        index = _metadata_object("MetadataIndex", fqn=key, index=None)
        places[index] = _storage_info(stored.file, stored.offset, stored.length)
    root = _metadata_object(
        "Metadata",
        state_dict_metadata=entries,
        planner_data=None,
        storage_data=places,
        storage_meta=_metadata_object(
            "StorageMeta", checkpoint_id=None, save_id=None, load_id=None, modules=[]
        ),
        version="1.0.0",
    )
    publish(directory / METADATA, torch_pickle.dump(root))
    publish_json(directory / CONFIG, _SHARDED_BACKEND)


def _tensor_entry(tensor: StoredTensor) -> Foreign:
    """The TensorStorageMetadata of a tensor on a CPU."""
    torch_dtype, _ = torch_pickle.DTYPES[tensor.dtype]
    dtype = foreign(f"torch.{torch_dtype}")
    layout = foreign("torch.serialization._get_layout")("torch.strided")
    requires_grad = False
    memory_format = foreign(f"{_DCP}.metadata._MEM_FORMAT_ENCODING")(0)
    pin_memory = False
    properties = torch_pickle.foreign_object(
        f"{_DCP}.metadata.TensorProperties",
        (dtype, layout, requires_grad, memory_format, pin_memory),
    )
    chunks = [
        _metadata_object(
            "ChunkStorageMetadata",
            offsets=_torch_size(chunk.start),
            sizes=_torch_size(chunk.shape),
        )
        for chunk in tensor.chunks
    ]
    return _metadata_object(
        "TensorStorageMetadata",
        properties=properties,
        size=_torch_size(tensor.shape),
        chunks=chunks,
    )


def _torch_size(sizes: tuple[int, ...]) -> Foreign:
    return foreign("torch.Size")(sizes)


def _storage_info(file: Path, offset: int, length: int) -> Foreign:
    return torch_pickle.foreign_object(
        f"{_DCP}.filesystem._StorageInfo",
        {"relative_path": file.name, "offset": offset, "length": length},
    )


def _metadata_object(name: str, **state: Any) -> Foreign:
    return torch_pickle.foreign_object(f"{_DCP}.metadata.{name}", state)
