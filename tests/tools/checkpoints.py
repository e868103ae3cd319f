"""Tiny checkpoints in both formats, and the conversion commands as functions."""

import hashlib
import json
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

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
from nanoslime.storage.safetensors_file import read_headers, write_files
from tests.models.hf import add_mtp, save_model
from tools import hf_to_megatron, megatron_to_hf
from tools.conversion.command import finish

Box = tuple[tuple[int, ...], tuple[int, ...]]  # start, shape
Tensors = dict[str, torch.Tensor]
TOKENIZER = "tokenizer.json"


def make(
    directory: Path,
    family: str,
    *,
    shards: bool = False,
    mtp: bool | None = None,
    bf16: bool = False,
) -> Path:
    """A Hugging Face checkpoint with a tokenizer; `mtp`: with multi-token prediction, and whether repeats."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    save_model(directory, family, max_shard_size="20KB" if shards else "5GB", dtype=dtype)
    if mtp is not None:
        add_mtp(directory, repeats=mtp)
    (directory / TOKENIZER).write_bytes(b'{"a tokenizer": "\xc3\xa9"}')
    return directory


def to_megatron(*arguments: object) -> int:
    """The exit code of tools/hf_to_megatron.py."""
    return finish("hf_to_megatron", lambda: hf_to_megatron.main([str(a) for a in arguments]))


def to_huggingface(*arguments: object) -> int:
    """The exit code of tools/megatron_to_hf.py."""
    return finish("megatron_to_hf", lambda: megatron_to_hf.main([str(a) for a in arguments]))


def contents(directory: Path) -> dict[str, str]:
    """Relative path -> hash of every file."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
    }


def load(directory: Path) -> Tensors:
    return {
        k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def same(one: Tensors, other: Tensors) -> bool:
    """Whether both hold the same names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(x.contiguous().flatten().view(torch.uint8) for x in (a, b)))


def edit(directory: Path, name: str, change: Callable[[Tensors], object]) -> str:
    """Change the tensors of the file that holds `name`, its index too; the file's name."""
    file = read_headers(directory)[name].file
    content = load_file(file)
    change(content)
    save_file(content, file, {"format": "pt"})
    index = directory / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text())
        kept = {name: f for name, f in values["weight_map"].items() if f != file.name}
        values["weight_map"] = kept | dict.fromkeys(content, file.name)
        index.write_text(json.dumps(values))
    return file.name


class Grid(dcp.DefaultSavePlanner):
    """Writes every tensor in the boxes that `grid` gives for it, as the ranks of a trainer do."""

    def __init__(self, grid: Callable[[str, torch.Tensor], Iterable[Box]]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.grid = grid

    def create_local_plan(self) -> SavePlan:
        items = []
        for key, value in self.state_dict.items():
            if not isinstance(value, torch.Tensor):
                items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
                continue
            for start, shape in self.grid(key, value):
                chunk = ChunkStorageMetadata(torch.Size(start), torch.Size(shape))
                data = TensorWriteData(
                    chunk, TensorProperties.create_from_tensor(value), value.size()
                )
                items.append(
                    WriteItem(
                        MetadataIndex(key, chunk.offsets), WriteItemType.SHARD, tensor_data=data
                    )
                )
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> object:
        value = self.state_dict[write_item.index.fqn]
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        chunk = write_item.tensor_data.chunk
        return value[
            tuple(slice(a, a + n) for a, n in zip(chunk.offsets, chunk.sizes, strict=True))
        ].clone()


def whole(key: str, value: torch.Tensor) -> list[Box]:
    return [((0,) * value.dim(), tuple(value.shape))]


def cut(shape: Iterable[int], *ways: int) -> list[Box]:
    """Equal boxes: dimension i of `shape` is cut in ways[i]; dimensions after those are whole."""
    sizes = list(shape)
    ways = (*ways, *(1 for _ in sizes[len(ways) :]))
    step = tuple(n // w for n, w in zip(sizes, ways, strict=True))
    return [
        (tuple(i * n for i, n in zip(at, step, strict=True)), step)
        for at in product(*(range(w) for w in ways))
    ]


def save_stock(directory: Path, state: dict[str, object], grid=whole) -> Path:
    """Write `state` with torch's own writer, and beside it what megatron-core adds."""
    directory.mkdir(parents=True, exist_ok=True)
    dcp.save(
        state, storage_writer=dcp.FileSystemWriter(directory), planner=Grid(grid), no_dist=True
    )
    torch.save({"iteration": 3, "checkpoint_version": 3.0}, directory / "common.pt")
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backend |= {"common_backend": "torch", "common_backend_version": 1}
    (directory / "metadata.json").write_text(json.dumps(backend))
    return directory


def load_stock(directory: Path) -> Tensors:
    """Every tensor of a torch_dist directory, read by torch."""
    metadata = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    found = {key: entry for key, entry in metadata.items() if hasattr(entry, "properties")}
    state = {key: torch.empty(e.size, dtype=e.properties.dtype) for key, e in found.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    return state


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
    specs = [(name, "BF16", full) for name, full in tensors(ModelShape.read(directory)).items()]
    random = np.random.default_rng(0)
    data = ((name, random.bytes(2 * int(np.prod(full)))) for name, _, full in specs)
    write_files(directory, specs, data, max_shard_bytes=12 << 20)
    return directory
