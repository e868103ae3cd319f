"""Trainer ranks without Ray: this process alone, or this process as one of torchrun's ranks.

Under torchrun every rank runs the same loop. Rank 0 owns engines, prompts and rewards and broadcasts each
batch; the others receive it and take part in the collectives of weight sync and checkpoints.
"""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from nanoslime.batch import TrainBatch
from nanoslime.orchestration.groups import TrainGroup
from nanoslime.orchestration.worker import TrainWorker
from nanoslime.run_dir import RunDir


class LocalTrainGroup(TrainGroup):
    """`engines`: those of this process; with the transport in_process, one that is embedded."""

    def __init__(
        self, run: RunDir, model_dir: Path, transport: str, worker: TrainWorker, engines: list[Any]
    ):
        super().__init__(worker.config, run, model_dir, transport)
        self._worker, self._engines, self.dp_size = worker, engines, worker.dp_size

    def _train(self, shards: list[list[TrainBatch]]) -> dict[str, float]:
        return self._worker.train(shards[self._worker.dp_rank])

    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> None:
        getattr(self._worker, method)(*args)
        dist.barrier()

    def broadcast(self, version: int) -> None:
        if self.transport != "in_process":
            return super().broadcast(version)
        self._engines[0].load_weights(self._worker.tensors(), version)

    def close(self) -> None:
        self._worker.close()
