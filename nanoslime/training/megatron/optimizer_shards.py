"""The distributed optimizer's state of one rank, as boxes of the model's whole tensors.

A rank holds a flat range of each parameter's main weights and moments. As boxes of the
parameter's own shape every rank saves and loads its range by itself, without a gather, and
any other layout can read them. The tensors are those of megatron-core's fully reshardable
format (0.19.2), for which one rank gathers the ranges.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import add

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ParameterRange:
    """What this rank's optimizer holds of a parameter: [start, stop) of it, flattened."""

    parameter: Tensor
    start: int
    stop: int
    # Main weights ("param") and moments are [stop - start]; a step has no axis.
    state: dict[str, Tensor]


def ranges(optimizer: DistributedOptimizer) -> list[ParameterRange]:
    """The state's tensors are live ones, or copies where they are kept in another dtype."""
    found = []
    for by_dtype in optimizer.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, places in bucket["param_map"].items():
                    state = optimizer._get_main_param_and_optimizer_states(parameter)
                    place = places["param"]
                    found.append(ParameterRange(parameter, place.start, place.end, state))
    return found


def sharded(optimizer: DistributedOptimizer, weights: ShardedStateDict) -> ShardedStateDict:
    """The boxes of each tensor; `weights` say where each parameter lies in the whole model."""
    places = {}
    for value in nested_values(weights):
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)):
            places[value.data] = value
    state: ShardedStateDict = {}
    for number, part in enumerate(ranges(optimizer)):
        place = places[part.parameter]
        for name, value in part.state.items():
            if value.dim():
                state[f"{number}.{name}"] = list(_boxes_of_range(part, name, value, place))
    return state


@torch.no_grad()
def put(optimizer: DistributedOptimizer, loaded: dict[str, list[Tensor]]) -> None:
    """Gives the optimizer what was loaded into the boxes of `sharded`."""
    for number, part in enumerate(ranges(optimizer)):
        for name, value in part.state.items():
            if value.dim():
                loaded_boxes = [box.flatten() for box in loaded[f"{number}.{name}"]]
                value.copy_(torch.cat(loaded_boxes))
        optimizer._set_main_param_and_optimizer_states(part.parameter, part.state)
    if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
        optimizer.optimizer._sync_hdo_state_to_sub_optimizers()


def _boxes_of_range(
    part: ParameterRange, name: str, value: Tensor, place: ShardedTensor | ShardedTensorFactory
) -> Iterator[ShardedTensor]:
    """The boxes of `value`, the state `name` of a parameter; views of it."""
    # A parameter may be several tensors of the whole model, as gate and up projections are.
    tensors = nested_values(place.build()) if isinstance(place, ShardedTensorFactory) else [place]
    for tensor in tensors:
        first = tensor.data.storage_offset() - part.parameter.storage_offset()
        start = max(part.start, first)
        stop = min(part.stop, first + tensor.data.numel())
        # Megatron's axes without an extent of their own, as the number of an expert.
        ones = (1,) * tensor.prepend_axis_num
        for offset, size in boxes((*ones, *tensor.local_shape), start - first, stop - first):
            end = start + math.prod(size)
            data = value[start - part.start : end - part.start].view(size)
            yield replace(
                tensor,
                key=f"optimizer.state.{name}.{tensor.key}",
                data=data,
                dtype=data.dtype,
                local_shape=size,
                global_offset=tuple(map(add, tensor.global_offset, offset)),
                axis_fragmentations=None,
                prepend_axis_num=0,
                # Data-parallel ranks hold other ranges, not copies.
                replica_id=(*tensor.replica_id[:2], 0),
            )
            start = end


def boxes(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts [start, stop) of a flattened tensor of `shape` into (offset, size), in order."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    while start < stop:
        # The outermost axis along which something whole begins here.
        axis = 0
        while start % strides[axis] or stop - start < strides[axis]:
            axis += 1
        offset = tuple(start // stride % size for stride, size in zip(strides, shape, strict=True))
        count = min((stop - start) // strides[axis], shape[axis] - offset[axis])
        yield offset, ((1,) * axis + (count,) + tuple(shape[axis + 1 :]))
        start += count * strides[axis]
