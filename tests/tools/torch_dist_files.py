"""Small torch_dist directories, written by the converter's functions and by torch itself."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from tests.tools.checkpoints import (
    COMMON_FILE,
    COMMON_OBJECT,
    Extents,
    Tensors,
    cut_out,
    turn_into_old_form,
)
from tools.conversion import torch_dist, torch_pickle
from tools.conversion.torch_dist import Chunk, StoredObject, StoredTensor

DTYPES = {name: getattr(torch, names[0]) for name, names in torch_pickle.DTYPES.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
TENSORS = {
    "bf16": torch.arange(12.0).reshape(3, 4).bfloat16(),
    "f32": torch.arange(5.0) / 3,
    "f16": torch.arange(8.0).reshape(2, 1, 4).half(),
    "i64": torch.arange(-3, 3),
    "scalar": torch.tensor(2.5),
    "large": torch.arange(70_000, dtype=torch.float64).reshape(700, 100),
    "empty": torch.zeros(0, 3),
    "fp8": torch.arange(8.0).to(torch.float8_e4m3fn),
    "bool": torch.tensor([True, False, True]),
}
COMMON = {"iteration": 7, "nested": {"a": [1.5, None, True, "x" * 300]}}
EXTRA_STATE = "linear._extra_state/shard_0_1"


SQUARE = torch.arange(9.0).reshape(3, 3)
PINWHEEL: list[Extents] = [
    ((0, 0), (1, 2)),
    ((0, 2), (2, 1)),
    ((1, 0), (2, 1)),
    ((1, 1), (1, 1)),
    ((2, 1), (1, 2)),
]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def write(
    directory: Path,
    tensors: Tensors,
    boxes: dict[str, list[Extents]] | None = None,
    *,
    objects: tuple[str, ...] = (),
    form: str = COMMON_OBJECT,
) -> dict[str, StoredTensor]:
    """As the converter does: head, data, tail, one after the other, then the metadata."""
    boxes = boxes or {}
    file = directory / "__0_0.distcp"
    stored = {}
    with open(file, "wb") as out:
        for key, tensor in tensors.items():
            dtype = NAMES[tensor.dtype]
            shape = tuple(tensor.shape)
            all_of_it = ((0,) * len(shape), shape)
            chunks = []
            for start, box_shape in boxes.get(key, [all_of_it]):
                head, tail = torch_pickle.tensor_container(dtype, box_shape)
                chunks.append(Chunk(start, box_shape, file, out.tell() + len(head)))
                out.write(head + raw(cut_out(tensor, start, box_shape)) + tail)
            stored[key] = StoredTensor(dtype, shape, tuple(chunks))
        containers = dict.fromkeys(objects, torch_pickle.EMPTY_OBJECT)
        containers[torch_dist.COMMON_KEY] = torch_pickle.object_container([COMMON])
        places = {}
        for key, container in containers.items():
            places[key] = StoredObject(file, out.tell(), len(container))
            out.write(container)
    torch_dist.write_metadata(directory, stored, places)
    if form == COMMON_FILE:
        turn_into_old_form(directory)
    return stored


def assemble(tensor: StoredTensor) -> torch.Tensor:
    whole = torch.zeros(tensor.shape, dtype=DTYPES[tensor.dtype])
    for chunk in tensor.chunks:
        with open(chunk.file, "rb") as file:
            file.seek(chunk.offset)
            part = cut_out(whole, chunk.start, chunk.shape)
            data = bytearray(file.read(part.numel() * part.element_size()))
            part.copy_(torch.frombuffer(data, dtype=whole.dtype).reshape(chunk.shape))
    return whole


def stock_save(directory: Path, state: dict[str, object]) -> None:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(directory), no_dist=True)


def stock_load(directory: Path, like: Tensors) -> Tensors:
    state = {key: torch.full_like(tensor, 1) for key, tensor in like.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    return state
