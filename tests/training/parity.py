"""One training problem, run by any backend in any layout.

    run([Job(layout, model_dir, train, steps)], tmp)  runs jobs in turn, in one set of processes
    collect(results, layout)                          whole tensors from the pieces of the ranks
    assert_parity(outcome, reference(...), layout)    compares with plain PyTorch (reference.py)

To plug in a backend, give its class in BACKENDS, and say in `grad_shards` where it keeps its
gradients.
"""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from nanoslime import algorithms
from nanoslime.batch import OwnedShard, StepMetrics, TrainBatch, WeightShard
from nanoslime.config import GRPOConfig, ModelConfig, RolloutConfig, RunConfig, TrainingConfig
from nanoslime.config.algorithm import CISPOConfig, GSPOConfig, ReinforcePPConfig
from nanoslime.plugins import resolve
from nanoslime.training.backend import RankEnv
from nanoslime.training.fsdp import FSDPBackend
from nanoslime.weight_sync.plan import Bucket, make_sync_plan, whole_on_first
from tests.training.rank_pool import leave_groups

BACKENDS = {
    "megatron": "nanoslime.training.megatron.backend:MegatronBackend",
    "fsdp": "nanoslime.training.fsdp:FSDPBackend",
}
RELATIVE = 1e-5  # gradients, loss, metrics, norm
ABSOLUTE = 1e-5  # parameters after two steps, with adam_eps=1e-3; and logprobs
NUM_STEPS = 2
LENGTHS = [17, 9, 24, 5, 12, 21, 8, 15]
TEMPERATURE = 0.7
KL = GRPOConfig(use_kl_loss=True, kl_loss_coef=0.1)
# Each algorithm has a KL term, in the loss or in the reward.
ALGORITHMS = {
    "grpo": KL,
    "gspo": GSPOConfig(eps_clip=0.1, eps_clip_high=0.1, use_kl_loss=True, kl_loss_coef=0.1),
    "cispo": CISPOConfig(use_kl_loss=True, kl_loss_coef=0.1),
    "reinforce_plus_plus": ReinforcePPConfig(kl_coef=0.1, gamma=0.98),
}

# A copy of a WeightShard that can be sent: HF name, full shape, box, values in float32.
CopiedShard = tuple[str, tuple[int, ...], tuple[slice, ...], Tensor]


@dataclass(frozen=True)
class Layout:
    backend: str = "megatron"
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    cp_size: int = 1
    vpp_size: int = 1
    algorithm: str = "grpo"
    sequences: int | None = None  # in each micro-batch; None: see train_batch
    options: tuple[tuple[str, Any], ...] = ()  # further fields of TrainingConfig
    ddp: tuple[tuple[str, Any], ...] = ()  # training.megatron_ddp
    dtype: str = "float32"
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size * self.dp_size * self.cp_size

    def __str__(self) -> str:
        words = [self.backend]
        for name in ("tp", "cp", "pp", "vpp", "dp"):
            size = getattr(self, f"{name}_size")
            if size > 1:
                words.append(f"{name}{size}")
        if len(words) == 1:
            words.append("one rank")
        if self.sequences:
            words.append(f"{self.sequences} in a micro-batch")
        for name, value in self.options + self.ddp:
            words.append(name if value is True else f"{name}={value}")
        if self.dtype != "float32":
            words.append(self.dtype)
        if self.device != "cpu":
            words.append(self.device)
        return " ".join(words)

    def config(self, **changes: Any) -> RunConfig:
        settings: dict[str, Any] = dict(
            backend=self.backend,
            tp_size=self.tp_size,
            pp_size=self.pp_size,
            cp_size=self.cp_size,
            vpp_size=self.vpp_size,
            lr=1e-2,
            lr_schedule="linear",
            min_lr=1e-3,
            adam_eps=1e-3,
            weight_decay=0.1,
            clip_grad=0.05,  # well below the norm: clipping is part of what must agree
            distributed_optimizer=False,
            collective_deadline_s=60.0,
        )
        settings.update(self.options)
        if self.ddp:
            settings["megatron_ddp"] = dict(self.ddp)
        settings.update(changes)
        return RunConfig(
            seed=1,
            model=ModelConfig(dtype=self.dtype),
            algorithm=ALGORITHMS[self.algorithm],
            rollout=RolloutConfig(num_rollout=5, rollout_batch_size=8),
            training=TrainingConfig(**settings),
        )


@dataclass
class Outcome:
    """The results of a run, assembled from all ranks."""

    # Per sequence, under the initial weights.
    logprobs: list[Tensor] = field(default_factory=list)
    steps: list[StepMetrics] = field(default_factory=list)
    # Per step, after clipping.
    grads: list[dict[str, Tensor]] = field(default_factory=list)
    params: dict[str, Tensor] = field(default_factory=dict)  # after the last step
    extra: dict[str, Any] = field(default_factory=dict)


# Runs on one rank: function(layout, model_dir, rank, directory, argument).
RankFunction = Callable[[Layout, Path, int, Path, Any], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """A function for every rank of a layout."""

    layout: Layout
    model_dir: Path
    function: RankFunction
    argument: Any


def values_of(step: StepMetrics) -> dict[str, float]:
    """Means, maxima and minima together."""
    return step.means | step.maxima | step.minima


def train_batch(
    step: dict[str, Any], dp_rank: int = 0, dp_size: int = 1, sequences: int | None = None
) -> TrainBatch:
    """The sequences of one data-parallel rank, with the denominators of all ranks.

    Each micro-batch has `sequences` of them. With None it has two, but the last two
    sequences stand alone: over two ranks, one of these is masked out as a whole.
    """
    mine = list(range(dp_rank, len(LENGTHS), dp_size))
    if sequences:
        indices = list(range(len(mine)))
        microbatches = [indices[i : i + sequences] for i in range(0, len(mine), sequences)]
    else:
        last = len(mine) - 2
        microbatches = [[i, i + 1] for i in range(0, last, 2)]
        microbatches += [[last], [last + 1]]
    per_sequence = {name: [values[i] for i in mine] for name, values in step.items()}
    denominator = 0.0
    num_tokens = 0
    for weight, mask in zip(step["token_weights"], step["loss_mask"], strict=True):
        denominator += weight * float(mask.sum())
        num_tokens += int(mask.sum())
    return TrainBatch(
        **per_sequence,
        microbatches=microbatches,
        denominator=denominator,
        num_tokens=num_tokens,
        num_sequences=len(LENGTHS),
        temperature=TEMPERATURE,
    )


def grad_shards(backend: Any) -> Iterator[WeightShard]:
    """As weight_shards(), but the clipped float32 gradients of the last step, summed over data
    parallelism (under Megatron's distributed optimizer, the rank's share only).
    """
    if isinstance(backend, FSDPBackend):
        parameters = dict(backend._model.named_parameters())
        for shard in backend.weight_shards():
            grad = parameters[shard.name].grad
            if grad is not None:
                yield replace(shard, tensor=grad.to_local())
        return
    for piece, parameter in backend._parameter_pieces:
        if hasattr(parameter, "main_grad"):  # the bias of a router's scores has none
            grad = parameter.main_grad[piece.local]
            yield WeightShard(piece.hf, piece.full_shape, piece.box, grad)


def copied(shards: Iterable[WeightShard]) -> list[CopiedShard]:
    found = []
    for shard in shards:
        values = shard.tensor.detach().float().cpu().clone()
        found.append((shard.name, shard.full_shape, shard.slices, values))
    return found


def assemble(shards: Iterable[CopiedShard]) -> dict[str, Tensor]:
    """Whole tensors from the pieces of all ranks.

    Every element must come, and replicas must agree bit for bit.
    """
    whole: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for name, shape, slices, piece in shards:
        tensor = whole.setdefault(name, piece.new_zeros(shape))
        is_filled = seen.setdefault(name, torch.zeros(shape, dtype=torch.bool))
        expected_shape = tensor[slices].shape
        assert piece.shape == expected_shape, (
            f"{name}: {slices} has shape {list(expected_shape)}, but its piece {list(piece.shape)}"
        )
        known = is_filled[slices]
        replicas_agree = torch.equal(tensor[slices][known], piece[known])
        assert replicas_agree, f"{name}: ranks disagree on {slices}"
        tensor[slices] = piece
        is_filled[slices] = True
    num_missing = {name: int((~filled).sum()) for name, filled in seen.items()}
    assert not any(num_missing.values()), f"elements that no rank holds: {num_missing}"
    return whole


def make_backend(
    layout: Layout, model_dir: Path, rank: int, rendezvous: Path, **changes: Any
) -> Any:
    env = RankEnv(rank, layout.world_size, rank, layout.device, f"file://{rendezvous}")
    backend_class = resolve(layout.backend, BACKENDS, "backend")
    return backend_class(layout.config(**changes), model_dir, env)


def train(
    layout: Layout, model_dir: Path, rank: int, tmp: Path, steps: list[dict[str, Any]]
) -> dict[str, Any]:
    """Makes NUM_STEPS steps on this rank and returns what `collect` assembles."""
    backend = make_backend(layout, model_dir, rank, tmp / "rendezvous")
    config = layout.config()
    algorithm = algorithms.make(config.algorithm)
    batches = []
    for step in steps:
        batch = train_batch(step, backend.dp_rank, backend.dp_size, layout.sequences)
        batches.append(batch)
    initial = copied(backend.weight_shards())
    logprobs = backend.logprobs(batches[0], "policy")
    metrics = []
    grads = []
    for batch in batches:
        if backend.is_last_stage:
            batch.token_advantages = algorithm.token_advantages(batch, backend.all_sum)
        metrics.append(backend.train_step(batch, algorithm))
        if not config.training.distributed_optimizer:
            grads.append(copied(grad_shards(backend)))
    params = copied(backend.weight_shards())
    ref_logprobs = backend.logprobs(batches[0], "ref")
    return {
        "dp_rank": backend.dp_rank,
        "initial": initial,
        "owned": backend.owned_shards(),
        "logprobs": logprobs,
        "steps": metrics,
        "grads": grads,
        "params": params,
        "ref_logprobs": ref_logprobs,
        "params_after_ref": copied(backend.weight_shards()),
    }


def collect(results: list[dict[str, Any]], layout: Layout) -> Outcome:
    """The outcome from what `train` returned, by rank."""
    first = results[0]
    for result in results:
        same_steps = result["steps"] == first["steps"]
        assert same_steps, f"{layout}: StepMetrics differ between ranks"
    grads = []
    for number in range(len(first["grads"])):
        shards = (shard for result in results for shard in result["grads"][number])
        grads.append(assemble(shards))
    return Outcome(
        logprobs=_by_sequence(results, "logprobs", layout.dp_size),
        steps=first["steps"],
        grads=grads,
        params=_assembled(results, "params"),
        extra={
            "plan": _sync_plan(results),
            "initial": _assembled(results, "initial"),
            "ref_logprobs": _by_sequence(results, "ref_logprobs", layout.dp_size),
            "params_after_ref": _assembled(results, "params_after_ref"),
        },
    )


def _assembled(results: list[dict[str, Any]], name: str) -> dict[str, Tensor]:
    return assemble(shard for result in results for shard in result[name])


def _sync_plan(results: list[dict[str, Any]]) -> tuple[Bucket, ...]:
    """The plan for the shards that the ranks held before the first step."""
    shards_by_rank = [
        [OwnedShard(name, shape, box) for name, shape, box, _ in result["initial"]]
        for result in results
    ]
    for result in results:
        assert result["owned"] == shards_by_rank, "each rank knows what all the others hold"

    def float32(name: str) -> torch.dtype:
        return torch.float32

    return make_sync_plan(shards_by_rank, float32, 1 << 20, whole_on_first)


def _by_sequence(results: list[dict[str, Any]], name: str, dp_size: int) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for result in results:
        if result[name] is None:
            continue
        indices = range(result["dp_rank"], len(LENGTHS), dp_size)
        for index, value in zip(indices, result[name], strict=True):
            found[index] = value
    return [found[i] for i in range(len(LENGTHS))]


def run(jobs: list[Job], tmp: Path, deadline_s: float = 240.0) -> list[list[dict[str, Any]]]:
    """Calls each job's function on each of its ranks, in one set of processes.

    Returns one list over ranks per job. Raises with the traceback of the first rank
    that failed.
    """
    # The fork server makes slow imports once, unless it is running already. Some of these
    # imports use CUDA, after which a forked process could not.
    on_gpu = any(job.layout.device == "cuda" for job in jobs)
    context = multiprocessing.get_context("spawn" if on_gpu else "forkserver")
    if not on_gpu:
        modules = ["nanoslime.training.megatron.backend", "tests.training.parity"]
        context.set_forkserver_preload(modules)
    world_size = max(job.layout.world_size for job in jobs)
    for number in range(len(jobs)):
        (tmp / str(number)).mkdir()
    # As arguments of the processes, tensors would travel as one open file each.
    torch.save(jobs, tmp / "jobs.pt")
    workers = []
    for rank in range(world_size):
        workers.append(context.Process(target=_work, args=(tmp, rank), daemon=True))
    try:
        for worker in workers:
            worker.start()
        _wait(workers, deadline_s)
    finally:
        late = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join()
    errors = [file.read_text() for file in sorted(tmp.glob("error-*"))]
    if errors:
        raise AssertionError("\n".join(errors))
    assert not late, f"ranks {late} were still running after {deadline_s} s"
    results = []
    for number, job in enumerate(jobs):
        directory = tmp / str(number)
        files = [directory / f"rank-{rank}.pt" for rank in range(job.layout.world_size)]
        results.append([torch.load(file, weights_only=False) for file in files])
    return results


def _wait(workers: list[Any], deadline_s: float) -> None:
    """Returns when all workers have ended, when one has failed, or after the deadline."""
    deadline = time.monotonic() + deadline_s
    running = list(workers)
    while running:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            return
        ends = [worker.sentinel for worker in running]
        multiprocessing.connection.wait(ends, remaining_s)
        if any(worker.exitcode for worker in workers):
            return
        running = [worker for worker in running if worker.is_alive()]


def _work(tmp: Path, rank: int) -> None:
    torch.set_num_threads(1)
    jobs = torch.load(tmp / "jobs.pt", weights_only=False)
    for number, job in enumerate(jobs):
        if rank >= job.layout.world_size:
            continue
        directory = tmp / str(number)
        try:
            result = job.function(job.layout, job.model_dir, rank, directory, job.argument)
            torch.save(result, directory / f"rank-{rank}.pt")
            if dist.is_initialized():
                leave_groups()
                dist.destroy_process_group()
        except BaseException:
            error = tmp / f"error-{time.monotonic():020.6f}-{rank}"
            error.write_text(f"{job.layout}, rank {rank}:\n{traceback.format_exc()}")
            raise


def largest(values: Iterable[float]) -> float:
    """The largest value, or NaN if any is NaN; max drops a NaN that is not the first."""
    values = list(values)
    if any(math.isnan(value) for value in values):
        return math.nan
    return max(values)


def compare(outcome: Outcome, ref: Outcome) -> dict[str, float]:
    """The largest difference in each quantity."""
    logprobs = [_absolute(a, b) for a, b in zip(outcome.logprobs, ref.logprobs, strict=True)]
    losses = []
    norms = []
    metrics = [0.0]
    for step, expected in zip(outcome.steps, ref.steps, strict=True):
        assert values_of(step).keys() == values_of(expected).keys(), (
            f"metrics that only one has: {values_of(step).keys() ^ values_of(expected).keys()}"
        )
        assert math.isclose(step.lr, expected.lr)
        assert not step.skipped
        losses.append(_relative(step.loss, expected.loss))
        norms.append(_relative(step.grad_norm, expected.grad_norm))
        for name, value in values_of(expected).items():
            metrics.append(_relative(values_of(step)[name], value))
    assert outcome.params.keys() == ref.params.keys(), (
        f"parameters that only one has: {outcome.params.keys() ^ ref.params.keys()}"
    )
    params = [_absolute(outcome.params[name], value) for name, value in ref.params.items()]
    grads = [math.nan]
    if outcome.grads:
        grads = []
        for found, expected_grads in zip(outcome.grads, ref.grads, strict=True):
            for name, grad in expected_grads.items():
                scale = float(grad.abs().max().clamp_min(1e-9))
                grads.append(_absolute(found[name], grad) / scale)
    return {
        "logprobs": largest(logprobs),
        "loss": largest(losses),
        "norm": largest(norms),
        "params": largest(params),
        "metrics": largest(metrics),
        "grads": largest(grads),
    }


def assert_parity(outcome: Outcome, ref: Outcome, layout: object) -> None:
    found = compare(outcome, ref)
    limits = {
        "logprobs": ABSOLUTE,
        "loss": RELATIVE,
        "norm": RELATIVE,
        "params": ABSOLUTE,
        "metrics": RELATIVE,
        "grads": RELATIVE,
    }
    if not outcome.grads:
        del limits["grads"]
    exceeded = [name for name, limit in limits.items() if not found[name] <= limit]
    differences = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    assert not exceeded, f"{exceeded} differ from plain PyTorch: {layout}: {differences}"


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-12)


def _absolute(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
