"""Tiny checkpoints in both formats, and the conversion commands as functions."""

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from nanoslime.models.rules import tensors
from nanoslime.models.shape import ModelShape
from nanoslime.storage.safetensors_file import read_headers
from tests.models.hf import add_mtp, save_model
from tools import hf_to_megatron, megatron_to_hf
from tools.conversion import torch_dist
from tools.conversion.command import finish
from tools.conversion.stream import write_files

Extents = tuple[tuple[int, ...], tuple[int, ...]]  # start and shape of a box
Tensors = dict[str, torch.Tensor]
TOKENIZER = "tokenizer.json"
HOSTILE_CALL = r"(\w+\.exec|(posix|nt)\.system)"  # what the pickles of the fixture `evil` name

# Where megatron-core keeps the values that are not sharded: up to 0.18 in a file, since
# 0.19 in an object among the chunks.
COMMON_FILE = "common.pt"
COMMON_OBJECT = "common_state"
FORMS = (COMMON_OBJECT, COMMON_FILE)
CONFIGS = {
    COMMON_OBJECT: {"sharded_backend": "torch_dist", "sharded_backend_version": 1},
    COMMON_FILE: {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    },
}


def make(
    directory: Path,
    family: str,
    *,
    shards: bool = False,
    mtp: bool | None = None,
    bf16: bool = False,
) -> Path:
    """A Hugging Face checkpoint with a tokenizer.

    `mtp` adds the multi-token prediction layers, with repeats of embedding and head or
    without.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    save_model(directory, family, max_shard_size="20KB" if shards else "5GB", dtype=dtype)
    if mtp is not None:
        add_mtp(directory, repeats=mtp)
    (directory / TOKENIZER).write_bytes(b'{"a tokenizer": "\xc3\xa9"}')
    return directory


def to_megatron(*arguments: object) -> int:
    """The exit code of tools/hf_to_megatron.py."""
    argv = [str(argument) for argument in arguments]
    return finish("hf_to_megatron", lambda: hf_to_megatron.main(argv))


def to_huggingface(*arguments: object) -> int:
    """The exit code of tools/megatron_to_hf.py."""
    argv = [str(argument) for argument in arguments]
    return finish("megatron_to_hf", lambda: megatron_to_hf.main(argv))


def contents(directory: Path) -> dict[str, str]:
    """Relative path -> hash of every file."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(directory))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def copy(source: Path, target: Path) -> Path:
    """Copy a directory to `target`, in place of what is there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


def load(directory: Path) -> Tensors:
    """Every tensor of a Hugging Face directory."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def same(one: Tensors, other: Tensors) -> bool:
    """Whether both hold the same names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    bytes_of_a = a.contiguous().flatten().view(torch.uint8)
    bytes_of_b = b.contiguous().flatten().view(torch.uint8)
    return torch.equal(bytes_of_a, bytes_of_b)


def edit(directory: Path, name: str, change: Callable[[Tensors], object]) -> str:
    """Change the tensors of the file that holds `name`, and its index; returns the file's name."""
    file = read_headers(directory)[name].file
    content = load_file(file)
    change(content)
    save_file(content, file, {"format": "pt"})
    index = directory / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text())
        weight_map = {}
        for other_name, other_file in values["weight_map"].items():
            if other_file != file.name:
                weight_map[other_name] = other_file
        for changed_name in content:
            weight_map[changed_name] = file.name
        values["weight_map"] = weight_map
        index.write_text(json.dumps(values))
    return file.name


class Grid(dcp.DefaultSavePlanner):
    """Writes every tensor in the boxes that `grid` gives for it, as the ranks of a trainer do."""

    def __init__(self, grid: Callable[[str, torch.Tensor], Iterable[Extents]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.grid = grid

    def create_local_plan(self) -> SavePlan:
        items = []
        for key, value in self.state_dict.items():
            if not isinstance(value, torch.Tensor):
                items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
                continue
            properties = TensorProperties.create_from_tensor(value)
            for start, shape in self.grid(key, value):
                chunk = ChunkStorageMetadata(torch.Size(start), torch.Size(shape))
                data = TensorWriteData(chunk, properties, value.size())
                index = MetadataIndex(key, chunk.offsets)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> object:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        value = self.state_dict[write_item.index.fqn]
        chunk = write_item.tensor_data.chunk
        return cut_out(value, chunk.offsets, chunk.sizes).clone()


def cut_out(tensor: torch.Tensor, start: Iterable[int], shape: Iterable[int]) -> torch.Tensor:
    """The box of a tensor at `start`, of this shape."""
    box = tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))
    return tensor[box]


def whole(key: str, value: torch.Tensor) -> list[Extents]:
    return [((0,) * value.dim(), tuple(value.shape))]


def cut(shape: Iterable[int], *ways: int) -> list[Extents]:
    """Equal boxes: dimension i of `shape` is cut in ways[i]; dimensions after those stay whole."""
    sizes = list(shape)
    all_ways = (*ways, *(1 for _ in sizes[len(ways) :]))
    box_shape = tuple(size // count for size, count in zip(sizes, all_ways, strict=True))
    boxes = []
    for position in product(*(range(count) for count in all_ways)):
        start = tuple(i * size for i, size in zip(position, box_shape, strict=True))
        boxes.append((start, box_shape))
    return boxes


def save_stock(
    directory: Path, state: dict[str, object], grid=whole, form: str = COMMON_OBJECT
) -> Path:
    """Write `state` with torch's own writer, and beside it what megatron-core adds in this form."""
    directory.mkdir(parents=True, exist_ok=True)
    common = {"iteration": 3, "checkpoint_version": 3.0}
    if form == COMMON_OBJECT:
        state = state | {torch_dist.COMMON_KEY: [common]}
    else:
        torch.save(common, directory / torch_dist.COMMON_FILE)
    writer = dcp.FileSystemWriter(directory)
    dcp.save(state, storage_writer=writer, planner=Grid(grid), no_dist=True)
    (directory / torch_dist.CONFIG).write_text(json.dumps(CONFIGS[form]))
    return directory


def turn_into_old_form(directory: Path) -> None:
    """Turn a torch_dist directory of megatron-core 0.19 into one of 0.16.

    The container of the common state stays in its .distcp file, where nothing names it
    any more.
    """
    state: dict[str, Any] = {torch_dist.COMMON_KEY: io.BytesIO()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    [common] = state[torch_dist.COMMON_KEY]
    metadata = pickle.loads((directory / torch_dist.METADATA).read_bytes())
    del metadata.state_dict_metadata[torch_dist.COMMON_KEY]
    del metadata.storage_data[MetadataIndex(torch_dist.COMMON_KEY)]
    (directory / torch_dist.METADATA).write_bytes(pickle.dumps(metadata))
    torch.save(common, directory / torch_dist.COMMON_FILE)
    (directory / torch_dist.CONFIG).write_text(json.dumps(CONFIGS[COMMON_FILE]))


def load_stock(directory: Path) -> Tensors:
    """Every tensor of a torch_dist directory, read by torch."""
    state = {}
    for key, entry in read_stock_metadata(directory).state_dict_metadata.items():
        if hasattr(entry, "properties"):
            state[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    return state


def read_stock_metadata(directory: Path) -> Any:
    """.metadata of a torch_dist directory, read by torch."""
    return dcp.FileSystemReader(directory).read_metadata()


BIG = dict(
    model_type="llama",
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=8,
    num_attention_heads=12,
    num_key_value_heads=4,
    max_position_embeddings=128,
    rms_norm_eps=1e-6,
    vocab_size=8000,
)


def make_big(directory: Path, **changes: object) -> Path:
    """About 130 MB of random bits in a dozen files, in a fraction of a second."""
    directory.mkdir()
    config = BIG | changes
    (directory / "config.json").write_text(json.dumps(config))
    (directory / TOKENIZER).write_text("{}")
    shapes = tensors(ModelShape.read(directory))
    specs = [(name, "BF16", shape) for name, shape in shapes.items()]
    random = np.random.default_rng(0)
    data = ((name, random.bytes(2 * int(np.prod(shape)))) for name, _, shape in specs)
    write_files(directory, specs, data, max_shard_bytes=12 << 20)
    return directory
