"""The group of trainer ranks and the rollout as the training loop sees them, whatever processes they live
in.
"""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from nanoslime.batch import StepMetrics, TrainBatch
from nanoslime.config import RunConfig
from nanoslime.run_dir import RunDir
from nanoslime.training.batching import plan
from nanoslime.types import SampleGroup


class Rollout(Protocol):
    metrics: dict[str, float]

    def generate(self, step: int) -> list[SampleGroup]: ...
    def evaluate(self, step: int) -> float | None: ...
    def update_weights(self, send: Callable[[], object], version: int) -> None: ...
    def load_from_disk(self, path: Path, version: int) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class TrainGroup(ABC):
    """All trainer ranks. Every call returns when all of them are done, or raises RunError naming the one
    that is not.
    """

    dp_size: int

    def __init__(self, config: RunConfig, run: RunDir, transport: str):
        self.config, self.run, self.transport = config, run, transport

    @abstractmethod
    def train(self, groups: list[SampleGroup]) -> dict[str, float]:
        """The optimizer steps of one rollout; metrics of the row, empty where every group was dropped."""

    @abstractmethod
    def broadcast(self, version: int) -> None: ...

    @abstractmethod
    def export_hf(self, path: Path) -> None: ...

    @abstractmethod
    def save(self, path: Path) -> None: ...

    @abstractmethod
    def load(self, path: Path) -> None: ...

    @abstractmethod
    def agree(self, stop: str | None) -> str | None:
        """Rank 0's word on every rank that runs the loop."""

    @abstractmethod
    def close(self) -> None: ...

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

    def plan(self, groups: list[SampleGroup]) -> list[list[TrainBatch]]:
        """[optimizer step][dp rank] shards of a rollout's groups; empty where every group was dropped."""
        return plan(
            groups,
            num_steps=self.config.training.num_steps_per_rollout,
            dp_size=self.dp_size,
            max_tokens=self.config.training.max_tokens_per_microbatch,
            denominator=self.config.algorithm.denominator,
            temperature=self.config.rollout.temperature,
        )


def resolve_transport(config: RunConfig, *, same_process: bool) -> str:
    """weight_sync.transport with "auto" decided; `same_process`: one trainer rank beside the embedded
    engine.
    """
    transport, engine = config.weight_sync.transport, config.rollout.engine
    if transport == "auto":
        return "broadcast" if engine == "sglang" else "in_process" if same_process else "disk"
    if transport == "broadcast" and engine == "embedded":
        raise ValueError("weight_sync.transport=broadcast needs rollout.engine=sglang; choose disk or auto")
    if transport == "in_process" and not (engine == "embedded" and same_process):
        raise ValueError(
            "weight_sync.transport=in_process needs the embedded engine in the trainer's own "
            "process; choose disk or auto"
        )
    return transport


def metrics_row(steps: list[StepMetrics], seconds: dict[str, float]) -> dict[str, float]:
    """One row from the optimizer steps of a rollout: means, maxima for names that end in _max, and the
    phases' seconds.
    """
    row = {f"time/{phase}_s": s for phase, s in seconds.items()}
    rows = [
        {
            "train/loss": s.loss,
            "train/grad_norm": s.grad_norm,
            "train/lr": s.lr,
            "train/skipped": float(s.skipped),
            **s.values,
        }
        for s in steps
    ]
    for name in dict.fromkeys(name for r in rows for name in r):
        values = [r[name] for r in rows if name in r]
        row[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    return row
