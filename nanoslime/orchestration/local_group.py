"""Trainer ranks without Ray: this process alone, or this process as one of torchrun's ranks.

Under torchrun every rank runs the same loop. Rank 0 owns engines, prompts and rewards and broadcasts each
batch; on the other ranks the rollout is a follower that receives it and takes part in the collectives of
weight sync and checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nanoslime.config import RunConfig
from nanoslime.orchestration.groups import TrainGroup, metrics_row
from nanoslime.orchestration.rollout_manager import RolloutManager
from nanoslime.orchestration.worker import TrainWorker
from nanoslime.rollout.embedded import EmbeddedEngine
from nanoslime.run_dir import RunDir
from nanoslime.types import BroadcastEngine, SampleGroup


def _from_rank_0(value: Any) -> Any:
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class LocalTrainGroup(TrainGroup):
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

    def connect(self, engines: list[BroadcastEngine], address: str) -> None:
        if self.transport == "broadcast":
            self._worker.connect(engines, address)

    def train(self, groups: list[SampleGroup]) -> dict[str, float]:
        batches = self.plan(groups)
        steps = self._worker.train([shards[self._worker.dp_rank] for shards in batches])
        return metrics_row(steps, self._worker.seconds) if steps else {}

    def broadcast(self, version: int) -> None:
        if self.transport == "in_process":
            assert self._engine is not None
            self._engine.load_weights(self._worker.tensors(), version)
        else:
            self._worker.broadcast(version)

    def export_hf(self, path: Path) -> None:
        self._worker.write_hf(path)
        self._barrier()

    def save(self, path: Path) -> None:
        self._worker.save(path)
        self._barrier()

    def load(self, path: Path) -> None:
        self._worker.load(path)

    def agree(self, stop: str | None) -> str | None:
        return _from_rank_0(stop)

    def close(self) -> None:
        self._worker.close()

    def _barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()


class SharedRollout:
    """The rollout on a rank that runs the loop: rank 0's manager, or (manager None) a follower of it."""

    def __init__(self, manager: RolloutManager | None):
        self._manager = manager
        self.metrics: dict[str, float] = {}

    def generate(self, step: int) -> list[SampleGroup]:
        groups = self._manager.generate(step) if self._manager else None
        self.metrics = self._manager.metrics if self._manager else {}
        return _from_rank_0(groups)

    def evaluate(self, step: int) -> float | None:
        return _from_rank_0(self._manager.evaluate(step) if self._manager else None)

    def update_weights(self, send: Callable[[], object], version: int) -> None:
        if self._manager:
            self._manager.update_weights(send, version)
        else:
            send()

    def load_from_disk(self, path: Path, version: int) -> None:
        if self._manager:
            self._manager.load_from_disk(path, version)
        _from_rank_0(None)  # nobody removes the files before they were read

    def state_dict(self) -> dict[str, Any]:
        return self._manager.state_dict() if self._manager else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._manager:
            self._manager.load_state_dict(state)

    def close(self) -> None:
        if self._manager:
            self._manager.close()
