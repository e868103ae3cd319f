"""Weights into engines that share the trainers' devices: NCCL refuses two ranks on one GPU, so by handle.

rank 0     assembles a bucket of whole tensors --broadcast over the trainer ranks--> every rank has it
each rank  serializes its copy for the engine rank on its GPU: an IPC handle, on a CPU the bytes
the first  rank of an engine gathers the engine's payloads and posts them to it
"""

import pickle
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

from nanoslime.types import BroadcastEngine
from nanoslime.weight_sync.assemble import Assembler
from nanoslime.weight_sync.broadcast import buckets


class TensorSender:
    """Lives on every trainer rank; `ranks_by_engine`: the trainer ranks on each engine's devices, in order.

    Construction and `send` are collective. Raises RunError as the engine does for what it refuses.
    """

    def __init__(
        self,
        assembler: Assembler,
        engines: list[BroadcastEngine],
        ranks_by_engine: list[list[int]],
        rank: int,
        device: torch.device,
        bucket_bytes: int,
        deadline_s: float,
    ):
        self._assembler, self._device, self._bucket_bytes = assembler, device, bucket_bytes
        self._engine: BroadcastEngine | None = None  # of which this is the first rank
        self._ranks: list[int] = []  # of the engine that has part of this rank's device
        self._group: dist.ProcessGroup | None = None
        for i, ranks in enumerate(ranks_by_engine):
            group = dist.new_group(ranks, timedelta(seconds=deadline_s), backend="gloo")
            if rank in ranks:
                self._ranks, self._group = ranks, group
                self._engine = engines[i] if rank == ranks[0] else None
        if device.type == "cuda":
            monkey_patch_torch_reductions()  # as in SGLang: handles name a GPU by its UUID

    def send(self, version: int) -> int:
        """The current weights to every engine, labelled `version`; returns the bytes of one copy."""
        sent, plan, dtype_of = 0, self._assembler.plan, self._assembler.dtype_of
        specs = [
            (t.name, torch.empty(t.shape, dtype=dtype_of(t.name), device="meta")) for t in plan
        ]
        if self._engine:
            self._engine.begin_update()
        for part in buckets(specs, self._bucket_bytes):
            names, of = [name for name, _ in part], [spec for _, spec in part]
            kinds, shapes = [spec.dtype for spec in of], [spec.shape for spec in of]
            bucket = FlattenedTensorBucket.empty(names, kinds, shapes, self._device)
            views = dict(bucket.reconstruct_tensors())
            for name, tensor in self._assembler.tensors(
                names
            ):  # on rank 0; the others send their pieces
                views[name].copy_(tensor)
            dist.broadcast(bucket.flattened_tensor, src=0)
            if self._group:
                self._post(
                    {"flattened_tensor": bucket.flattened_tensor, "metadata": bucket.metadata}
                )
            sent += bucket.flattened_tensor.numel()
        if self._engine:
            self._engine.end_update(version)
        return sent

    def _post(self, content: dict[str, Any]) -> None:
        dumps = MultiprocessingSerializer.serialize if self._device.type == "cuda" else pickle.dumps
        payloads = [b""] * len(self._ranks) if self._engine else None
        dist.gather_object(dumps(content), payloads, dst=self._ranks[0], group=self._group)
        if self._engine and payloads:
            self._engine.receive_payloads(payloads)
        dist.barrier(self._group)  # a handle is valid as long as its tensor
