"""Hands weights to engines on the trainers' own devices. NCCL refuses two ranks on one
GPU, so an engine gets handles of tensors instead.

    rank 0            assembles a bucket of whole tensors and broadcasts it to all trainer ranks
    each rank         serializes its copy for the engine's rank on its GPU: an IPC handle, or the
                      bytes on a CPU
    an engine's first rank gathers that engine's payloads and posts them
"""

import io
import pickle
from datetime import timedelta
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

from nanoslime.batch import WeightShard
from nanoslime.types import BroadcastEngine, RunError
from nanoslime.weight_sync.engine_calls import EnginesFailed, Failure
from nanoslime.weight_sync.plan import Bucket
from nanoslime.weight_sync.transport import EngineSide, RankSide


class TensorSender:
    """A `Sender`. A rank serves the engine that has part of its device, if any."""

    def __init__(self, rank: RankSide, engines: EngineSide):
        self._assembler = rank.assembler
        self._device = rank.device
        # Set on the first of the ranks on an engine's devices, which posts all their
        # payloads.
        self._engine: BroadcastEngine | None = None
        self._engine_ranks: list[int] = []
        self._group: dist.ProcessGroup | None = None
        timeout = timedelta(seconds=rank.deadline_s)
        for engine, of_engine in zip(engines.engines, engines.ranks_by_engine, strict=True):
            ranks = list(of_engine)
            group = dist.new_group(ranks, timeout, backend="gloo")
            if rank.rank in ranks:
                self._engine_ranks = ranks
                self._group = group
                if rank.rank == ranks[0]:
                    self._engine = engine
        if rank.device.type == "cuda":
            # As in SGLang: handles name a GPU by its UUID.
            monkey_patch_torch_reductions()

    def send(self, version: int) -> int:
        """Every rank sends one copy and returns the bytes of it."""
        num_bytes = 0
        failed: RunError | None = None
        shards = self._assembler.shards()
        for bucket in self._assembler.plan.buckets:
            filled = self._fill(bucket, shards)
            dist.broadcast(filled.flattened_tensor, src=0)
            if self._group is not None:
                payloads = self._gather(filled)
                try:
                    if self._engine is not None and not failed:
                        self._engine.receive_payloads(payloads)
                except RunError as e:
                    failed = e
                # A handle is valid as long as its tensor.
                dist.barrier(self._group)
            num_bytes += filled.flattened_tensor.numel()
        if failed and self._engine is not None:
            raise EnginesFailed.of({self._engine.name: Failure.of(failed)})
        return num_bytes

    def close(self) -> None: ...

    def _fill(self, bucket: Bucket, shards: list[WeightShard]) -> FlattenedTensorBucket:
        """Makes one flat tensor for the bucket; only rank 0 puts the weights in."""
        flat = FlattenedTensorBucket.empty(
            [tensor.name for tensor in bucket],
            [tensor.dtype for tensor in bucket],
            [torch.Size(tensor.shape) for tensor in bucket],
            self._device,
        )
        places = dict(flat.reconstruct_tensors())
        for name, tensor in self._assembler.assemble(bucket, shards):
            places[name].copy_(tensor)
        return flat

    def _gather(self, bucket: FlattenedTensorBucket) -> list[bytes]:
        """The bucket for each rank of the engine, on the rank that posts it."""
        content = {"flattened_tensor": bucket.flattened_tensor, "metadata": bucket.metadata}
        if self._device.type == "cuda":
            payload = MultiprocessingSerializer.serialize(content)
        else:
            payload = serialize_on_cpu(content)
        payloads: list[Any] | None = None
        if self._engine is not None:
            payloads = [None] * len(self._engine_ranks)
        dist.gather_object(payload, payloads, dst=self._engine_ranks[0], group=self._group)
        return payloads or []


class _TensorPickler(pickle._Pickler):
    """Calls the function that loads a tensor's bytes by the name that it has in torch.

    megatron-core 0.19 puts a function of its own in its place, as soon as it is imported, and
    SGLang refuses a pickle that names that one.
    """

    def save_function(self, function: FunctionType) -> None:
        if function is torch.storage._load_from_bytes:
            self.write(pickle.GLOBAL + b"torch.storage\n_load_from_bytes\n")
            self.memoize(function)
        else:
            self.save_global(function)

    dispatch = pickle._Pickler.dispatch | {FunctionType: save_function}


def serialize_on_cpu(content: dict[str, Any]) -> bytes:
    """Pickles tensors of the CPU by value, as SGLang takes them whatever has been imported here."""
    buffer = io.BytesIO()
    _TensorPickler(buffer).dump(content)
    return buffer.getvalue()
