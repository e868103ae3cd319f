"""Hands weights to engines on the trainers' own devices. NCCL refuses two ranks on one
GPU, so an engine gets handles of tensors instead.

    a bucket's sender  gathers it into a flat tensor, and broadcasts that to all trainer ranks
    each rank          makes a handle of its copy for the engine's rank on its device: CUDA's IPC
                       handle, or one of shared memory on a CPU (shared_bytes.py)
    an engine's first rank gathers that engine's payloads and posts them

The flat tensor is one and the same for all buckets, so that an engine maps one handle.
"""

import pickle
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

from nanoslime.sealed_bucket import Place, seal
from nanoslime.shared_bytes import Handle, SharedBytes
from nanoslime.types import BroadcastEngine, RunError
from nanoslime.weight_sync.engine_calls import EnginesFailed, Failure
from nanoslime.weight_sync.exchange import Exchange
from nanoslime.weight_sync.plan import FlatBucket, whole_on_first
from nanoslime.weight_sync.transport import EngineSide, RankSide, Sent


class TensorSender:
    """A `Sender`. A rank serves the engine that has part of its device, if any."""

    def __init__(self, rank: RankSide, engines: EngineSide):
        self._weights = rank.weights
        plan = rank.weights.plan(whole_on_first, rank.bucket_bytes)
        self._exchange = Exchange(plan, rank.weights.rank, rank.weights.device)
        self._buckets = [FlatBucket(bucket) for bucket in plan]
        self._senders = [bucket.first_rank for bucket in plan]
        # Set on the first of the ranks on an engine's devices, which posts all their
        # payloads.
        self._engine: BroadcastEngine | None = None
        self._engine_ranks: list[int] = []
        self._group: dist.ProcessGroup | None = None
        # A rank waits for the call of an engine, which has deadline_s itself.
        timeout = timedelta(seconds=2 * rank.deadline_s)
        for engine, of_engine in zip(engines.engines, engines.ranks_by_engine, strict=True):
            ranks = list(of_engine)
            group = dist.new_group(ranks, timeout, backend="gloo")
            if rank.weights.rank in ranks:
                self._engine_ranks = ranks
                self._group = group
                if rank.weights.rank == ranks[0]:
                    self._engine = engine
        if rank.weights.device.type == "cuda":
            # As in SGLang: handles name a GPU by its UUID.
            monkey_patch_torch_reductions()

    def prepare(self, version: int) -> None:
        """Does nothing: a device that is shared has no room for it yet."""

    def send(self, version: int, *, compares: bool = False) -> Sent:
        """Every rank sends one copy and says how many bytes that is."""
        num_bytes = 0
        failure: Failure | None = None
        shards = list(self._weights.shards())
        largest = max(bucket.nbytes for bucket in self._buckets)
        device = self._weights.device
        shared = None
        if device.type == "cpu":
            shared = SharedBytes(largest)
            reused = shared.tensor
        else:
            reused = torch.empty(largest, dtype=torch.uint8, device=device)
        for number, bucket in enumerate(self._buckets):
            flat = reused[: bucket.nbytes]
            sender = self._senders[number]
            is_sender = sender == self._weights.rank
            self._exchange.bring(number, shards, bucket.views(flat) if is_sender else [])
            if is_sender:
                seal(flat, Place(version, number, len(self._buckets), compares), bucket.parts)
            dist.broadcast(flat, src=sender)
            if self._group is not None:
                payloads = self._gather(bucket, shared.handle(bucket.nbytes) if shared else flat)
                try:
                    if self._engine is not None and not failure:
                        self._engine.receive_payloads(payloads)
                except RunError as e:
                    # The error itself would keep this call's memory.
                    failure = Failure.of(e)
                # The engine reads the flat tensor until then.
                dist.barrier(self._group)
            num_bytes += bucket.nbytes
        if device.type == "cuda":
            # Memory whose handle a process has given away is freed once this is asked.
            torch.cuda.ipc_collect()
        if failure and self._engine is not None:
            raise EnginesFailed.of({self._engine.name: failure})
        return Sent(num_bytes)

    def close(self) -> None: ...

    def _gather(self, bucket: FlatBucket, flat: torch.Tensor | Handle) -> list[bytes]:
        """The bucket for each rank of the engine, on the rank that posts it."""
        if self._weights.device.type == "cuda":
            torch.cuda.synchronize()  # the engine does not know of this process's streams
        payloads: list[Any] | None = None
        if self._engine is not None:
            payloads = [None] * len(self._engine_ranks)
        payload = payload_of(bucket, flat)
        dist.gather_object(payload, payloads, dst=self._engine_ranks[0], group=self._group)
        return payloads or []


def payload_of(bucket: FlatBucket, flat: torch.Tensor | Handle) -> bytes:
    """A handle of the bucket's bytes and what they are, in classes that SGLang unpickles."""
    metadata = FlattenedTensorBucket.empty(
        bucket.names, bucket.dtypes, bucket.shapes, torch.device("meta")
    ).metadata
    content = {"flattened_tensor": flat, "metadata": metadata}
    if isinstance(flat, torch.Tensor):
        return MultiprocessingSerializer.serialize(content)
    return pickle.dumps(content)
