"""The keys of model weights in torch_dist files, and the names of the weight map.

megatron-core writes them in one of three ways (its sharded_state_dict, by the metadata
asked for):

    A  homogeneous: decoder.layers.mlp.linear_fc1.weight of all layers, [num_layers, ...]
    B  non_homogeneous_layers: decoder.layers.3.mlp.linear_fc1.weight; the experts of a layer
       together, [num_experts, ...]
    C  singleton_local_shards: as B, but experts one by one, and gate and up apart as weight_w
       and weight_v

The weight map names layers and experts one by one. B is the way written here.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod

from nanoslime.storage.safetensors_file import DTYPE_BYTES
from tools.conversion.torch_dist import Chunk, StoredTensor, TorchDistError

# In A a key has no number of a layer; in A and B it has no number of an expert.
_STACKED_LAYERS = re.compile(r"^((?:.*\.)?layers)\.(?!\d)(.+)$")
_STACKED_EXPERTS = re.compile(r"^(.*\.experts\.experts)\.(?!\d)(.+)$")
_EXPERT = re.compile(r"^(.*\.experts\.experts\.)(\d+)\.(.+)$")
_GATE_OR_UP = re.compile(r"^(.*\.linear_fc1\.weight)_([wv])$")
_NOT_WEIGHTS = re.compile(
    r"^(optimizer|chained_\d+|opt_param_scheduler|rng_state|random|rerun_state|args)\b|_extra_state"
)
# Modules of Transformer Engine that are no linear layers, but have an extra state too.
_TE_MODULES = ("layernorm", "core_attention", "eh_proj")


def is_weight(key: str) -> bool:
    """Whether a torch_dist key belongs to the model: not to optimizer, scheduler or
    random state.
    """
    return not _NOT_WEIGHTS.search(key)


def by_name(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The weights by the names of the weight map, whichever of the three ways they are
    written in.

    Raises TorchDistError for a weight that is stored twice, and for halves that do not match.
    """
    found: dict[str, StoredTensor] = {}
    halves: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in stored.items():
        for name, unstacked in _unstack(key, tensor):
            match = _GATE_OR_UP.match(name)
            if match:
                halves.setdefault(match[1], {})[match[2]] = unstacked
            elif name in found:
                raise TorchDistError(f"{name} is stored twice, once as a part of {key}")
            else:
                found[name] = unstacked
    for name, both in halves.items():
        kinds = {(half.dtype, half.shape) for half in both.values()}
        if both.keys() != {"w", "v"} or len(kinds) != 1 or name in found:
            raise TorchDistError(
                f"{name} is stored as {sorted(both)}, not as two equal halves w and v"
            )
        found[name] = _concatenated(both["w"], both["v"])
    return found


def layout(weights: Iterable[str]) -> str:
    """In which of the three ways these keys are written."""
    found = list(weights)
    if any(_STACKED_LAYERS.match(key) for key in found):
        return "A (homogeneous)"
    if any(_GATE_OR_UP.match(key) or _EXPERT.match(key) for key in found):
        return "C (singleton_local_shards)"
    return "B (non_homogeneous_layers)"


def key_of(name: str) -> tuple[str, int | None]:
    """(key in layout B, expert) of a name of the weight map.

    The tensor is that row of the key's first dimension; with None it is all of the key.
    """
    match = _EXPERT.match(name)
    if match is None:
        return name, None
    return match[1] + match[3], int(match[2])


def extra_states(names: Iterable[str], num_experts: int) -> list[str]:
    """Keys of the extra states of the modules that have these weights.

    megatron-core's load asks for each. In the local layer spec they hold nothing; in
    Transformer Engine's they hold FP8 scales, or nothing.
    """
    keys: dict[str, None] = {}
    for name in names:
        key, expert = key_of(name)
        module = key.rpartition(".")[0]
        is_linear = module.rpartition(".")[2].startswith("linear_")
        if is_linear or module.endswith(_TE_MODULES):
            shard = "shard_0_1" if expert is None else f"shard_{expert}_{num_experts}"
            keys[f"{module}._extra_state/{shard}"] = None
        if name.endswith("self_attention.linear_proj.weight"):
            attention = name.removesuffix("linear_proj.weight")
            keys[f"{attention}core_attention._extra_state/shard_0_1"] = None
    return list(keys)


def _unstack(key: str, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """(name, tensor) of every layer and expert that `tensor` holds."""
    match = _STACKED_LAYERS.match(key) or _STACKED_EXPERTS.match(key)
    if match is None:
        yield key, tensor
        return
    if len(tensor.shape) < 2:
        raise TorchDistError(f"{key} is {list(tensor.shape)}: no dimension of layers or experts")
    for index, row in enumerate(_rows(tensor)):
        yield from _unstack(f"{match[1]}.{index}.{match[2]}", row)


def _rows(tensor: StoredTensor) -> list[StoredTensor]:
    """The tensors along the first dimension."""
    chunks: list[list[Chunk]] = [[] for _ in range(tensor.shape[0])]
    for chunk in tensor.chunks:
        start = chunk.start[1:]
        shape = chunk.shape[1:]
        row_bytes = prod(shape) * DTYPE_BYTES[tensor.dtype]
        for row in range(chunk.shape[0]):
            offset = chunk.offset + row * row_bytes
            chunks[chunk.start[0] + row].append(Chunk(start, shape, chunk.file, offset))
    return [StoredTensor(tensor.dtype, tensor.shape[1:], tuple(found)) for found in chunks]


def _concatenated(gate: StoredTensor, up: StoredTensor) -> StoredTensor:
    """[gate; up] along the first dimension; both have one shape."""
    num_rows = gate.shape[0]
    moved = []
    for chunk in up.chunks:
        start = (chunk.start[0] + num_rows, *chunk.start[1:])
        moved.append(replace(chunk, start=start))
    shape = (2 * num_rows, *gate.shape[1:])
    return StoredTensor(gate.dtype, shape, (*gate.chunks, *moved))
