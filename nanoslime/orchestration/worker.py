"""One trainer rank at work: the backend, the algorithm and this rank's part in weight sync."""

import time
from collections import defaultdict
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from nanoslime import algorithms
from nanoslime.batch import StepMetrics, TrainBatch
from nanoslime.config import RunConfig
from nanoslime.plugins import resolve
from nanoslime.training import BACKENDS
from nanoslime.training.backend import RankEnv, TrainBackend
from nanoslime.types import BroadcastEngine, RunError
from nanoslime.weight_sync.assemble import Assembler
from nanoslime.weight_sync.broadcast import Broadcaster
from nanoslime.weight_sync.disk import write_checkpoint


class TrainWorker:
    """Every method is collective: all ranks call it, in the same order."""

    def __init__(
        self, config: RunConfig, model_dir: Path, env: RankEnv, skipped_dir: Path | None = None
    ):
        if env.device == "cuda" and not torch.cuda.is_available():
            raise RunError(
                f"trainer rank {env.rank}: torch {torch.__version__} sees no CUDA on a node that has GPUs; "
                "make the environment with `bash env/run.sh --target cuda true` and name it in cluster.venv"
            )
        self.config, self.model_dir, self.env = config, model_dir, env
        backend = resolve(config.training.backend, BACKENDS, "training.backend")
        self.backend: TrainBackend = backend(config, model_dir, env)
        self.backend.skipped_dir = skipped_dir
        self.dp_rank, self.dp_size = self.backend.dp_rank, self.backend.dp_size
        self.algorithm = algorithms.make(config.algorithm, config.rollout.max_new_tokens)
        place: dict[str, Any] = dict(
            rank=env.rank, world_size=env.world_size, device=env.torch_device
        )
        dtype = getattr(torch, config.model.dtype)
        self._assembler = Assembler(self.backend.weight_shards, dtype=dtype, **place)
        self.tensors = (
            self._assembler.tensors
        )  # whole on rank 0; none on other ranks, which exhaust it too
        self.save, self.load = self.backend.save, self.backend.load
        self.sleep, self.wake = self.backend.sleep, self.backend.wake
        self._broadcaster: Broadcaster | None = None
        self._sender: Any = None  # a TensorSender

    def train(self, batches: list[TrainBatch]) -> dict[str, float]:
        """One optimizer step per batch; before the first, old and reference logprobs are taken of all, and
        token advantages, which may be whitened over the rollout.

        Returns the metrics of the rollout's row, none without batches.
        """
        if not batches:
            return {}
        begin = time.monotonic()
        for batch in batches:
            if self.algorithm.needs_old_logprobs:
                batch.old_logprobs = self.backend.logprobs(batch, "policy")
            if self.algorithm.needs_reference:
                batch.ref_logprobs = self.backend.logprobs(batch, "ref")
        if self.backend.is_last_stage:
            values = iter(self.algorithm.token_advantages(_joined(batches), self.backend.all_sum))
            for batch in batches:
                batch.token_advantages = list(islice(values, len(batch.token_ids)))
        middle = time.monotonic()
        steps = [self.backend.train_step(batch, self.algorithm) for batch in batches]
        times = {"time/logprobs_s": middle - begin, "time/train_s": time.monotonic() - middle}
        return times | metrics_row(steps)

    def connect(
        self,
        engines: list[BroadcastEngine],
        address: str,
        ranks_by_engine: list[list[int]] | None = None,
    ) -> None:
        """Rank 0 opens the weight group with the engines; or, where `ranks_by_engine` says which ranks are on
        each engine's devices, every rank a way to its own."""
        sync = self.config.weight_sync
        if ranks_by_engine is not None:
            sender = resolve(
                "nanoslime.weight_sync.colocated:TensorSender", {}, "weight_sync.transport"
            )
            own = (self.env.rank, self.env.torch_device, sync.bucket_bytes, sync.deadline_s)
            self._sender = sender(self._assembler, engines, ranks_by_engine, *own)
        elif self.env.rank == 0:
            limits: dict[str, Any] = {
                "bucket_bytes": sync.bucket_bytes,
                "deadline_s": sync.deadline_s,
            }
            self._broadcaster = Broadcaster(
                engines, address=address, device=self.env.device, **limits
            )

    def broadcast(self, version: int) -> int:
        """Sends the current weights to the engines as `version`; returns the bytes that this rank sent."""
        if self._sender is not None:
            return self._sender.send(version)
        if self.env.rank == 0:
            if self._broadcaster is None:
                raise RuntimeError("connect() comes before broadcast()")
            return self._broadcaster.send(self.tensors(), version)
        self._drain()
        return 0

    def write_hf(self, destination: Path) -> None:
        """The current weights as a Hugging Face checkpoint, with the original's tokenizer and config."""
        if self.env.rank == 0:
            write_checkpoint(
                self.tensors(), self._assembler.specs, destination, like=self.model_dir
            )
        else:
            self._drain()

    def close(self) -> None:
        if self._broadcaster is not None:
            self._broadcaster.close()
            self._broadcaster = None

    def _drain(self) -> None:
        for _ in self.tensors():
            raise RuntimeError("only rank 0 assembles tensors")


def _joined(batches: list[TrainBatch]) -> TrainBatch:
    """The sequences of all, with what token advantages need."""
    names = ("loss_mask", "advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs")
    parts = {name: [getattr(batch, name) for batch in batches] for name in names}
    return replace(
        batches[0], **{name: [*chain(*of)] for name, of in parts.items() if of[0] is not None}
    )


def metrics_row(steps: list[StepMetrics]) -> dict[str, float]:
    """One row from a rollout's optimizer steps: the means of their means, the maxima of their maxima."""
    means: dict[str, list[float]] = defaultdict(list)
    maxima: dict[str, list[float]] = defaultdict(list)
    for step in steps:
        means["train/loss"].append(step.loss)
        means["train/grad_norm"].append(step.grad_norm)
        means["train/lr"].append(step.lr)
        means["train/skipped"].append(float(step.skipped))
        for name, value in step.means.items():
            means[name].append(value)
        for name, value in step.maxima.items():
            maxima[name].append(value)
    row = {name: sum(values) / len(values) for name, values in means.items()}
    row |= {name: max(values) for name, values in maxima.items()}
    row["train/num_skipped"] = float(steps[-1].num_skipped)
    return row
