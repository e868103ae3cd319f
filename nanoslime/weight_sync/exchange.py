"""Brings shards to where a plan wants them: one rank's part in it.

    ranks with shards  --one message for each pair of ranks and bucket-->  ranks with targets

A shard is converted before it is sent, packed with all else that goes the same way.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from nanoslime.batch import WeightShard
from nanoslime.models.rules import Box
from nanoslime.types import MachineFailure
from nanoslime.weight_sync.plan import Bucket, lengths, overlap, size, views_of, within


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a shard, or of a target, that travels, or is copied, as this dtype."""

    number: int  # of the shard in this rank's list, or of the target among its own
    box: Box  # within it
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return size(self.box) * self.dtype.itemsize


@dataclass(slots=True)
class _Route:
    """What this rank does for a bucket; others are told by their ranks."""

    copies: list[tuple[_Part, _Part]] = field(default_factory=list)
    sends: dict[int, list[_Part]] = field(default_factory=dict)
    receives: dict[int, list[_Part]] = field(default_factory=dict)


class Exchange:
    """Every rank makes one and calls `bring` for bucket after bucket, in the plan's order.

    It needs the default process group where there are several ranks. Shards meet on `device`.
    """

    def __init__(self, plan: Sequence[Bucket], rank: int, device: torch.device) -> None:
        self._device = device
        self._routes = [_route(bucket, rank) for bucket in plan]
        if dist.is_initialized() and dist.get_world_size() > 1:
            # batch_isend_irecv asks for a call of the whole group before one of some of its
            # ranks: NCCL would wait in its first one for those that have nothing to exchange.
            dist.all_reduce(torch.zeros(1, device=device))

    @torch.no_grad()
    def bring(self, number: int, shards: Sequence[WeightShard], places: Sequence[Tensor]) -> None:
        """Fills `places`, this rank's targets in bucket `number`, in their order.

        `shards` are this rank's own, with its current weights. On a CPU the places are filled
        when it returns; on CUDA the current stream fills them. Raises RunError naming a rank that
        does not take part.
        """
        route = self._routes[number]
        operations = []
        for rank, parts in route.sends.items():
            pack = self._empty(parts)
            for part, values in zip(parts, _views(pack, parts), strict=True):
                values.copy_(shards[part.number].tensor[part.box])
            operations.append(dist.P2POp(dist.isend, pack, rank))
        arriving = {rank: self._empty(parts) for rank, parts in route.receives.items()}
        for rank, pack in arriving.items():
            operations.append(dist.P2POp(dist.irecv, pack, rank))
        works = dist.batch_isend_irecv(operations) if operations else []
        for part, wanted in route.copies:
            places[wanted.number][wanted.box].copy_(shards[part.number].tensor[part.box])
        for operation, work in zip(operations, works, strict=False):  # NCCL has one for all
            try:
                work.wait()
            except RuntimeError as e:
                raise MachineFailure(
                    f"trainer rank {operation.peer} did not exchange its part of bucket "
                    f"{number}: {e}"
                ) from e
        for rank, parts in route.receives.items():
            for wanted, values in zip(parts, _views(arriving[rank], parts), strict=True):
                places[wanted.number][wanted.box].copy_(values)

    def _empty(self, parts: Iterable[_Part]) -> Tensor:
        num_bytes = sum(part.nbytes for part in parts)
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)


def _route(bucket: Bucket, rank: int) -> _Route:
    """Every rank lists the parts of a message in the same order."""
    route = _Route()
    place = 0
    for tensor in bucket.tensors:
        own = [source for source in tensor.sources if source.rank == rank]
        for target in tensor.targets:
            for source in tensor.sources if target.rank == rank else own:
                shared = overlap(source.box, target.box)
                if shared is None:
                    continue
                part = _Part(source.index, within(shared, source.box), tensor.dtype)
                wanted = _Part(place, within(shared, target.box), tensor.dtype)
                if source.rank == target.rank:
                    route.copies.append((part, wanted))
                elif source.rank == rank:
                    route.sends.setdefault(target.rank, []).append(part)
                else:
                    route.receives.setdefault(source.rank, []).append(wanted)
            place += target.rank == rank
    return route


def _views(pack: Tensor, parts: Sequence[_Part]) -> list[Tensor]:
    """The parts of a message; a bucket's larger elements come first."""
    return views_of(pack, [(part.dtype, lengths(part.box)) for part in parts])
