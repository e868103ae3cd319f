"""One trainer rank as the rest of the program sees it, and what all backends do alike."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nanoslime.batch import Metric, MicroBatch, StepMetrics, TrainBatch, WeightShard
from nanoslime.config import RunConfig
from nanoslime.config.training import TrainingConfig
from nanoslime.training.metrics import ReducedMetrics
from nanoslime.training.schedule import lr_at
from nanoslime.training.skipping import Progress
from nanoslime.training.sleep import DeviceMemory
from nanoslime.types import RunError

MAX_KEPT = (
    16  # batches of skipped steps in a run: a run that skips all of them shall not fill the disk
)


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
        return (
            torch.device("cuda", self.local_rank) if self.device == "cuda" else torch.device("cpu")
        )


class Algorithm(Protocol):
    """See nanoslime/algorithms: maths on tensors, no I/O, no process groups."""

    denominator: Literal["tokens", "sequences", "fixed"]
    needs_old_logprobs: bool
    needs_reference: bool
    needs_entropy: bool  # as the second argument of `loss`

    def token_advantages(
        self, shard: TrainBatch, all_sum: Callable[[Tensor], Tensor]
    ) -> list[Tensor]: ...
    def loss(
        self, logprobs: Tensor, entropy: Tensor | None, batch: MicroBatch
    ) -> tuple[Tensor, dict[str, Metric]]: ...


class TrainBackend(ABC):
    """One rank's view; all ranks make the same calls, each with its data-parallel shard.

    Construction is collective: it joins the process group and loads the weights of a model's directory.
    For parity tests backends also have `grad_shards()`: as weight_shards, but the clipped float32 gradients
    of the last step, summed over data parallelism (under Megatron's distributed optimizer, its share only).
    """

    dp_rank: int
    dp_size: int
    is_last_stage: bool  # of the pipeline: logprobs exist here
    skipped_dir: Path | None = None
    """Where the batches of the first skipped steps are kept: step_<k>/rank_<r>.pt, for TrainBatch.load;
    with the weights of that time a step on them has the same gradient norm."""

    def __init__(self, config: RunConfig, env: RankEnv) -> None:
        self._config, self._training, self._device = config, config.training, env.torch_device
        self._reference, self._policy_aside = list[Tensor](), list[Tensor]()  # both on the host
        self._past, self._memory = Progress(), DeviceMemory(self._device)

    def logprobs(self, shard: TrainBatch, weights: Literal["policy", "ref"]) -> list[Tensor] | None:
        """[T_i] float32 per sequence of `shard.token_ids`, in order, on the CPU; on the last pipeline stage.

        None elsewhere. Under training.routing_replay=R2 the policy's choice of experts is put into `shard`;
        the reference makes its own in any case.
        Raises ValueError for "ref" where the algorithm was configured without one.
        """
        with torch.no_grad(), self._weights(weights):
            packs = self._packed_logprobs(shard, weights)
        if not self.is_last_stage:
            return None
        found: dict[int, Tensor] = {}
        for indices, pack in zip(shard.microbatches, packs, strict=True):
            parts = pack.cpu().split([len(shard.token_ids[i]) for i in indices])
            found.update(zip(indices, parts, strict=True))
        return [found[i] for i in range(len(shard.token_ids))]

    def train_step(self, shard: TrainBatch, algorithm: Algorithm) -> StepMetrics:
        """Forward, backward and optimizer step over the shard's micro-batches; the same result on every rank.

        The gradient is clipped to a global norm of clip_grad. A norm that is not finite, or that
        skip_grad_norm_above refuses, skips the update, but counts in the schedule of the learning rate.
        """
        total_steps = self._config.rollout.num_rollout * self._training.num_steps_per_rollout
        lr = lr_at(self._past.step, config=self._training, total_steps=total_steps)
        metrics = self._backward(shard, algorithm)
        norm = self._grad_norm()
        accepted = self._past.accepts(norm, self._training.skip_grad_norm_above)
        if accepted:
            scale = self._training.clip_grad / (norm + 1e-6)
            if 0 < scale < 1 and (grads := self._grads()):  # a stage may have nothing to train
                torch._foreach_mul_(grads, scale)
            self._update(lr)
        elif self.skipped_dir and self._past.num_skipped <= MAX_KEPT:
            shard.save(self.skipped_dir / f"step_{self._past.step}" / f"rank_{dist.get_rank()}.pt")
        self._past.step += 1
        return StepMetrics(
            loss=metrics.loss,
            grad_norm=norm,
            lr=lr,
            skipped=not accepted,
            means=metrics.means,
            maxima=metrics.maxima,
            num_skipped=self._past.num_skipped,
        )

    def sleep(self) -> None:
        """Frees the memory of weights, gradients and optimizer state until `wake`; no collective.

        Weights and optimizer state are the same bits afterwards; gradients are zeros, or none, since each
        step begins by clearing them. In between the rank can do nothing else.
        """
        self._memory.release(*self._live_tensors())

    def wake(self) -> None:
        """Takes the memory again; all tensors are where they were."""
        self._memory.restore()

    @abstractmethod
    def all_sum(self, value: Tensor) -> Tensor:
        """Sum over the data-parallel ranks, in a new tensor."""

    @abstractmethod
    def weight_shards(self) -> Iterator[WeightShard]:
        """This rank's pieces of the Hugging Face tensors, in the same order at every call; no collective.

        Over all ranks each element comes at least once; replicas (DP, norms under TP) may repeat it.
        """

    @abstractmethod
    def save(self, path: Path) -> None:
        """Writes weights, optimizer, RNG and step into the existing empty directory `path`; collective."""

    @abstractmethod
    def load(self, path: Path) -> None:
        """Restores what `save` wrote, but not the reference: that remains the model's files; collective."""

    # What a backend does in its own way. `_backward` fills gradients summed over ranks and returns metrics
    # on every rank; `_grad_norm`, `_grads` and `_update` come after it, in this order.
    @abstractmethod  # [T] per micro-batch, last stage only; the weights are those asked for
    def _packed_logprobs(
        self, shard: TrainBatch, weights: Literal["policy", "ref"]
    ) -> list[Tensor]: ...
    @abstractmethod
    def _backward(self, shard: TrainBatch, algorithm: Algorithm) -> ReducedMetrics: ...
    @abstractmethod
    def _grad_norm(self) -> float: ...  # of the whole gradient, the same on every rank
    @abstractmethod
    def _grads(self) -> list[Tensor]: ...  # what the optimizer will use on this rank
    @abstractmethod
    def _update(self, lr: float) -> None: ...
    @abstractmethod
    def _parameters(self) -> list[Tensor]: ...  # the live tensors of this rank
    @abstractmethod
    def _live_tensors(
        self,
    ) -> tuple[list[Tensor], list[Tensor]]: ...  # to keep asleep, and gradient buffers

    def _keep_reference(self) -> None:
        """On the CPU, where the algorithm needs a reference: the weights as they are, and room for others."""
        if self._config.algorithm.needs_reference:
            live = self._parameters()
            self._reference = [p.detach().to("cpu", copy=True) for p in live]
            self._policy_aside = [
                torch.empty_like(p, device="cpu", pin_memory=p.is_cuda) for p in live
            ]

    @contextmanager
    def _weights(self, which: Literal["policy", "ref"]) -> Iterator[None]:
        """Inside, the model's parameters are the reference's where asked; the policy's again after it."""
        if which == "policy":
            yield
            return
        if not self._reference:
            raise ValueError(
                "reference logprobs need kl_coef > 0 or use_kl_loss; no such weights are kept"
            )
        live = self._parameters()
        torch._foreach_copy_(self._policy_aside, live)
        torch._foreach_copy_(live, self._reference)
        try:
            yield
        finally:
            torch._foreach_copy_(live, self._policy_aside)


def init_process_group(env: RankEnv, config: TrainingConfig) -> None:
    """Joins the trainers' default process group, unless this process is in it: gloo, with CUDA also NCCL.

    All ranks must be here within start_deadline_s, else RunError; collectives have collective_deadline_s.
    """
    if dist.is_initialized():
        return
    if env.device == "cuda":
        torch.cuda.set_device(env.local_rank)
    start = timedelta(seconds=config.start_deadline_s)
    try:
        meeting = dist.rendezvous(env.init_method, env.rank, env.world_size, timeout=start)
        store, rank, world_size = next(meeting)
        store.set(f"trainer rank {rank}", "here")
        store.wait([f"trainer rank {other}" for other in range(world_size)], start)
    except RuntimeError as e:
        who = f"trainer rank {env.rank} of {env.world_size}"
        late = f"at {env.init_method} within training.start_deadline_s={config.start_deadline_s:g}"
        raise RunError(f"{who} did not meet the others {late}; their logs say why: {e}") from e
    backend = "cpu:gloo,cuda:nccl" if env.device == "cuda" else "gloo"
    place = {"store": dist.PrefixStore("default_pg", store), "rank": rank, "world_size": world_size}
    dist.init_process_group(
        backend, **place, timeout=timedelta(seconds=config.collective_deadline_s)
    )
