"""One trainer rank as the rest of the program sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nanoslime.batch import MicroBatch, StepMetrics, TrainBatch, WeightShard


@dataclass(frozen=True, slots=True)
class RankEnv:
    """Who this rank is. `init_method` is tcp://ADDRESS:PORT of rank 0, or env:// under torchrun."""

    rank: int
    world_size: int
    local_rank: int
    device: Literal["cpu", "cuda"]
    init_method: str

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if self.device == "cuda" else torch.device("cpu")


class Algorithm(Protocol):
    """See nanoslime/algorithms: maths on tensors, no I/O, no process groups."""

    denominator: Literal["tokens", "sequences"]
    needs_old_logprobs: bool
    needs_reference: bool

    def token_advantages(self, shard: TrainBatch, all_sum: Callable[[Tensor], Tensor]) -> list[Tensor]: ...
    def loss(self, logprobs: Tensor, entropy: Tensor | None, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]: ...


class TrainBackend(Protocol):
    """One rank's view; all ranks make the same calls, each with its data-parallel shard."""

    dp_rank: int
    dp_size: int
    is_last_stage: bool  # of the pipeline: logprobs exist here

    def logprobs(self, shard: TrainBatch, weights: Literal["policy", "ref"]) -> list[Tensor] | None:
        """[T_i] float32 per sequence on the last pipeline stage, in the order of `shard.token_ids`; None elsewhere."""
        ...

    def train_step(self, shard: TrainBatch, algorithm: Algorithm) -> StepMetrics:
        """Forward, backward and optimizer step over the shard's micro-batches; the same result on every rank."""
        ...

    def all_sum(self, value: Tensor) -> Tensor:
        """Sum over the data-parallel ranks, in a new tensor."""
        ...

    def weight_shards(self) -> Iterator[WeightShard]:
        """This rank's pieces of the Hugging Face tensors, in the same order at every call; no collective.

        Over all ranks each element of each tensor comes at least once; replicas (DP, norms under TP) may repeat it.
        """
        ...

    def save(self, path: Path) -> None:
        """Writes weights, optimizer, RNG and schedule into the existing empty directory `path`; collective."""
        ...

    def load(self, path: Path) -> None: ...


def init_process_group(env: RankEnv, deadline_s: float) -> None:
    """Joins the trainers' default process group, unless this process is in it: NCCL and gloo with CUDA, gloo without."""
    if dist.is_initialized():
        return
    if env.device == "cuda":
        torch.cuda.set_device(env.local_rank)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if env.device == "cuda" else "gloo",
        init_method=env.init_method,
        rank=env.rank,
        world_size=env.world_size,
        timeout=timedelta(seconds=deadline_s),
    )
