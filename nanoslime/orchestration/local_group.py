"""The only trainer rank, in the driver's own process."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from nanoslime.batch import BatchPlan
from nanoslime.config import RunConfig
from nanoslime.orchestration.groups import TrainGroup
from nanoslime.orchestration.worker import TrainWorker
from nanoslime.run_dir import RunDir
from nanoslime.training.backend import RankEnv


class LocalTrainGroup(TrainGroup):
    def __init__(self, config: RunConfig, run: RunDir, model_dir: Path, env: RankEnv):
        super().__init__(config, run, model_dir)
        self._env = env
        self._worker: TrainWorker | None = None

    def setup(self) -> None:
        self._worker = TrainWorker(self.config, self.model_dir, self._env, self.run)
        self.dp_size = self._worker.dp_size

    def _train(self, shards: list[list[BatchPlan]]) -> dict[str, float]:
        return self._worker.train_plans(shards[0])

    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> Any:
        return [getattr(self._worker, method)(*args)]

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if dist.is_initialized():
            dist.destroy_process_group()
