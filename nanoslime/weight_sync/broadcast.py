"""Broadcasts weights from trainer rank 0 to every rank of every engine.

open   rank 0 opens the group; one HTTP call per engine, each in a thread, makes the engines join it
send   per bucket: announce names, dtypes and shapes, then broadcast the tensors
"""

import logging
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor

from nanoslime.process_groups import join_group, listen
from nanoslime.types import RunError
from nanoslime.weight_sync.engine_calls import EngineCalls
from nanoslime.weight_sync.transport import EngineSide, RankSide

logger = logging.getLogger(__name__)

GROUP = "nanoslime-weights"


class BroadcastSender:
    """A `Sender`. Rank 0 talks to the engines; the other ranks send it their shards."""

    def __init__(self, rank: RankSide, engines: EngineSide):
        self._assembler = rank.assembler
        self._deadline_s = rank.deadline_s
        self._is_first = rank.rank == 0
        if self._is_first:
            self._calls = EngineCalls(engines.engines)
            backend = "nccl" if rank.device.type == "cuda" else "gloo"
            self._group = self._open_group(engines.address, backend)

    def send(self, version: int) -> int:
        num_bytes = 0
        shards = self._assembler.shards()
        for bucket in self._assembler.plan.buckets:
            tensors = list(self._assembler.assemble(bucket, shards))
            if self._is_first:
                self._broadcast(tensors, version)
                num_bytes += sum(tensor.nbytes for _, tensor in tensors)
        return num_bytes

    def close(self) -> None:
        if not self._is_first:
            return
        calls = self._calls.start("destroy_weight_group", GROUP)
        try:
            self._calls.collect(calls, "leave the weight group", self._deadline_s)
        except RunError as e:
            # An engine that is gone has left too; another error says why it went.
            logger.warning("%s", e)
        self._calls.close()

    def _open_group(self, address: str, backend: str) -> dist.ProcessGroup:
        """Opens the group; this rank is its first, those of the engines follow."""
        sizes = [engine.world_size for engine in self._calls.engines]
        *offsets, world_size = accumulate(sizes, initial=1)
        store = listen(address, self._deadline_s)
        joins = [
            self._calls.start_one(
                engine,
                "init_weight_group",
                address=address,
                port=store.port,
                rank_offset=offset,
                world_size=world_size,
                group=GROUP,
                backend=backend,
            )
            for engine, offset in zip(self._calls.engines, offsets, strict=True)
        ]
        try:
            group = join_group(
                store,
                rank=0,
                world_size=world_size,
                name=GROUP,
                backend=backend,
                timeout_s=self._deadline_s,
            )
        except RuntimeError as e:
            failures = [str(join.exception()) for join in joins if join.done() and join.exception()]
            raise RunError(
                f"trainer rank 0: no weight group at {address}:{store.port} within "
                f"{self._deadline_s:.0f}s: {'; '.join(failures) or e}"
            ) from e
        self._calls.collect(joins, "join the weight group", self._deadline_s)
        logger.info(
            "weight group of %d ranks at %s:%d over %s", world_size, address, store.port, backend
        )
        return group

    def _broadcast(self, tensors: list[tuple[str, Tensor]], version: int) -> None:
        announced = self._calls.start(
            "receive_bucket",
            names=[name for name, _ in tensors],
            shapes=[list(tensor.shape) for _, tensor in tensors],
            dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            group=GROUP,
        )
        works = [
            dist.broadcast(tensor, src=0, group=self._group, async_op=True) for _, tensor in tensors
        ]
        self._calls.collect(announced, f"receive weights of version {version}", self._deadline_s)
        for work in works:
            work.wait()
