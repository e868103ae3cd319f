"""The trainer ranks as the training loop sees them, whatever processes they live in."""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nanoslime.batch import BatchPlan
from nanoslime.config import RunConfig
from nanoslime.config.deadlines import Deadline, derive_deadlines
from nanoslime.models.shape import ModelShape
from nanoslime.orchestration.worker import TrainWorker
from nanoslime.run_dir import RunDir
from nanoslime.training.backend import RankEnv
from nanoslime.training.batching import BatchingOptions, plan_train_batches
from nanoslime.types import GroupReport
from nanoslime.weight_sync.devices import SeparateDevices, SharedDevices
from nanoslime.weight_sync.engine_pool import EnginePool

logger = logging.getLogger(__name__)


class TrainGroup(ABC):
    """All trainer ranks. A call returns when every rank has finished it; RunError names
    the rank that fails, dies or is late.

    What needs the trainer's memory takes shared devices from the engines first.
    """

    dp_size: int
    address = "127.0.0.1"  # of rank 0
    gpu_ids: Sequence[int | str] = ()  # by rank; none on a CPU

    def __init__(self, config: RunConfig, run: RunDir, model_dir: Path, num_ranks: int = 1):
        self.config = config
        self.run = run
        self.model_dir = model_dir
        self.devices: SeparateDevices | SharedDevices = SeparateDevices()
        shape = ModelShape.read(model_dir)
        self._parity_tokens = shape.attention_parity_tokens
        self._deadlines = derive_deadlines(config, shape.num_parameters, num_ranks)

    @abstractmethod
    def _train(self, shards: list[list[BatchPlan]]) -> dict[str, float]:
        """Calls TrainWorker.train_plans on every rank; returns the metrics of rank 0.

        `shards` holds the plans of each data-parallel rank, which gets no others.
        """

    @abstractmethod
    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> Any:
        """Calls a collective method of TrainWorker on every rank.

        Returns the results by rank, nothing where there are no ranks.

        `what` says in errors what the ranks were asked to do. `deadline_s` is that of
        weight sync; other calls have the one of a save.
        """

    @abstractmethod
    def close(self) -> None: ...

    def _deadline(self, weight_sync_s: float | None) -> Deadline:
        """The deadline of a `call`."""
        if weight_sync_s is None:
            return self._deadlines.save
        return Deadline(weight_sync_s, "weight_sync.deadline_s")

    def wait_for_places(self) -> None:  # noqa: B027
        """Waits until each rank has its process and its devices."""

    def setup(self) -> None:  # noqa: B027
        """Builds what construction has only reserved, if anything."""

    def share_devices(self, engines: EnginePool) -> None:
        """Lets the trainer and these engines take turns; the trainer has the first."""
        self.devices = SharedDevices(self, engines)

    def train(self, groups: list[GroupReport], version: int) -> dict[str, float]:
        """Makes the optimizer steps of one rollout; returns the metrics of its row.

        They are few where every group was dropped. `version` is that of the weights before
        them. Only numbers are planned with here: each rank fetches the arrays of its samples.
        """
        begin = time.monotonic()
        training = self.config.training
        options = BatchingOptions(
            num_steps=training.num_steps_per_rollout,
            dp_size=self.dp_size,
            max_tokens=training.max_tokens_per_microbatch * training.cp_size,
            microbatch_multiple=training.pp_size if training.vpp_size > 1 else 1,
            denominator=self.config.algorithm.denominator,
            temperature=self.config.rollout.temperature,
            fixed_length=self.config.rollout.max_new_tokens,
            parity_tokens=self._parity_tokens,
            oldest_version_in_loss=version if self.config.rollout.mask_stale_tokens else None,
            mask_truncated=self.config.algorithm.truncated == "mask",
        )
        steps = plan_train_batches(groups, options)
        shards = [[step[dp_rank] for step in steps] for dp_rank in range(self.dp_size)]
        metrics = {"time/plan_s": time.monotonic() - begin}
        num_samples = sum(len(group.samples) for group in groups)
        num_masked = num_samples - sum(step[0].num_sequences for step in steps)
        metrics["rollout/dropped_sample_masked"] = float(num_masked)
        if groups and not steps:
            logger.warning(
                "none of %d samples is left to train on: rollout.mask_stale_tokens or "
                "algorithm.truncated=mask leaves out all of their tokens",
                num_samples,
            )
        metrics |= self.devices.give_to_trainer()
        return metrics | self._train(shards)

    def export_hf(self, path: Path) -> None:
        self.devices.give_to_trainer()
        self.call("write_hf", path, what=f"write {path}")

    def save(self, path: Path) -> dict[str, str]:
        """Saves into the existing empty directory `path`; returns hashes by relative path."""
        self.devices.give_to_trainer()
        hashes: dict[str, str] = {}
        for of_rank in self.call("save", path, what=f"save {path}") or ():
            hashes |= of_rank
        return hashes

    def load(self, path: Path) -> None:
        self.call("load", path, what=f"load {path}")


class LocalTrainGroup(TrainGroup):
    """The only trainer rank, in the driver's own process."""

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


class NoTrainer(TrainGroup):
    """Rollout only: the engines keep the checkpoint's weights, which are version 0."""

    def train(self, groups: list[GroupReport], version: int) -> dict[str, float]:
        return {}

    def _train(self, shards: list[list[BatchPlan]]) -> dict[str, float]:
        return {}

    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> None: ...

    def close(self) -> None: ...
