"""Weights into running engines through a process group: trainer rank 0 sends, every engine rank receives.

    connect  rank 0 opens the group; one HTTP call per engine, each in a thread, makes the engines join it
    send     begin -> per bucket: announce names, dtypes, shapes; broadcast the tensors -> end, with version

The caller pauses the engines around `send`; an engine where it failed keeps its old version label.
"""

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import torch.distributed as dist
from torch import Tensor

from nanoslime.process_groups import join_group, listen
from nanoslime.types import BroadcastEngine, RunError

logger = logging.getLogger(__name__)


def buckets(
    tensors: Iterable[tuple[str, Tensor]], limit_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Consecutive tensors of at most `limit_bytes` together; a larger one goes alone."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > limit_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


class Broadcaster:
    """Lives on trainer rank 0. `address` is that rank's own, reachable from the engines."""

    GROUP = "nanoslime-weights"

    def __init__(
        self,
        engines: list[BroadcastEngine],
        *,
        address: str,
        device: str,
        bucket_bytes: int,
        deadline_s: float,
    ):
        self._engines, self._bucket_bytes, self._deadline_s = engines, bucket_bytes, deadline_s
        self._threads = ThreadPoolExecutor(
            max_workers=max(1, len(engines)), thread_name_prefix="weight-sync"
        )
        *offsets, world_size = accumulate((e.world_size for e in engines), initial=1)
        store, backend = listen(address, deadline_s), "nccl" if device == "cuda" else "gloo"
        meet: dict[str, Any] = {"address": address, "port": store.port, "group": self.GROUP}
        ranks: dict[str, Any] = {"world_size": world_size, "backend": backend}
        joins = [
            self._threads.submit(e.init_weight_group, rank_offset=offset, **meet, **ranks)
            for e, offset in zip(engines, offsets, strict=True)
        ]
        try:
            self._group = join_group(store, rank=0, name=self.GROUP, timeout_s=deadline_s, **ranks)
        except RuntimeError as e:
            failed = [str(j.exception()) for j in joins if j.done() and j.exception()]
            where = f"trainer rank 0: no weight group at {address}:{store.port} within {deadline_s:.0f}s"
            raise RunError(f"{where}: {'; '.join(failed) or e}") from e
        self._collect(joins, "join the weight group")
        logger.info(
            "weight group of %d ranks at %s:%d over %s", world_size, address, store.port, backend
        )

    def send(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> int:
        """Sends all, labels the engines with `version`; returns the bytes. RunError names an engine."""
        sent = 0
        self._each("begin_update")
        for bucket in buckets(tensors, self._bucket_bytes):
            content: dict[str, Any] = {
                "names": [name for name, _ in bucket],
                "shapes": [list(t.shape) for _, t in bucket],
                "dtypes": [str(t.dtype).removeprefix("torch.") for _, t in bucket],
                "group": self.GROUP,
            }
            announced = [self._threads.submit(e.receive_bucket, **content) for e in self._engines]
            works = [dist.broadcast(t, src=0, group=self._group, async_op=True) for _, t in bucket]
            self._collect(announced, f"receive weights of version {version}", works)
            sent += sum(t.nbytes for _, t in bucket)
        self._each("end_update", version)
        return sent

    def close(self) -> None:
        self._each("destroy_weight_group", self.GROUP)
        self._threads.shutdown()

    def _each(self, method: str, *args: Any) -> None:
        calls = [self._threads.submit(getattr(e, method), *args) for e in self._engines]
        self._collect(calls, method.replace("_", " "))

    def _collect(self, futures: list[Future], what: str, works: Iterable[dist.Work] = ()) -> None:
        """Takes every result, naming the first engine that failed; then waits for the broadcasts."""
        for engine, future in zip(self._engines, futures, strict=True):
            try:
                future.result(timeout=self._deadline_s)
            except TimeoutError as e:
                raise RunError(
                    f"engine {engine.name} did not {what} within {self._deadline_s:.0f}s"
                ) from e
        for work in works:
            work.wait()
