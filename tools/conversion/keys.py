"""The keys of model weights in torch_dist files, and the names of the weight map.

megatron-core 0.16.1 writes them in one of three ways (its sharded_state_dict, by the metadata asked for):

    A  homogeneous             decoder.layers.mlp.linear_fc1.weight of all layers, [num_layers, ...]
    B  non_homogeneous_layers  decoder.layers.3.mlp.linear_fc1.weight; experts together, [num_experts, ...]
    C  singleton_local_shards  as B, experts one by one, and gate and up apart as weight_w and weight_v

The weight map names layers and experts one by one. B is the one written here.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod

from nanoslime.storage.safetensors_file import DTYPE_BYTES
from tools.conversion.torch_dist import Chunk, StoredTensor, TorchDistError

_LAYERS = re.compile(r"^((?:.*\.)?layers)\.(?!\d)(.+)$")  # A: no layer's number
_EXPERTS = re.compile(r"^(.*\.experts\.experts)\.(?!\d)(.+)$")  # A and B: no expert's number
_EXPERT = re.compile(r"^(.*\.experts\.experts\.)(\d+)\.(.+)$")
_GATE_OR_UP = re.compile(r"^(.*\.linear_fc1\.weight)_([wv])$")
_NOT_WEIGHTS = re.compile(
    r"^(optimizer|chained_\d+|opt_param_scheduler|rng_state|random|rerun_state|args)\b|_extra_state"
)
_TE_MODULES = (
    "layernorm",
    "core_attention",
    "eh_proj",
)  # Transformer Engine's, with an extra state too


def is_weight(key: str) -> bool:
    """Whether a torch_dist key belongs to the model: not to optimizer, scheduler or random state."""
    return not _NOT_WEIGHTS.search(key)


def by_name(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The weights under the names of the weight map, whichever of the three ways they were written in."""
    found: dict[str, StoredTensor] = {}
    halves: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in stored.items():
        for name, part in _split(key, tensor):
            if match := _GATE_OR_UP.match(name):
                halves.setdefault(match[1], {})[match[2]] = part
            elif found.setdefault(name, part) is not part:
                raise TorchDistError(f"{name} is stored twice, once as a part of {key}")
    for name, both in halves.items():
        kinds = {(half.dtype, half.shape) for half in both.values()}
        if both.keys() != {"w", "v"} or len(kinds) != 1 or name in found:
            raise TorchDistError(
                f"{name} is stored as {sorted(both)}, not as two equal halves w and v"
            )
        found[name] = _stack(both["w"], both["v"])
    return found


def layout(weights: Iterable[str]) -> str:
    """Which of the three ways these keys are of."""
    found = list(weights)
    if any(_LAYERS.match(key) for key in found):
        return "A (homogeneous)"
    single = any(_GATE_OR_UP.match(key) or _EXPERT.match(key) for key in found)
    return "C (singleton_local_shards)" if single else "B (non_homogeneous_layers)"


def key_of(name: str) -> tuple[str, int | None]:
    """(key in layout B, expert): the tensor is that row of the key's first dimension; None: the whole key."""
    if match := _EXPERT.match(name):
        return match[1] + match[3], int(match[2])
    return name, None


def extra_states(names: Iterable[str], num_experts: int) -> list[str]:
    """Keys of the extra states that modules with these weights have; megatron-core's load asks for each.

    Those of the local layer spec hold nothing; those of Transformer Engine hold FP8 scales, or nothing.
    """
    keys: dict[str, None] = {}
    for name in names:
        key, expert = key_of(name)
        module = key.rpartition(".")[0]
        if module.endswith(_TE_MODULES) or module.rpartition(".")[2].startswith("linear_"):
            at = "shard_0_1" if expert is None else f"shard_{expert}_{num_experts}"
            keys[f"{module}._extra_state/{at}"] = None
        if name.endswith("self_attention.linear_proj.weight"):
            keys[name.replace("linear_proj.weight", "core_attention._extra_state/shard_0_1")] = None
    return list(keys)


def _split(key: str, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    for pattern in (_LAYERS, _EXPERTS):
        if match := pattern.match(key):
            if len(tensor.shape) < 2:
                raise TorchDistError(
                    f"{key} is {list(tensor.shape)}: no dimension of layers or experts"
                )
            for index, row in enumerate(_rows(tensor)):
                yield from _split(f"{match[1]}.{index}.{match[2]}", row)
            return
    yield key, tensor


def _rows(tensor: StoredTensor) -> list[StoredTensor]:
    """The tensors along the first dimension."""
    chunks: list[list[Chunk]] = [[] for _ in range(tensor.shape[0])]
    for chunk in tensor.chunks:
        start, shape = chunk.start[1:], chunk.shape[1:]
        size = prod(shape) * DTYPE_BYTES[tensor.dtype]
        for row in range(chunk.shape[0]):
            chunks[chunk.start[0] + row].append(
                Chunk(start, shape, chunk.file, chunk.offset + row * size)
            )
    return [StoredTensor(tensor.dtype, tensor.shape[1:], tuple(found)) for found in chunks]


def _stack(gate: StoredTensor, up: StoredTensor) -> StoredTensor:
    """[gate; up] along the first dimension."""
    rows = gate.shape[0]
    below = [replace(chunk, start=(chunk.start[0] + rows, *chunk.start[1:])) for chunk in up.chunks]
    return StoredTensor(gate.dtype, (2 * rows, *gate.shape[1:]), (*gate.chunks, *below))
