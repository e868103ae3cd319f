"""The group of trainer ranks as the training loop sees it, whatever processes they live in."""

import shutil
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from nanoslime.batch import TrainBatch
from nanoslime.config import RunConfig
from nanoslime.models.shape import ModelShape
from nanoslime.orchestration.rollout_manager import Rollout, from_rank_0
from nanoslime.run_dir import RunDir
from nanoslime.training.batching import plan
from nanoslime.types import SampleGroup


class TrainGroup(ABC):
    """All trainer ranks. A call returns when all are done, or raises RunError naming who is not."""

    dp_size: int

    def __init__(self, config: RunConfig, run: RunDir, model_dir: Path, transport: str):
        self.config, self.run, self.transport = config, run, transport
        self._parity_tokens = ModelShape.read(model_dir).attention_parity_tokens

    @abstractmethod
    def _train(self, shards: list[list[TrainBatch]]) -> dict[str, float]:
        """TrainWorker.train on every rank, with its data-parallel rank's shards; rank 0's metrics."""

    @abstractmethod
    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> None:
        """A collective method of TrainWorker on every rank; `what` says in errors what it was asked to do."""

    @abstractmethod
    def close(self) -> None: ...

    def train(self, groups: list[SampleGroup]) -> dict[str, float]:
        """The optimizer steps of one rollout; metrics of the row, empty where every group was dropped."""
        training = self.config.training
        steps = plan(
            groups, num_steps=training.num_steps_per_rollout, dp_size=self.dp_size,
            max_tokens=training.max_tokens_per_microbatch * training.cp_size,
            microbatch_multiple=training.pp_size if training.vpp_size > 1 else 1,
            denominator=self.config.algorithm.denominator, temperature=self.config.rollout.temperature,
            fixed_length=self.config.rollout.max_new_tokens, parity_tokens=self._parity_tokens,
        )  # fmt: skip
        return self._train([[step[dp] for step in steps] for dp in range(self.dp_size)])

    def connect(self, engines: list[Any], address: str) -> None:
        """The weight group of rank 0, at `address`, with the engines, where the transport has one."""
        if self.transport == "broadcast":
            self.call("connect", engines, address, what="join the weight group")

    def broadcast(self, version: int) -> None:
        deadline_s = self.config.weight_sync.deadline_s
        self.call("broadcast", version, what=f"send the weights of version {version}", deadline_s=deadline_s)

    def export_hf(self, path: Path) -> None:
        self.call("write_hf", path, what=f"write {path}")

    def save(self, path: Path) -> None:
        self.call("save", path, what=f"save {path}")

    def load(self, path: Path) -> None:
        self.call("load", path, what=f"load {path}")

    def agree(self, value: Any) -> Any:
        """Rank 0's word on every rank that runs the loop."""
        return from_rank_0(value)

    def sync_weights(self, rollout: Rollout, version: int) -> float:
        """The current weights into every engine, labelled `version`; returns the seconds it took."""
        start = time.monotonic()
        if self.transport == "disk":
            path = self.run.weights / f"version_{version}"
            self.export_hf(path)
            rollout.update_weights(lambda: rollout.load_from_disk(path, version), version)
            shutil.rmtree(path, ignore_errors=True)
        else:
            rollout.update_weights(lambda: self.broadcast(version), version)
        return time.monotonic() - start


def resolve_transport(config: RunConfig, *, same_process: bool) -> str:
    """weight_sync.transport with "auto" decided; `same_process`: one trainer rank beside its engine."""
    transport, engine = config.weight_sync.transport, config.rollout.engine
    if transport == "auto":
        return "broadcast" if engine == "sglang" else "in_process" if same_process else "disk"
    if transport == "broadcast" and engine == "embedded":
        raise ValueError("weight_sync.transport=broadcast needs rollout.engine=sglang; choose disk or auto")
    if transport == "in_process" and not (engine == "embedded" and same_process):
        where = "the embedded engine in the trainer's own process"
        raise ValueError(f"weight_sync.transport=in_process needs {where}; choose disk or auto")
    return transport
