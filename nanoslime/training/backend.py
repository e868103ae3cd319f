"""One trainer rank as the rest of the program sees it, and what all backends do alike."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from nanoslime.algorithms.policy_gradient import PolicyGradient
from nanoslime.batch import OwnedShard, StepMetrics, TrainBatch, WeightShard
from nanoslime.config import RunConfig
from nanoslime.config.training import TrainingConfig
from nanoslime.process_groups import listening_store
from nanoslime.training.metrics import ReducedMetrics
from nanoslime.training.schedule import lr_at
from nanoslime.training.skipping import StepHistory
from nanoslime.training.sleep import DeviceMemory, on_host
from nanoslime.types import RunError

logger = logging.getLogger(__name__)

Weights = Literal["policy", "ref"]

# A run keeps so many batches of skipped steps: one that skips all shall not fill the
# disk.
MAX_KEPT = 16


@dataclass(frozen=True, slots=True)
class RankEnv:
    """Who this rank is."""

    rank: int
    world_size: int
    local_rank: int
    device: Literal["cpu", "cuda"]
    init_method: str  # tcp://ADDRESS:PORT of rank 0, or env:// under torchrun

    @property
    def torch_device(self) -> torch.device:
        if self.device == "cuda":
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")


class TrainBackend(ABC):
    """One rank's view; all ranks make the same calls, each with its data-parallel shard.

    Construction is collective: it joins the process group and loads the weights of a
    model's directory.
    """

    dp_rank: int
    dp_size: int
    is_last_stage: bool  # of the pipeline: logprobs exist here
    # Of the ranks with the same logprobs (TP, CP), the one that writes about them.
    writes_logprobs: bool
    # The ranks with other sequences; None: all ranks.
    _dp_group: dist.ProcessGroup | None = None
    # Keeps the batches of the first skipped steps, as step_<k>/rank_<r>.pt for
    # TrainBatch.load: on the weights of that time they give the same gradient norm again.
    skipped_dir: Path | None = None

    def __init__(self, config: RunConfig, env: RankEnv) -> None:
        self._config = config
        self._training = config.training
        self._device = env.torch_device
        self._history = StepHistory()
        self._memory = DeviceMemory(self._device)
        # The reference's weights, and room for the policy's while the reference is in
        # use; both on the host.
        self._reference: list[Tensor] = []
        self._policy_aside: list[Tensor] = []
        self._present: Weights = "policy"

    def logprobs(self, shard: TrainBatch, weights: Weights) -> list[Tensor] | None:
        """float32 [T_i] per sequence of `shard`, on the CPU; None before the last stage.

        Under training.routing_replay=R2 the policy's choice of experts is put into
        `shard`; the reference chooses for itself in any case. "ref" is for an algorithm that
        needs a reference.
        """
        with torch.no_grad(), self._weights(weights):
            packs = self._packed_logprobs(shard, weights)
        if not self.is_last_stage:
            return None
        found: dict[int, Tensor] = {}
        for indices, pack in zip(shard.microbatches, packs, strict=True):
            lengths = [len(shard.token_ids[i]) for i in indices]
            sequences = pack.cpu().split(lengths)
            found.update(zip(indices, sequences, strict=True))
        return [found[i] for i in range(len(shard.token_ids))]

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the model has the reference's weights.

        Reference logprobs of many batches then cost one exchange with the host.
        """
        return self._weights("ref")

    def train_step(self, shard: TrainBatch, algorithm: PolicyGradient) -> StepMetrics:
        """Makes an optimizer step; the result is the same on every rank.

        The gradient is clipped to a global norm of clip_grad. A norm that is not finite,
        or that skip_grad_norm_above refuses, skips the update, but counts in the schedule
        of the learning rate.
        """
        history = self._history
        total_steps = self._config.rollout.num_rollout * self._training.num_steps_per_rollout
        lr = lr_at(history.optimizer_step, config=self._training, total_steps=total_steps)
        metrics = self._backward(shard, algorithm)
        norm = self._grad_norm()
        accepted = history.accepts(norm, self._training.skip_grad_norm_above)
        if accepted:
            self._clip(norm)
            self._update(lr)
        elif self.skipped_dir and history.num_skipped <= MAX_KEPT:
            self._keep_skipped(shard, norm, self.skipped_dir)
        history.optimizer_step += 1
        return StepMetrics(
            **asdict(metrics),
            grad_norm=norm,
            lr=lr,
            skipped=not accepted,
            num_skipped=history.num_skipped,
        )

    def _clip(self, norm: float) -> None:
        """Scales the gradient of global norm `norm` down to clip_grad; 0 is no limit."""
        scale = self._training.clip_grad / (norm + 1e-6)
        if not 0 < scale < 1:
            return
        grads = self._grads()
        if grads:  # a pipeline stage may have nothing to train
            torch._foreach_mul_(grads, scale)

    def _keep_skipped(self, shard: TrainBatch, norm: float, skipped_dir: Path) -> None:
        """Saves this rank's share of a skipped step's batch for a later look."""
        optimizer_step = self._history.optimizer_step
        directory = skipped_dir / f"step_{optimizer_step}"
        rank = dist.get_rank()
        shard.save(directory / f"rank_{rank}.pt")
        if rank == 0:
            message = "optimizer step %d skipped: gradient norm %g; its batch is kept in %s"
            logger.warning(message, optimizer_step, norm, directory)

    def sleep(self) -> None:
        """Frees the memory of weights, gradients and optimizer state; no collective.

        `wake` takes it again: weights and optimizer state are then the same bits;
        gradients are zeros, or none, since each step begins by clearing them. In between
        the rank can do nothing else.
        """
        self._memory.release(*self._live_tensors())

    def wake(self) -> None:
        """Takes the memory again; all tensors are where they were."""
        self._memory.restore()

    def all_sum(self, value: Tensor) -> Tensor:
        """Sum over the data-parallel ranks, in a new tensor."""
        total = value.to(self._device, copy=True)
        dist.all_reduce(total, group=self._dp_group)
        return total.to(value.device)

    @abstractmethod
    def weight_shards(self) -> Iterator[WeightShard]:
        """This rank's shards of the Hugging Face tensors; no collective.

        They come in the same order at every call. Over all ranks each element comes at
        least once; replicas (DP, norms under TP) may repeat it.
        """

    @abstractmethod
    def owned_shards(self) -> list[list[OwnedShard]]:
        """What weight_shards() gives on each rank, in its order; no collective."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Writes weights, optimizer, RNG and history into the empty directory `path`.

        It is a collective call.
        """

    @abstractmethod
    def load(self, path: Path) -> None:
        """Restores what `save` wrote; a collective call.

        The reference stays as the model's files have it.
        """

    # The methods below are what each backend does in its own way. train_step calls
    # `_backward`, `_grad_norm`, `_grads` and `_update` in this order.

    @abstractmethod
    def _packed_logprobs(self, shard: TrainBatch, weights: Weights) -> list[Tensor]:
        """[T] per micro-batch, on the last stage only. The model holds `weights` already."""

    @abstractmethod
    def _backward(self, shard: TrainBatch, algorithm: PolicyGradient) -> ReducedMetrics:
        """Fills the gradients, summed over ranks, and returns metrics on every rank."""

    @abstractmethod
    def _grad_norm(self) -> float:
        """The norm of the whole gradient, the same on every rank."""

    @abstractmethod
    def _grads(self) -> list[Tensor]:
        """The gradients that the optimizer will use on this rank."""

    @abstractmethod
    def _update(self, lr: float) -> None:
        """Makes the optimizer's step."""

    @abstractmethod
    def _parameters(self) -> list[Tensor]:
        """The live parameters of this rank."""

    @abstractmethod
    def _live_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """What to keep while asleep, and gradient buffers, which need not be kept."""

    def _keep_reference(self) -> None:
        """Keeps the present weights on the host if the algorithm needs a reference."""
        if not self._config.algorithm.needs_reference:
            return
        self._reference = on_host(self._parameters(), self)
        self._policy_aside = on_host(self._parameters(), self)

    @contextmanager
    def _weights(self, which: Weights) -> Iterator[None]:
        """Inside, the model has the weights `which`; afterwards, the policy's again."""
        if which == self._present:
            yield
            return
        assert which == "ref", "the policy's weights are aside while the reference's are in use"
        assert self._reference, "the algorithm needs no reference, whose weights were not kept"
        live = self._parameters()
        # The stream keeps the order of copies between pinned memory and the device.
        torch._foreach_copy_(self._policy_aside, live, non_blocking=True)
        torch._foreach_copy_(live, self._reference, non_blocking=True)
        self._present = "ref"
        try:
            yield
        finally:
            torch._foreach_copy_(live, self._policy_aside, non_blocking=True)
            self._present = "policy"


@contextmanager
def collectives(config: TrainingConfig) -> Iterator[None]:
    """Raises RunError that names the setting where a collective inside exceeds its deadline.

    That is the rank which waits, not the one which is late.
    """
    try:
        yield
    except RuntimeError as e:
        # gloo has no exception of its own for it, so that only its words tell.
        if "timed out" not in str(e).lower():
            raise
        raise RunError(
            "another rank was not there for a collective within "
            f"training.collective_deadline_s={config.collective_deadline_s:g} seconds; its log "
            "says what it did, and raise the deadline if it was only slow"
        ) from e


def init_process_group(env: RankEnv, config: TrainingConfig) -> None:
    """Joins the trainers' default process group, unless this process is in it already.

    Its backend is gloo, and on CUDA also NCCL. Raises RunError where not all ranks are
    here within start_deadline_s. Collectives have collective_deadline_s.
    """
    if dist.is_initialized():
        return
    if env.device == "cuda":
        torch.cuda.set_device(env.local_rank)
    start_deadline = timedelta(seconds=config.start_deadline_s)
    collective_deadline = timedelta(seconds=config.collective_deadline_s)
    try:
        store = _meeting_store(env, start_deadline)
        store.set(f"trainer rank {env.rank}", "here")
        store.wait([f"trainer rank {other}" for other in range(env.world_size)], start_deadline)
    except (RuntimeError, OSError) as e:
        raise RunError(
            f"trainer rank {env.rank} of {env.world_size} did not meet the others at"
            f" {env.init_method} within training.start_deadline_s={config.start_deadline_s:g};"
            f" their logs say why: {e}"
        ) from e
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if env.device == "cuda" else "gloo",
        store=dist.PrefixStore("default_pg", store),
        rank=env.rank,
        world_size=env.world_size,
        timeout=collective_deadline,
    )


def _meeting_store(env: RankEnv, timeout: timedelta) -> dist.Store:
    place = urlsplit(env.init_method)
    if place.scheme == "tcp" and place.hostname and place.port and env.rank == 0:
        return listening_store(place.hostname, place.port, timeout)
    store, _, _ = next(dist.rendezvous(env.init_method, env.rank, env.world_size, timeout=timeout))
    return store
