"""Plans which rank brings which part of which tensor where, and in which bucket.

    shards of each rank (name, full shape, box)  ->  tensors with sources and targets  ->  buckets

Nobody communicates for it: every rank knows from the weight map what each rank holds, and makes
the same plan. Its order is static: all ranks go through the buckets of a sync in step, without
asking one another.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import batched, combinations, zip_longest

import torch
from torch import Tensor

from nanoslime.batch import OwnedShard, WeightShard
from nanoslime.models.rules import FLOAT32, Box, whole
from nanoslime.sealed_bucket import HEADER, HEADER_BYTES, HEADER_WORDS, MORE
from nanoslime.types import TensorKind

# So many buckets of one sender come one after another. Each sender's turn costs the engines a
# call, some milliseconds in which the wire is idle.
MAX_RUN = 16


@dataclass(frozen=True, slots=True)
class Source:
    """Who has one box of a tensor."""

    rank: int
    index: int  # in that rank's own list of shards
    box: Box


@dataclass(frozen=True, slots=True)
class Target:
    """Who wants one box of a tensor."""

    rank: int
    box: Box


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A Hugging Face tensor, the shards that fill it, and where its parts go.

    Of one that is larger than a bucket it is some `rows`.
    """

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    sources: tuple[Source, ...]
    targets: tuple[Target, ...]
    rows: slice | None = None

    @property
    def box(self) -> Box:
        """What of the tensor it is."""
        return whole(self.shape) if self.rows is None else (self.rows, *whole(self.shape[1:]))

    @property
    def label(self) -> str:
        """What a bucket calls it."""
        has_more = self.rows is not None and self.rows.stop < self.shape[0]
        return self.name + MORE if has_more else self.name

    @property
    def nbytes(self) -> int:
        return size(self.box) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Bucket:
    """What travels together: tensors with the same targets' ranks.

    Tensors of larger elements come first, so that each is aligned where one follows the other.
    """

    tensors: tuple[PlannedTensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def first_rank(self) -> int:
        """The rank that has the tensors afterwards; the lowest where several share them."""
        return min(target.rank for target in self.tensors[0].targets)

    def targets_on(self, rank: int) -> list[tuple[PlannedTensor, Box]]:
        """What of which tensor this rank gets."""
        found = []
        for tensor in self.tensors:
            for target in tensor.targets:
                if target.rank == rank:
                    found.append((tensor, target.box))
        return found


# Where the parts of a tensor of this shape go, which these sources fill.
Targets = Callable[[tuple[int, ...], Sequence[Source]], Sequence[Target]]


def whole_on_first(shape: tuple[int, ...], sources: Sequence[Source]) -> list[Target]:
    """The whole tensor, on the lowest rank that has a part of it.

    So each pipeline stage gathers its own layers, and each expert-parallel rank its experts.
    """
    return [Target(min(source.rank for source in sources), whole(shape))]


def rows_on_each(shape: tuple[int, ...], sources: Sequence[Source]) -> list[Target]:
    """Whole rows, which are consecutive bytes of a file, on every rank that has a part.

    A rank that has whole rows keeps them. Those that share rows, since other dimensions are
    split too, get equal ranges of all rows.
    """
    targets = []
    if all(_has_whole_rows(source.box, shape) for source in sources):
        for source in sources:
            targets.append(Target(source.rank, source.box))
        return targets
    ranks = sorted({source.rank for source in sources})
    for number, rank in enumerate(ranks):
        start = shape[0] * number // len(ranks)
        stop = shape[0] * (number + 1) // len(ranks)
        if start < stop:
            targets.append(Target(rank, (slice(start, stop), *whole(shape[1:]))))
    return targets


def make_sync_plan(
    shards_by_rank: Sequence[Sequence[OwnedShard]],
    dtype_of: Callable[[str], torch.dtype],
    bucket_bytes: int,
    targets_of: Targets,
    *,
    spreads: bool = False,
) -> tuple[Bucket, ...]:
    """Makes the plan for what each rank holds; of replicas the lowest rank's is sent, or where
    it `spreads`, another rank's for each tensor in turn.

    `dtype_of` gives the dtype that a tensor of this name has at its targets. A bucket has at
    most `bucket_bytes`, or one row of a tensor. The buckets of the ranks take turns, so that
    one can gather while another one sends. Raises ValueError naming the tensor where shards
    overlap, or a part of it has no owner.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    replicas: dict[str, dict[Box, list[Source]]] = {}
    for rank, shards in enumerate(shards_by_rank):
        for index, shard in enumerate(shards):
            shapes[shard.name] = shard.full_shape
            if size(shard.box):
                of_tensor = replicas.setdefault(shard.name, {})
                of_tensor.setdefault(shard.box, []).append(Source(rank, index, shard.box))
    checked: set[tuple] = set()
    by_ranks: dict[tuple[int, ...], list[PlannedTensor]] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        of_tensor = replicas.get(name, {})
        turn = number if spreads else 0
        sources = tuple(of_box[turn % len(of_box)] for of_box in of_tensor.values())
        pattern = (shape, tuple(source.box for source in sources))
        if pattern not in checked:
            _check_cover(name, shape, sources)
            checked.add(pattern)
        targets = tuple(targets_of(shape, sources))
        tensor = PlannedTensor(name, shape, dtype_of(name), sources, targets)
        for part in cut(tensor, bucket_bytes):
            ranks = tuple(sorted({target.rank for target in part.targets}))
            by_ranks.setdefault(ranks, []).append(part)
    queues = []
    for ranks in sorted(by_ranks):
        tensors = sorted(by_ranks[ranks], key=lambda tensor: -tensor.dtype.itemsize)
        queues.append(list(make_buckets(tensors, bucket_bytes)))
    runs = [batched(queue, MAX_RUN) for queue in queues]
    rounds = zip_longest(*runs, fillvalue=())
    return tuple(bucket for turn in rounds for run in turn for bucket in run)


def cut(tensor: PlannedTensor, limit_bytes: int) -> Iterator[PlannedTensor]:
    """The tensor, or where it has more than `limit_bytes`, as many of its rows as fit."""
    if tensor.nbytes <= limit_bytes or not tensor.shape:
        yield tensor
        return
    num_rows = tensor.shape[0]
    step = max(1, limit_bytes * num_rows // tensor.nbytes)
    for start in range(0, num_rows, step):
        part = replace(tensor, rows=slice(start, min(start + step, num_rows)))
        targets = []
        for target in tensor.targets:
            shared = overlap(target.box, part.box)
            if shared is not None:
                targets.append(Target(target.rank, shared))
        yield replace(part, targets=tuple(targets))


def make_buckets(tensors: Sequence[PlannedTensor], limit_bytes: int) -> Iterator[Bucket]:
    """Consecutive tensors of at most `limit_bytes` together; a larger one goes alone."""
    gathered: list[PlannedTensor] = []
    num_bytes = 0
    for tensor in tensors:
        if gathered and num_bytes + tensor.nbytes > limit_bytes:
            yield Bucket(tuple(gathered))
            gathered = []
            num_bytes = 0
        gathered.append(tensor)
        num_bytes += tensor.nbytes
    if gathered:
        yield Bucket(tuple(gathered))


class FlatBucket:
    """How a bucket lies in a flat tensor; names, dtypes and shapes are those that engines get."""

    def __init__(self, bucket: Bucket) -> None:
        self.names = [HEADER, *(tensor.label for tensor in bucket.tensors)]
        self.dtypes = [torch.int64, *(tensor.dtype for tensor in bucket.tensors)]
        self.shapes = [(HEADER_WORDS,), *(lengths(tensor.box) for tensor in bucket.tensors)]
        self.nbytes = HEADER_BYTES + bucket.nbytes
        # What is sealed of them.
        self.parts = list(zip(self.names[1:], self.dtypes[1:], self.shapes[1:], strict=True))

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors of the bucket within its bytes, uint8 [nbytes]."""
        return views_of(flat[HEADER_BYTES:], [(dtype, shape) for _, dtype, shape in self.parts])


def views_of(data: Tensor, kinds: Iterable[tuple[torch.dtype, Sequence[int]]]) -> list[Tensor]:
    """Tensors of these dtypes and shapes, which lie one after the other in uint8 [n].

    Each is aligned where those of larger elements come first.
    """
    views = []
    start = 0
    for dtype, shape in kinds:
        stop = start + dtype.itemsize * math.prod(shape)
        views.append(data[start:stop].view(dtype).reshape(shape))
        start = stop
    return views


@dataclass(frozen=True)
class TrainerWeights:
    """What all ways of weights have in common on a rank.

    `shards` gives this rank's shards with their current values, `owned` what each rank holds.
    Shards meet on `device`, as `dtype`; some tensors are always float32.
    """

    shards: Callable[[], Iterable[WeightShard]]
    owned: Sequence[Sequence[OwnedShard]]
    rank: int
    dtype: torch.dtype
    device: torch.device
    _plans: dict[tuple, tuple[Bucket, ...]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Raises ValueError where this rank does not hold what the others think it does."""
        held = [OwnedShard(s.name, s.full_shape, s.slices) for s in self.shards()]
        for mine, theirs in zip_longest(held, self.owned[self.rank]):
            if mine != theirs:
                raise ValueError(f"trainer rank {self.rank} holds {mine}, not {theirs}")

    def plan(
        self, targets_of: Targets, bucket_bytes: int, *, spreads: bool = False
    ) -> tuple[Bucket, ...]:
        """The same on every rank; see make_sync_plan. It is made once: with many experts that
        takes seconds.
        """
        asked = (targets_of, bucket_bytes, spreads)
        if asked not in self._plans:
            self._plans[asked] = make_sync_plan(
                self.owned, self._dtype_of, bucket_bytes, targets_of, spreads=spreads
            )
        return self._plans[asked]

    def kinds(self) -> list[TensorKind]:
        """What engines are sent, each tensor whole."""
        shapes = {shard.name: shard.full_shape for shards in self.owned for shard in shards}
        return [(name, str(self._dtype_of(name)), tuple(shape)) for name, shape in shapes.items()]

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if name.endswith(FLOAT32) else self.dtype


def lengths(box: Box) -> tuple[int, ...]:
    """The shape of a tensor that holds just the elements of a box."""
    return tuple(axis.stop - axis.start for axis in box)


def size(box: Box) -> int:
    """The number of elements of a box."""
    return math.prod(lengths(box))


def overlap(one: Box, other: Box) -> Box | None:
    """The elements that two boxes share, if there are any; without dimensions it is one."""
    shared = tuple(
        slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True)
    )
    return shared if all(axis.start < axis.stop for axis in shared) else None


def within(box: Box, outer: Box) -> Box:
    """Where a box lies in a tensor that holds just the elements of `outer`."""
    return tuple(
        slice(axis.start - around.start, axis.stop - around.start)
        for axis, around in zip(box, outer, strict=True)
    )


def _has_whole_rows(box: Box, shape: Sequence[int]) -> bool:
    return box[1:] == whole(shape[1:])


def _check_cover(name: str, shape: tuple[int, ...], sources: Sequence[Source]) -> None:
    for a, b in combinations(sources, 2):
        if overlap(a.box, b.box) is not None:
            raise ValueError(
                f"{name}: ranks {a.rank} and {b.rank} hold overlapping {_text(a.box)}, "
                f"{_text(b.box)}"
            )
    covered = sum(size(source.box) for source in sources)
    if covered != math.prod(shape):
        raise ValueError(
            f"{name}: the ranks' pieces cover {covered} of {math.prod(shape)} elements"
        )


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{axis.start}:{axis.stop}" for axis in box) + "]"
