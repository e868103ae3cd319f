"""Makes whole Hugging Face tensors on rank 0 from the shards of all trainer ranks.

Every rank lists the shards it owns (`WeightShard`). The lists are exchanged once and give
the plan. At each sync the owners send their shards in the plan's order and rank 0 yields
whole tensors:

    ranks 1..N  shards in plan order  --send-->  rank 0  fills one buffer  -->  file, engines

One tensor is in flight at a time, so that rank 0 needs memory for the largest tensor only.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nanoslime.batch import WeightShard
from nanoslime.models.rules import FLOAT32
from nanoslime.storage.safetensors_file import Spec
from nanoslime.weight_sync.plan import OwnedShard, PlannedTensor, make_sync_plan

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Assembler:
    """One rank's part in assembling. `shards` is called at each sync.

    Shards meet on `device`, where whole tensors come as `dtype`; those that are always
    float32 come first. Needs the default process group when there is more than one rank.
    All ranks must assemble the same tensors in the same order and exhaust the iterators:
    only rank 0 gets tensors from them.
    """

    def __init__(
        self,
        shards: Callable[[], Iterable[WeightShard]],
        *,
        rank: int,
        world_size: int,
        dtype: torch.dtype,
        device: torch.device,
        bucket_bytes: int = 512 << 20,
    ):
        self._shards = shards
        self._rank = rank
        self._dtype = dtype
        self._device = device
        own = [OwnedShard(shard.name, shard.full_shape, shard.slices) for shard in shards()]
        everyone = [own] * world_size
        if world_size > 1:
            dist.all_gather_object(everyone, own)
        self.plan = make_sync_plan(everyone, self._dtype_of, bucket_bytes)

    @property
    def specs(self) -> list[Spec]:
        """Name, safetensors dtype and shape of every tensor, in the plan's order."""
        return [
            (tensor.name, SAFETENSORS_DTYPES[tensor.dtype], tensor.shape)
            for tensor in self.plan.tensors
        ]

    def shards(self) -> list[WeightShard]:
        """This rank's shards with its current weights; `assemble` takes them."""
        return list(self._shards())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Assembles all tensors from the current weights."""
        yield from self.assemble(self.plan.tensors, self.shards())

    @torch.no_grad()
    def assemble(
        self, tensors: Sequence[PlannedTensor], shards: list[WeightShard]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields each (name, whole tensor) on rank 0; elsewhere only sends shards."""
        for tensor in tensors:
            if self._rank == 0:
                yield tensor.name, self._receive(tensor, shards)
            else:
                self._send(tensor, shards)

    def _send(self, tensor: PlannedTensor, shards: list[WeightShard]) -> None:
        for source in tensor.sources:
            if source.rank == self._rank:
                part = shards[source.index].tensor.to(self._device, tensor.dtype)
                dist.send(part.contiguous(), dst=0)

    def _receive(self, tensor: PlannedTensor, shards: list[WeightShard]) -> Tensor:
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        for source in tensor.sources:
            if source.rank == 0:
                full[source.box] = shards[source.index].tensor.to(full)
            else:
                part = torch.empty_like(full[source.box], memory_format=torch.contiguous_format)
                dist.recv(part, src=source.rank)
                full[source.box] = part
        return full

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if name.endswith(FLOAT32) else self._dtype
