"""Whole Hugging Face tensors from the pieces that the trainer ranks hold, one at a time, on rank 0.

Every rank lists the pieces it owns (`WeightShard`). The lists are exchanged once and give a plan: whose
piece fills which part of which tensor. The plan is refused unless the pieces cover every tensor exactly. At
each sync the owners send their pieces in the plan's order and rank 0 yields complete tensors:

    ranks 1..N  pieces in plan order --send-->  rank 0  fills one buffer  --> (name, tensor) --> file, engines

One tensor is in flight at a time, so that rank 0 needs memory for the largest tensor only.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.distributed as dist
from torch import Tensor

from nanoslime.batch import WeightShard
from nanoslime.models.rules import FLOAT32
from nanoslime.storage.safetensors_file import Spec

Box = tuple[tuple[int, int], ...]  # (start, stop) per dimension of a full tensor
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, slots=True)
class Piece:
    rank: int
    index: int  # in the rank's own list of shards
    box: Box

    @property
    def numel(self) -> int:
        return math.prod(stop - start for start, stop in self.box)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def make_plan(per_rank: list[list[tuple[str, tuple[int, ...], Box]]]) -> list[TensorPlan]:
    """The plan for the shards (name, full shape, box) of each rank; of replicas the lowest rank's is taken.

    Raises ValueError naming the tensor where shapes disagree, pieces overlap, or a part has no owner.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, dict[Box, Piece]] = {}
    for rank, shards in enumerate(per_rank):
        for index, (name, shape, box) in enumerate(shards):
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    f"{name}: rank {rank} has full shape {shape}, another rank {shapes[name]}"
                )
            pieces.setdefault(name, {}).setdefault(box, Piece(rank, index, box))
    plan = []
    for name, shape in shapes.items():
        parts = [p for p in pieces[name].values() if p.numel]
        for a, b in combinations(parts, 2):
            if all(max(x[0], y[0]) < min(x[1], y[1]) for x, y in zip(a.box, b.box, strict=True)):
                raise ValueError(
                    f"{name}: ranks {a.rank} and {b.rank} hold overlapping {a.box}, {b.box}"
                )
        covered = sum(p.numel for p in parts)
        if covered != math.prod(shape):
            raise ValueError(
                f"{name}: the ranks' pieces cover {covered} of {math.prod(shape)} elements"
            )
        plan.append(TensorPlan(name, shape, tuple(parts)))
    return plan


class Assembler:
    """One rank's part in assembling. `shards` is called at each pass, so that it may return fresh views.

    Pieces meet on `device`, where whole tensors come as `dtype`, those that are always float32 first.
    Needs the default process group when there is more than one rank. All ranks must call `tensors()` equally
    often and exhaust it: only rank 0 gets tensors from it.
    """

    def __init__(
        self,
        shards: Callable[[], Iterable[WeightShard]],
        *,
        rank: int,
        world_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self._shards, self._rank, self._dtype, self._device = shards, rank, dtype, device
        own = [(s.name, s.full_shape, tuple((x.start, x.stop) for x in s.slices)) for s in shards()]
        everyone = [own] * world_size
        if world_size > 1:
            dist.all_gather_object(everyone, own)
        # so that in a bucket of several dtypes each tensor is aligned
        self.plan = sorted(
            make_plan(everyone), key=lambda tensor: -self.dtype_of(tensor.name).itemsize
        )

    def dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if name.endswith(FLOAT32) else self._dtype

    @property
    def specs(self) -> list[Spec]:
        """Of every tensor, in the order in which they come."""
        return [(t.name, SAFETENSORS_DTYPES[self.dtype_of(t.name)], t.shape) for t in self.plan]

    @torch.no_grad()
    def tensors(self, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Rank 0: each (name, whole tensor of its `dtype_of`), in plan order, `only` with these names.
        Other ranks: sends, yields nothing."""
        shards = list(self._shards())
        for tensor in (t for t in self.plan if only is None or t.name in only):
            if self._rank == 0:
                yield tensor.name, self._receive(tensor, shards)
            else:
                for piece in tensor.pieces:
                    if piece.rank == self._rank:
                        part = shards[piece.index].tensor.to(
                            self._device, self.dtype_of(tensor.name)
                        )
                        dist.send(part.contiguous(), dst=0)

    def _receive(self, tensor: TensorPlan, shards: list[WeightShard]) -> Tensor:
        full = torch.empty(tensor.shape, dtype=self.dtype_of(tensor.name), device=self._device)
        for piece in tensor.pieces:
            where = tuple(slice(start, stop) for start, stop in piece.box)
            if piece.rank == 0:
                full[where] = shards[piece.index].tensor.to(full)
            else:
                part = torch.empty_like(full[where], memory_format=torch.contiguous_format)
                dist.recv(part, src=piece.rank)
                full[where] = part
        return full
