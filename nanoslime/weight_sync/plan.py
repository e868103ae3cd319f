"""Plans which rank sends which part of which tensor in which bucket, without communicating.

    shards of each rank (name, full shape, box)  ->  tensors with their sources  ->  buckets

The plan is made once and its order is static: all ranks go through the buckets of a
sync in step, without asking one another.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from nanoslime.models.rules import Box


@dataclass(frozen=True, slots=True)
class OwnedShard:
    """What a rank says of a shard that it holds."""

    name: str
    full_shape: tuple[int, ...]
    box: Box  # in the full tensor


@dataclass(frozen=True, slots=True)
class ShardSource:
    """Who sends one box of a tensor."""

    rank: int
    index: int  # in that rank's own list of shards
    box: Box

    @property
    def numel(self) -> int:
        return math.prod(axis.stop - axis.start for axis in self.box)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A whole Hugging Face tensor and the shards that fill it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[ShardSource, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Bucket = tuple[PlannedTensor, ...]  # what travels together


@dataclass(frozen=True, slots=True)
class SyncPlan:
    buckets: tuple[Bucket, ...]

    @property
    def tensors(self) -> list[PlannedTensor]:
        """All tensors in the order in which they are sent."""
        return [tensor for bucket in self.buckets for tensor in bucket]


def make_sync_plan(
    shards_by_rank: Sequence[Sequence[OwnedShard]],
    dtype_of: Callable[[str], torch.dtype],
    bucket_bytes: int,
) -> SyncPlan:
    """Makes the plan for what each rank holds; of replicas the lowest rank's is sent.

    `dtype_of` gives the dtype that a tensor of this name has in the engines. Raises
    ValueError naming the tensor where shapes disagree, shards overlap, or a part of it
    has no owner.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    sources: dict[str, dict[Box, ShardSource]] = {}
    for rank, shards in enumerate(shards_by_rank):
        for index, shard in enumerate(shards):
            shape = shapes.setdefault(shard.name, shard.full_shape)
            if shape != shard.full_shape:
                raise ValueError(
                    f"{shard.name}: rank {rank} has full shape {shard.full_shape}, "
                    f"another rank {shape}"
                )
            of_tensor = sources.setdefault(shard.name, {})
            of_tensor.setdefault(shard.box, ShardSource(rank, index, shard.box))
    tensors = []
    for name, shape in shapes.items():
        filled = tuple(source for source in sources[name].values() if source.numel)
        _check_cover(name, shape, filled)
        tensors.append(PlannedTensor(name, shape, dtype_of(name), filled))
    # Large elements first: in a bucket of several dtypes each tensor is then aligned.
    tensors.sort(key=lambda tensor: tensor.dtype.itemsize, reverse=True)
    return SyncPlan(tuple(make_buckets(tensors, bucket_bytes)))


def make_buckets(tensors: Sequence[PlannedTensor], limit_bytes: int) -> list[Bucket]:
    """Consecutive tensors of at most `limit_bytes` together; a larger one goes alone."""
    buckets: list[Bucket] = []
    bucket: list[PlannedTensor] = []
    num_bytes = 0
    for tensor in tensors:
        if bucket and num_bytes + tensor.nbytes > limit_bytes:
            buckets.append(tuple(bucket))
            bucket = []
            num_bytes = 0
        bucket.append(tensor)
        num_bytes += tensor.nbytes
    if bucket:
        buckets.append(tuple(bucket))
    return buckets


def _check_cover(name: str, shape: tuple[int, ...], sources: Sequence[ShardSource]) -> None:
    for a, b in combinations(sources, 2):
        if _overlap(a.box, b.box):
            raise ValueError(
                f"{name}: ranks {a.rank} and {b.rank} hold overlapping {_text(a.box)}, "
                f"{_text(b.box)}"
            )
    covered = sum(source.numel for source in sources)
    if covered != math.prod(shape):
        raise ValueError(
            f"{name}: the ranks' pieces cover {covered} of {math.prod(shape)} elements"
        )


def _overlap(a: Box, b: Box) -> bool:
    """Whether they share an element; a tensor without dimensions is one element."""
    return all(max(x.start, y.start) < min(x.stop, y.stop) for x, y in zip(a, b, strict=True))


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{axis.start}:{axis.stop}" for axis in box) + "]"
