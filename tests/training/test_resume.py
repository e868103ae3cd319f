"""A run goes on from its checkpoint: bit for bit, or in another layout up to rounding.

A backend does two steps, saves, and does three more. A new backend does a step of its
own, loads, and does the same three; their results are compared. The learning rate warms
up over the save and then follows a cosine. The table that the matrix prints belongs
into tests/RESULTS.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from nanoslime.algorithms.grpo import GRPO
from nanoslime.batch import StepMetrics
from nanoslime.config import GRPOConfig
from nanoslime.plugins import resolve
from nanoslime.training.backend import RankEnv, TrainBackend
from tests.models.hf import save_model
from tests.training.parity import (
    ABSOLUTE,
    BACKENDS,
    RELATIVE,
    CopiedShard,
    Layout,
    assemble,
    copied,
    largest,
    train_batch,
)
from tests.training.rank_pool import RankPool, leave_groups
from tests.training.reference import make_step

pytestmark = pytest.mark.megatron

BEFORE = 2  # steps
AFTER = 3
# The clip range is so wide that no ratio comes near an edge.
ALGORITHM = GRPOConfig(use_kl_loss=True, kl_loss_coef=0.1, eps_clip=0.99, eps_clip_high=10.0)
SCHEDULE = (("lr_schedule", "cosine"), ("lr_warmup_steps", 3), ("min_lr", 1e-4), ("clip_grad", 1.0))
DISTRIBUTED = (*SCHEDULE, ("distributed_optimizer", True))
SEQUENCE_PARALLEL = (*SCHEDULE, ("sequence_parallel", True))

TP1 = Layout(options=SCHEDULE)
TP2 = Layout(tp_size=2, options=SCHEDULE)
PP2 = Layout(pp_size=2, options=SCHEDULE)
DP2 = Layout(dp_size=2, options=SCHEDULE)
SP2 = Layout(tp_size=2, options=SEQUENCE_PARALLEL)
TP2_PP2 = Layout(tp_size=2, pp_size=2, options=SCHEDULE)
TP1_DISTRIBUTED = Layout(options=DISTRIBUTED)
DP2_DISTRIBUTED = Layout(dp_size=2, options=DISTRIBUTED)
TP2_DP2_DISTRIBUTED = Layout(tp_size=2, dp_size=2, options=DISTRIBUTED)
TP2_PP2_DISTRIBUTED = Layout(tp_size=2, pp_size=2, options=DISTRIBUTED)
FSDP1 = Layout("fsdp", options=SCHEDULE)
FSDP2 = Layout("fsdp", dp_size=2, options=SCHEDULE)

ONCE = [(DP2_DISTRIBUTED, DP2_DISTRIBUTED), (TP2, TP1), (PP2, TP1)]
MATRIX = [
    *ONCE,
    (TP1, TP1),
    (TP2, TP2),
    (SP2, SP2),
    (PP2, PP2),
    (DP2, DP2),
    (TP2_PP2, TP2_PP2),
    (TP2_DP2_DISTRIBUTED, TP2_DP2_DISTRIBUTED),
    (FSDP1, FSDP1),
    (FSDP2, FSDP2),
    (DP2, TP1),
    (DP2_DISTRIBUTED, TP1_DISTRIBUTED),
    (TP2_PP2, DP2),
    (TP2_PP2_DISTRIBUTED, DP2_DISTRIBUTED),
    (TP2_DP2_DISTRIBUTED, TP1_DISTRIBUTED),
    (TP1, TP2),
    (TP2, PP2),
    (TP1, TP2_PP2),
    (FSDP2, FSDP1),
    (FSDP1, FSDP2),
]


def label(layout: Layout) -> str:
    words = [layout.backend]
    if layout.backend == "megatron":
        words += [f"TP{layout.tp_size}", f"PP{layout.pp_size}"]
    words.append(f"DP{layout.dp_size}")
    words += [name for name, value in layout.options if value is True]
    return " ".join(words)


# The following functions run on the ranks.


@dataclass
class Continued:
    """One rank's results of the steps after a save or a load."""

    drawn: list[list[float]]  # what the random generators give before the steps
    steps: list[StepMetrics]
    params: list[CopiedShard]  # after the steps


def make(env: RankEnv, layout: Layout, model_dir: Path) -> TrainBackend:
    backend_class = resolve(layout.backend, BACKENDS, "backend")
    return backend_class(layout.config(), model_dir, env)


def draw(backend: TrainBackend, n: int) -> list[list[float]]:
    """The next random numbers of each generator; Megatron has one that differs over TP."""
    drawn = [torch.rand(n).tolist()]
    if type(backend).__name__ == "MegatronBackend":
        with get_cuda_rng_tracker().fork():
            drawn.append(torch.rand(n).tolist())
    return drawn


def go_on(backend: TrainBackend, steps: list[dict[str, Any]]) -> Continued:
    drawn = draw(backend, 4)
    metrics = []
    for step in steps:
        batch = train_batch(step, backend.dp_rank, backend.dp_size)
        metrics.append(backend.train_step(batch, GRPO(ALGORITHM)))
    return Continued(drawn, metrics, copied(backend.weight_shards()))


def run_and_save(
    env: RankEnv, layout: Layout, model_dir: Path, steps: list[dict[str, Any]], path: Path
) -> Continued:
    backend = make(env, layout, model_dir)
    go_on(backend, steps[:BEFORE])
    draw(backend, 5 + env.rank)  # so that each rank's state is its own
    if env.rank == 0:
        path.mkdir()
    dist.barrier()
    backend.save(path)
    continued = go_on(backend, steps[BEFORE:])
    del backend
    leave_groups()
    return continued


def load_and_run(
    env: RankEnv, layout: Layout, model_dir: Path, steps: list[dict[str, Any]], path: Path
) -> Continued:
    backend = make(env, layout, model_dir)
    go_on(backend, steps[-1:])
    backend.load(path)
    continued = go_on(backend, steps[BEFORE:])
    del backend
    leave_groups()
    return continued


# The following functions compare their results.


@dataclass
class Saved:
    path: Path
    ranks: list[Continued]


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    model_dir = save_model(tmp_path_factory.mktemp("model"), "qwen3")
    return model_dir, [make_step(model_dir, number) for number in range(BEFORE + AFTER)]


@pytest.fixture(scope="module")
def pool_of(one_rank, two_ranks, request) -> Callable[[Layout], RankPool]:
    """The pool with as many ranks as a layout has; four ranks are started on need only."""

    def get(layout: Layout) -> RankPool:
        if layout.world_size == 1:
            return one_rank
        if layout.world_size == 2:
            return two_ranks
        return request.getfixturevalue("four_ranks")

    return get


@pytest.fixture(scope="module")
def uninterrupted(problem, pool_of, tmp_path_factory) -> Callable[[Layout], Saved]:
    """The checkpoint of a layout and the run that went on after it; each layout is run once."""
    known: dict[Layout, Saved] = {}

    def get(layout: Layout) -> Saved:
        if layout not in known:
            path = tmp_path_factory.mktemp("saved") / "trainer"
            pool = pool_of(layout)
            known[layout] = Saved(path, pool(run_and_save, layout, *problem, path))
        return known[layout]

    return get


def check(
    before: Layout, after: Layout, uninterrupted: Any, problem: Any, pool_of: Any
) -> dict[str, float]:
    """The largest differences over the three steps; asserts that the layouts allow them."""
    saved = uninterrupted(before)
    resumed = pool_of(after)(load_and_run, after, *problem, saved.path)
    differences = differences_between(resumed, saved.ranks)
    if before == after:
        check_identical(resumed, saved.ranks)
        assert not any(differences.values()), differences
    assert differences["loss"] <= RELATIVE, differences
    assert differences["norm"] <= RELATIVE, differences
    assert differences["params"] <= ABSOLUTE, differences
    return differences


def differences_between(
    resumed: list[Continued], uninterrupted: list[Continued]
) -> dict[str, float]:
    losses = []
    norms = []
    rates = set()
    for step, expected in zip(resumed[0].steps, uninterrupted[0].steps, strict=True):
        assert step.lr == expected.lr
        rates.add(expected.lr)
        losses.append(abs(step.loss - expected.loss) / abs(expected.loss))
        norms.append(abs(step.grad_norm / expected.grad_norm - 1))
    assert len(rates) > 1
    params = assemble(shard for rank in resumed for shard in rank.params)
    expected_params = assemble(shard for rank in uninterrupted for shard in rank.params)
    return {
        "loss": largest(losses),
        "norm": largest(norms),
        "params": largest(
            float((params[name] - value).abs().max()) for name, value in expected_params.items()
        ),
    }


def check_identical(resumed: list[Continued], uninterrupted: list[Continued]) -> None:
    """Each rank has the same metrics and random numbers again, the latter of its own."""
    for rank, expected in zip(resumed, uninterrupted, strict=True):
        assert rank.steps == expected.steps
        assert rank.drawn == expected.drawn
    num_generators = len(uninterrupted[0].drawn)
    for generator in range(num_generators):
        drawn = {str(rank.drawn[generator]) for rank in uninterrupted}
        assert len(drawn) == len(uninterrupted)


@pytest.mark.parametrize(("before", "after"), ONCE, ids=label)
def test_a_run_goes_on_from_its_checkpoint(before, after, uninterrupted, problem, pool_of):
    check(before, after, uninterrupted, problem, pool_of)


@pytest.mark.matrix
@pytest.mark.parametrize(("before", "after"), MATRIX, ids=label)
def test_every_pair_of_layouts(before, after, uninterrupted, problem, pool_of, record_property):
    differences = check(before, after, uninterrupted, problem, pool_of)
    record_property("resume", (f"{label(before)}, then {label(after)}", differences))
