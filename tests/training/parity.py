"""One training problem, run by any backend in any layout.

    run([(layout, model_dir, train, steps), ...], tmp)   in turn, in one set of spawned processes over gloo
    collect(results, layout)                             whole tensors from the pieces of the ranks
    assert_parity(outcome, reference(...))               the tolerances against plain PyTorch (reference.py)

To plug in a backend, give its class in BACKENDS: it is constructed as Backend(config, model_dir, env) and
offers TrainBackend plus `grad_shards()`, the gradients of the last step, clipped, as WeightShards.
"""

from __future__ import annotations

import math
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from nanoslime import algorithms
from nanoslime.batch import StepMetrics, TrainBatch, WeightShard
from nanoslime.config import GRPOConfig, ModelConfig, RolloutConfig, RunConfig, TrainingConfig
from nanoslime.config.algorithm import CISPOConfig, GSPOConfig, ReinforcePPConfig
from nanoslime.plugins import resolve
from nanoslime.training.backend import RankEnv
from nanoslime.weight_sync.assemble import make_plan

BACKENDS = {
    "megatron": "nanoslime.training.megatron.backend:MegatronBackend",
    "fsdp": "nanoslime.training.fsdp:FSDPBackend",
}
RELATIVE = 1e-5  # gradients, loss, metrics, norm
ABSOLUTE = 1e-5  # parameters after two steps, with adam_eps=1e-3
NUM_STEPS = 2
LENGTHS = [17, 9, 24, 5, 12, 21, 8, 15]
TEMPERATURE = 0.7
KL = GRPOConfig(use_kl_loss=True, kl_loss_coef=0.1)
ALGORITHMS = {  # each with a KL term, in the loss or in the reward
    "grpo": KL,
    "gspo": GSPOConfig(eps_clip=0.1, eps_clip_high=0.1, use_kl_loss=True, kl_loss_coef=0.1),
    "cispo": CISPOConfig(use_kl_loss=True, kl_loss_coef=0.1),
    "reinforce_plus_plus": ReinforcePPConfig(kl_coef=0.1, gamma=0.98),
}


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
    dtype: str = "float32"
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size * self.dp_size * self.cp_size

    def __str__(self) -> str:
        sizes = [
            f"{name}{getattr(self, f'{name}_size')}" for name in ("tp", "cp", "pp", "vpp", "dp")
        ]
        sizes = [size for size in sizes if not size.endswith("p1")] or ["one rank"]
        if self.sequences:
            sizes.append(f"{self.sequences} in a micro-batch")
        options = [name if value is True else f"{name}={value}" for name, value in self.options]
        kinds = [kind for kind in (self.dtype, self.device) if kind not in ("float32", "cpu")]
        return " ".join([self.backend, *sizes, *options, *kinds])

    def config(self, **changes: Any) -> RunConfig:
        settings = dict(
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
        return RunConfig(
            seed=1,
            model=ModelConfig(dtype=self.dtype),
            algorithm=ALGORITHMS[self.algorithm],
            rollout=RolloutConfig(num_rollout=5, rollout_batch_size=8),
            training=TrainingConfig(**settings | dict(self.options) | changes),
        )


@dataclass
class Outcome:
    """What a run gave, assembled from all ranks."""

    logprobs: list[Tensor] = field(default_factory=list)  # per sequence, under the initial weights
    steps: list[StepMetrics] = field(default_factory=list)
    grads: list[dict[str, Tensor]] = field(default_factory=list)  # per step, after clipping
    params: dict[str, Tensor] = field(default_factory=dict)  # after the last step
    extra: dict[str, Any] = field(default_factory=dict)


def train_batch(
    step: dict[str, Any], dp_rank: int = 0, dp_size: int = 1, sequences: int | None = None
) -> TrainBatch:
    """The share of one data-parallel rank, with the denominators of all ranks.

    So many `sequences` in each micro-batch; with None pairs, the last two alone, of which over two ranks one
    is masked out as a whole.
    """
    mine = range(dp_rank, len(LENGTHS), dp_size)
    last = len(mine) - 2
    microbatches = [[i, i + 1] for i in range(0, last, 2)] + [[last], [last + 1]]
    if sequences:
        microbatches = [
            [*range(len(mine))[i : i + sequences]] for i in range(0, len(mine), sequences)
        ]
    share = {name: [values[i] for i in mine] for name, values in step.items()}
    weighted = zip(step["token_weights"], step["loss_mask"], strict=True)
    return TrainBatch(
        **share,
        microbatches=microbatches,
        denominator=float(sum(weight * float(mask.sum()) for weight, mask in weighted)),
        num_tokens=sum(int(mask.sum()) for mask in step["loss_mask"]),
        num_sequences=len(LENGTHS),
        temperature=TEMPERATURE,
    )


def assemble(
    shards: Iterable[tuple[str, tuple[int, ...], tuple[slice, ...], Tensor]],
) -> dict[str, Tensor]:
    """Whole tensors from the pieces of all ranks; every element must come, and replicas must agree bit for
    bit.
    """
    full: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for name, shape, slices, piece in shards:
        tensor = full.setdefault(name, piece.new_zeros(shape))
        there = seen.setdefault(name, torch.zeros(shape, dtype=torch.bool))
        assert tensor[slices].shape == piece.shape, (
            f"{name}: {slices} for a piece of {list(piece.shape)}"
        )
        known = there[slices]
        assert torch.equal(tensor[slices][known], piece[known]), (
            f"{name}: ranks disagree on {slices}"
        )
        tensor[slices] = piece
        there[slices] = True
    missing = {name: int((~there).sum()) for name, there in seen.items() if not there.all()}
    assert not missing, f"elements that no rank holds: {missing}"
    return full


def copied(
    shards: Iterable[WeightShard],
) -> list[tuple[str, tuple[int, ...], tuple[slice, ...], Tensor]]:
    return [
        (s.name, s.full_shape, s.slices, s.tensor.detach().float().cpu().clone()) for s in shards
    ]


def make_backend(
    layout: Layout, model_dir: Path, rank: int, rendezvous: Path, **changes: Any
) -> Any:
    env = RankEnv(rank, layout.world_size, rank, layout.device, f"file://{rendezvous}")
    return resolve(layout.backend, BACKENDS, "backend")(layout.config(**changes), model_dir, env)


def train(
    layout: Layout, model_dir: Path, rank: int, tmp: Path, steps: list[dict[str, Any]]
) -> dict[str, Any]:
    """NUM_STEPS steps on this rank; what the parent assembles."""
    backend = make_backend(layout, model_dir, rank, tmp / "rendezvous")
    algorithm = algorithms.make(layout.config().algorithm)
    batches = [
        train_batch(step, backend.dp_rank, backend.dp_size, layout.sequences) for step in steps
    ]
    result: dict[str, Any] = dict(
        dp_rank=backend.dp_rank, initial=copied(backend.weight_shards()), grads=[], steps=[]
    )
    result["logprobs"] = backend.logprobs(batches[0], "policy")
    for batch in batches:
        if backend.is_last_stage:
            batch.token_advantages = algorithm.token_advantages(batch, backend.all_sum)
        result["steps"].append(backend.train_step(batch, algorithm))
        if not layout.config().training.distributed_optimizer:
            result["grads"].append(copied(backend.grad_shards()))
    result["params"] = copied(backend.weight_shards())
    result["ref_logprobs"] = backend.logprobs(batches[0], "ref")
    result["params_after_ref"] = copied(backend.weight_shards())
    return result


def collect(results: list[dict[str, Any]], layout: Layout) -> Outcome:
    first = results[0]
    assert all(r["steps"] == first["steps"] for r in results), (
        f"{layout}: StepMetrics differ between ranks"
    )
    num_grads = len(first["grads"])
    outcome = Outcome(
        steps=first["steps"],
        grads=[assemble(s for r in results for s in r["grads"][i]) for i in range(num_grads)],
        params=assemble(s for r in results for s in r["params"]),
    )
    outcome.logprobs = _by_sequence(results, "logprobs", layout.dp_size)
    owned = [
        [(n, shape, tuple((s.start, s.stop) for s in box)) for n, shape, box, _ in r["initial"]]
        for r in results
    ]
    outcome.extra = {
        "plan": make_plan(owned),
        "initial": assemble(s for r in results for s in r["initial"]),
        "ref_logprobs": _by_sequence(results, "ref_logprobs", layout.dp_size),
        "params_after_ref": assemble(s for r in results for s in r["params_after_ref"]),
    }
    return outcome


def _by_sequence(results: list[dict[str, Any]], name: str, dp_size: int) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for r in results:
        if r[name] is not None:
            found.update(zip(range(r["dp_rank"], len(LENGTHS), dp_size), r[name], strict=True))
    return [found[i] for i in range(len(LENGTHS))]


RankFunction = Callable[[Layout, Path, int, Path, Any], dict[str, Any]]


def run(
    jobs: list[tuple[Layout, Path, RankFunction, Any]], tmp: Path, deadline_s: float = 240.0
) -> list[list[dict[str, Any]]]:
    """Each job's function(layout, model_dir, rank, directory, argument) on each of its ranks, in one set of
    processes.

    Returns one list over ranks per job. Raises with the traceback of the first rank that failed.
    """
    context = multiprocessing.get_context(
        "forkserver"
    )  # slow imports once, where it is not running yet
    context.set_forkserver_preload(["nanoslime.training.megatron.backend", "tests.training.parity"])
    world = max(layout.world_size for layout, *_ in jobs)
    for number in range(len(jobs)):
        (tmp / str(number)).mkdir()
    torch.save(jobs, tmp / "jobs.pt")  # as arguments, tensors would travel as one open file each
    workers = [
        context.Process(target=_work, args=(tmp, rank), daemon=True) for rank in range(world)
    ]
    try:
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + deadline_s
        while any(worker.is_alive() for worker in workers):
            if any(worker.exitcode for worker in workers) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
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
    return [
        [
            torch.load(tmp / str(n) / f"rank-{rank}.pt", weights_only=False)
            for rank in range(job[0].world_size)
        ]
        for n, job in enumerate(jobs)
    ]


def _work(tmp: Path, rank: int) -> None:
    torch.set_num_threads(1)
    jobs = torch.load(tmp / "jobs.pt", weights_only=False)
    for number, (layout, model_dir, function, argument) in enumerate(jobs):
        if rank >= layout.world_size:
            continue
        directory = tmp / str(number)
        try:
            result = function(layout, model_dir, rank, directory, argument)
            torch.save(result, directory / f"rank-{rank}.pt")
            if dist.is_initialized():
                dist.barrier()
                dist.destroy_process_group()
        except BaseException:
            (tmp / f"error-{time.monotonic():020.6f}-{rank}").write_text(
                f"{layout}, rank {rank}:\n{traceback.format_exc()}"
            )
            raise


def largest(values: Iterable[float]) -> float:
    """As max, which drops NaN wherever it is not first; here NaN is the largest of all."""
    values = list(values)
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def compare(outcome: Outcome, ref: Outcome) -> dict[str, float]:
    """The largest difference in each quantity."""
    found = {
        "logprobs": largest(
            float((a - b).abs().max()) for a, b in zip(outcome.logprobs, ref.logprobs, strict=True)
        ),
        "loss": largest(
            _relative(a.loss, b.loss) for a, b in zip(outcome.steps, ref.steps, strict=True)
        ),
        "norm": largest(
            _relative(a.grad_norm, b.grad_norm)
            for a, b in zip(outcome.steps, ref.steps, strict=True)
        ),
        "params": _absolute(outcome.params, ref.params),
        "metrics": 0.0,
        "grads": math.nan,
    }
    for a, b in zip(outcome.steps, ref.steps, strict=True):
        assert a.values.keys() == b.values.keys(), (a.values.keys(), b.values.keys())
        assert math.isclose(a.lr, b.lr) and not a.skipped
        found["metrics"] = largest(
            [found["metrics"], *(_relative(a.values[name], b.values[name]) for name in b.values)]
        )
    if outcome.grads:
        pairs = [(g[n], r[n]) for g, r in zip(outcome.grads, ref.grads, strict=True) for n in r]
        found["grads"] = largest(
            float((a - b).abs().max() / b.abs().max().clamp_min(1e-9)) for a, b in pairs
        )
    return found


def assert_parity(outcome: Outcome, ref: Outcome, what: object) -> None:
    found = compare(outcome, ref)
    line = f"{what}: " + ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    limits = dict.fromkeys(("loss", "norm", "metrics", "grads"), RELATIVE) | {
        "params": ABSOLUTE,
        "logprobs": 1e-5,
    }
    if not outcome.grads:
        del limits["grads"]
    over = [name for name, limit in limits.items() if not found[name] <= limit]
    assert not over, f"{over} differ from plain PyTorch: {line}"


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-12)


def _absolute(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return largest(float((a[name] - b[name]).abs().max()) for name in b)
