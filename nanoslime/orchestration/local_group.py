"""Trainer ranks without Ray: this process alone, or this process as one of torchrun's ranks.

Under torchrun every rank runs the same loop. Rank 0 owns engines, prompts and rewards and broadcasts each
batch; on the other ranks the rollout is a follower that receives it and takes part in the collectives of
weight sync and checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from nanoslime.config import RunConfig
from nanoslime.orchestration.groups import TrainGroup, metrics_row
from nanoslime.orchestration.rollout_manager import from_rank_0
from nanoslime.orchestration.worker import TrainWorker
from nanoslime.rollout.embedded import EmbeddedEngine
from nanoslime.run_dir import RunDir
from nanoslime.types import SampleGroup


class LocalTrainGroup(TrainGroup):
    """`engine`: the one in this process, for the transport in_process."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        worker: TrainWorker,
        transport: str,
        engine: EmbeddedEngine | None = None,
    ):
        super().__init__(config, run, transport)
        self._worker, self._engine = worker, engine
        self.dp_size = worker.dp_size

    def train(self, groups: list[SampleGroup]) -> dict[str, float]:
        batches = self.plan(groups)
        steps = self._worker.train([shards[self._worker.dp_rank] for shards in batches])
        return metrics_row(steps, self._worker.seconds) if steps else {}

    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> None:
        getattr(self._worker, method)(*args)
        dist.barrier()

    def broadcast(self, version: int) -> None:
        if self.transport != "in_process":
            return super().broadcast(version)
        assert self._engine is not None
        self._engine.load_weights(self._worker.tensors(), version)

    def agree(self, stop: str | None) -> str | None:
        return from_rank_0(stop)

    def close(self) -> None:
        self._worker.close()
