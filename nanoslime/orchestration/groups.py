"""The group of trainer ranks as the training loop sees it, whatever processes they live in."""

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanoslime.batch import TrainBatch
from nanoslime.config import RunConfig
from nanoslime.engine_kind import engine_kind
from nanoslime.models.shape import ModelShape
from nanoslime.orchestration.rollout_manager import Replay, RolloutManager
from nanoslime.run_dir import RunDir
from nanoslime.training.batching import BatchingOptions, make_train_batches
from nanoslime.types import SampleGroup


class TrainGroup(ABC):
    """All trainer ranks. A call returns when all are done, or raises RunError naming who is not."""

    dp_size: int
    address = "127.0.0.1"  # of rank 0
    gpu_ids: Sequence[int] = ()  # by rank; none on a CPU

    def __init__(self, config: RunConfig, run: RunDir, model_dir: Path, transport: str):
        self.config, self.run, self.transport = config, run, transport
        self._engines_turn: RolloutManager | Replay | None = (
            None  # whose engines have the device, the trainer asleep
        )
        self._version = 0  # of the weights that the engines have
        self._parity_tokens = ModelShape.read(model_dir).attention_parity_tokens

    @abstractmethod
    def _train(self, shards: list[list[TrainBatch]]) -> dict[str, float]:
        """TrainWorker.train on every rank, with its data-parallel rank's shards; rank 0's metrics."""

    @abstractmethod
    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> None:
        """A collective method of TrainWorker on every rank; `what` says in errors what it was asked to do."""

    @abstractmethod
    def close(self) -> None: ...

    def setup(self) -> None:  # noqa: B027
        """Builds what construction has only reserved, if anything."""

    def train(self, groups: list[SampleGroup]) -> dict[str, float]:
        """The optimizer steps of one rollout; metrics of the row, few where every group was dropped."""
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
        )
        steps = make_train_batches(groups, options)
        return self._wake() | self._train(
            [[step[dp] for step in steps] for dp in range(self.dp_size)]
        )

    def connect(self, engines: list[Any], address: str, ranks_by_engine: list[list[int]]) -> None:
        """The way of weights to the engines: a group of rank 0 at `address` with them, or with `tensor` from
        the trainer ranks on each engine's devices."""
        if self.transport in ("broadcast", "tensor"):
            shared = ranks_by_engine if self.transport == "tensor" else None
            self.call("connect", engines, address, shared, what="open the way of weights")

    def broadcast(self, version: int) -> None:
        deadline_s = self.config.weight_sync.deadline_s
        self.call(
            "broadcast",
            version,
            what=f"send the weights of version {version}",
            deadline_s=deadline_s,
        )

    def export_hf(self, path: Path) -> None:
        with self._awake():
            self.call("write_hf", path, what=f"write {path}")

    def save(self, path: Path) -> None:
        with self._awake():
            self.call("save", path, what=f"save {path}")

    def load(self, path: Path) -> None:
        self.call("load", path, what=f"load {path}")

    def sync_weights(self, rollout: RolloutManager | Replay, version: int) -> dict[str, float]:
        """The current weights into every engine, labelled `version`; returns the seconds that it took.

        Colocated, the engines have the device afterwards, and the trainer sleeps until it is needed.
        """
        start, self._version, times = time.monotonic(), version, dict[str, float]()
        path = self.run.weights / f"version_{version}"
        if self.transport == "disk":
            self.export_hf(path)

        def send() -> None:
            if self.config.cluster.colocate:
                rollout.each("resume_memory", "weights")
            if self.transport == "disk":
                rollout.each("update_weights_from_disk", str(path), version)
            elif self.transport != "none":
                self.broadcast(version)
            if self.config.cluster.colocate:
                times["time/sleep_s"] = self._timed("sleep")
                rollout.each("resume_memory", "cache")
                self._engines_turn = rollout

        rollout.update_weights(send, version)
        shutil.rmtree(path, ignore_errors=True)
        return {"time/weight_sync_s": time.monotonic() - start, **times}

    def _wake(self) -> dict[str, float]:
        """Takes the device where the engines have it; they lose their weights."""
        if self._engines_turn is None:
            return {}
        self._engines_turn.each("release_memory")
        self._engines_turn = None
        return {"time/wake_s": self._timed("wake")}

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Has the device inside; afterwards engines that had it have it again, with their weights."""
        rollout = self._engines_turn
        self._wake()
        yield
        if rollout is not None:
            self.sync_weights(rollout, self._version)

    def _timed(self, method: str) -> float:
        start = time.monotonic()
        self.call(method, what=method)
        return time.monotonic() - start


class NoTrainer(TrainGroup):
    """Rollout only: the engines keep the checkpoint's weights, which are version 0."""

    def train(self, groups: list[SampleGroup]) -> dict[str, float]:
        return {}

    def _train(self, shards: list[list[TrainBatch]]) -> dict[str, float]:
        return {}

    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> None: ...

    def sync_weights(self, rollout: RolloutManager | Replay, version: int) -> dict[str, float]:
        return super().sync_weights(rollout, version=0)

    def close(self) -> None: ...


def resolve_transport(config: RunConfig, *, same_process: bool) -> str:
    """weight_sync.transport with "auto" decided; "none" where there is no engine or no trainer.

    `same_process`: the engine lives in the process of the only trainer rank. Raises ValueError for
    a transport that the engine cannot take, or not here.
    """
    if config.rollout.load_rollouts or config.rollout.rollout_only:
        return "none"
    kind = engine_kind(config.rollout)
    obstacles = _transport_obstacles(config, same_process)
    possible = [name for name in kind.transports if name not in obstacles]
    asked = config.weight_sync.transport
    if asked == "auto":
        return possible[0]
    choices = f"choose {', '.join(possible)} or auto"
    if asked not in kind.transports:
        raise ValueError(
            f"weight_sync.transport={asked}: rollout.engine={kind.name} cannot take weights that "
            f"way; {choices}"
        )
    if asked in obstacles:
        raise ValueError(f"weight_sync.transport={asked} {obstacles[asked]}; {choices}")
    return asked


def _transport_obstacles(config: RunConfig, same_process: bool) -> dict[str, str]:
    """Why a transport is impossible in this run, whatever the engine; the others have no entry."""
    obstacles = {}
    if not config.cluster.colocate:
        obstacles["tensor"] = "needs engines on the trainers' own GPUs (--colocate)"
    if config.cluster.colocate and config.cluster.device == "cuda":
        obstacles["broadcast"] = "cannot be used with --colocate: NCCL refuses two ranks on one GPU"
    if not same_process:
        obstacles["in_process"] = "needs the engine in the process of the only trainer rank"
    return obstacles
