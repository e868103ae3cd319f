"""Broadcasts weights from trainer rank 0 to every rank of every engine.

open   rank 0 opens the group; one HTTP call per engine, each in a thread, makes the engines join it
send   per bucket: announce names, dtypes and shapes, then broadcast the tensors
"""

import logging
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor

from nanoslime.process_groups import join_group, listen
from nanoslime.weight_sync.engine_calls import EngineCalls, EnginesFailed
from nanoslime.weight_sync.transport import EngineSide, RankSide

logger = logging.getLogger(__name__)


class BroadcastSender:
    """A `Sender`. Rank 0 talks to the engines; the other ranks send it their shards."""

    def __init__(self, rank: RankSide, engines: EngineSide):
        self._assembler = rank.assembler
        self._deadline_s = rank.deadline_s
        self._is_first = rank.rank == 0
        if self._is_first:
            self._calls = EngineCalls(engines.engines)
            self._name = engines.group
            backend = "nccl" if rank.device.type == "cuda" else "gloo"
            self._group = self._open_group(engines.address, backend)

    def send(self, version: int) -> int:
        num_bytes = 0
        failed: EnginesFailed | None = None
        shards = self._assembler.shards()
        for bucket in self._assembler.plan.buckets:
            tensors = list(self._assembler.assemble(bucket, shards))
            if not self._is_first or failed:
                continue
            try:
                self._broadcast(tensors, version)
            except EnginesFailed as e:
                failed = e
            num_bytes += sum(tensor.nbytes for _, tensor in tensors)
        if failed:
            raise failed
        return num_bytes

    def close(self) -> None:
        """Leaves the group; the driver has the engines do so."""
        if self._is_first:
            self._calls.close()
            dist.destroy_process_group(self._group)

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
                group=self._name,
                backend=backend,
            )
            for engine, offset in zip(self._calls.engines, offsets, strict=True)
        ]
        try:
            group = join_group(
                store,
                rank=0,
                world_size=world_size,
                name=self._name,
                backend=backend,
                timeout_s=self._deadline_s,
            )
        except RuntimeError as e:
            failures = self._calls.failures_of(joins)
            causes = [failure.cause for failure in failures.values()]
            raise EnginesFailed(
                f"trainer rank 0: no weight group at {address}:{store.port} within "
                f"{self._deadline_s:.0f}s: {'; '.join(causes) or e}",
                failures,
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
            group=self._name,
        )
        works = [
            dist.broadcast(tensor, src=0, group=self._group, async_op=True) for _, tensor in tensors
        ]
        self._calls.collect(announced, f"receive weights of version {version}", self._deadline_s)
        try:
            for work in works:
                work.wait()
        except RuntimeError as e:  # of gloo and NCCL, which do not say who is gone
            raise EnginesFailed(f"the broadcast of version {version} broke: {e}", {}) from e
