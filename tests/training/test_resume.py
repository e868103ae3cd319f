"""A run saved in one layout goes on in the same one bit for bit, in another one up to rounding.

Two steps, save, three more: what they give is compared with a new backend's, which has done a step of its
own, loads, and does the three. The learning rate warms up over the save and then follows a cosine. The table
that the matrix prints belongs into tests/RESULTS.md.
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
    Layout,
    assemble,
    copied,
    largest,
    train_batch,
)
from tests.training.rank_pool import leave_groups
from tests.training.reference import make_step

pytestmark = pytest.mark.megatron

BEFORE, AFTER = 2, 3  # steps
ALGORITHM = GRPOConfig(
    use_kl_loss=True, kl_loss_coef=0.1, eps_clip=0.99, eps_clip_high=10.0
)  # no clip edges
SCHEDULE = (("lr_schedule", "cosine"), ("lr_warmup_steps", 3), ("min_lr", 1e-4), ("clip_grad", 1.0))


def layout(
    backend: str = "megatron", tp: int = 1, pp: int = 1, dp: int = 1, **options: Any
) -> Layout:
    return Layout(backend, tp, pp, dp, options=(*SCHEDULE, *options.items()))


TP1, TP2, PP2, TP2_PP2 = layout(), layout(tp=2), layout(pp=2), layout(tp=2, pp=2)
SP2 = layout(tp=2, sequence_parallel=True)
DP2, DP2_SHARDED = layout(dp=2), layout(dp=2, distributed_optimizer=True)
TP2_DP2 = layout(tp=2, dp=2, distributed_optimizer=True)
TP1_SHARDED = layout(distributed_optimizer=True)
TP2_PP2_SHARDED = layout(tp=2, pp=2, distributed_optimizer=True)
FSDP1, FSDP2 = layout("fsdp"), layout("fsdp", dp=2)

ONCE = [(DP2_SHARDED, DP2_SHARDED), (TP2, TP1), (PP2, TP1)]
MATRIX = [
    *((same, same) for same in (TP1, TP2, SP2, PP2, DP2, TP2_PP2, TP2_DP2, FSDP1, FSDP2)),
    (DP2, TP1),
    (DP2_SHARDED, TP1_SHARDED),
    (TP2_PP2, DP2),
    (TP2_PP2_SHARDED, DP2_SHARDED),
    (TP2_DP2, TP1_SHARDED),
    (TP1, TP2),
    (TP2, PP2),
    (TP1, TP2_PP2),
    (FSDP2, FSDP1),
    (FSDP1, FSDP2),
]


def label(of: Layout) -> str:
    sizes = "" if of.backend == "fsdp" else f" TP{of.tp_size} PP{of.pp_size}"
    flags = [name for name, value in of.options if value is True]
    return " ".join([f"{of.backend}{sizes} DP{of.dp_size}", *flags])


# what runs on the ranks


def make(env: RankEnv, of: Layout, model_dir: Path) -> TrainBackend:
    return resolve(of.backend, BACKENDS, "backend")(of.config(), model_dir, env)


def draw(backend: TrainBackend, n: int) -> list[list[float]]:
    """The next random numbers, also of the generator that Megatron keeps for what differs over TP."""
    drawn = [torch.rand(n).tolist()]
    if type(backend).__name__ == "MegatronBackend":
        with get_cuda_rng_tracker().fork():
            drawn.append(torch.rand(n).tolist())
    return drawn


def go_on(
    backend: TrainBackend, steps: list[dict[str, Any]]
) -> tuple[list[Any], list[StepMetrics], list[Any]]:
    """What the random generators give next, the steps' metrics, and this rank's weights after them."""
    drawn = draw(backend, 4)
    batches = [train_batch(step, backend.dp_rank, backend.dp_size) for step in steps]
    done = [backend.train_step(batch, GRPO(ALGORITHM)) for batch in batches]
    return drawn, done, copied(backend.weight_shards())


def saved(
    env: RankEnv, of: Layout, model_dir: Path, steps: list[dict[str, Any]], path: Path
) -> Any:
    backend = make(env, of, model_dir)
    go_on(backend, steps[:BEFORE])
    draw(backend, 5 + env.rank)  # so that each rank's state is its own
    if env.rank == 0:
        path.mkdir()
    dist.barrier()
    backend.save(path)
    done = go_on(backend, steps[BEFORE:])
    del backend
    leave_groups()
    return done


def resumed(
    env: RankEnv, of: Layout, model_dir: Path, steps: list[dict[str, Any]], path: Path
) -> Any:
    backend = make(env, of, model_dir)
    go_on(backend, steps[-1:])
    backend.load(path)
    done = go_on(backend, steps[BEFORE:])
    del backend
    leave_groups()
    return done


# what is compared


@dataclass
class Saved:
    path: Path
    by_rank: list[Any]


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    model_dir = save_model(tmp_path_factory.mktemp("model"), "qwen3")
    return model_dir, [make_step(model_dir, number) for number in range(BEFORE + AFTER)]


@pytest.fixture(scope="module")
def pool_of(one_rank, two_ranks, request) -> Callable[[Layout], Any]:
    """Four ranks are started on need only."""
    few = {1: one_rank, 2: two_ranks}
    return lambda of: few.get(of.world_size) or request.getfixturevalue("four_ranks")


@pytest.fixture(scope="module")
def uninterrupted(problem, pool_of, tmp_path_factory) -> Callable[[Layout], Saved]:
    """By layout, each once: the checkpoint and the run that went on after it."""
    known: dict[Layout, Saved] = {}

    def get(of: Layout) -> Saved:
        if of not in known:
            path = tmp_path_factory.mktemp("saved") / "trainer"
            known[of] = Saved(path, pool_of(of)(saved, of, *problem, path))
        return known[of]

    return get


def check(
    before: Layout, after: Layout, uninterrupted: Any, problem: Any, pool_of: Any
) -> dict[str, float]:
    """The largest differences over the three steps; asserts that they are what the two layouts allow."""
    whole = uninterrupted(before)
    other = pool_of(after)(resumed, after, *problem, whole.path)
    (_, steps, _), (_, again, _) = whole.by_rank[0], other[0]
    assert [s.lr for s in again] == [s.lr for s in steps] and len({s.lr for s in steps}) > 1
    params, others = (
        assemble(p for *_, pieces in ranks for p in pieces) for ranks in (whole.by_rank, other)
    )
    found = {
        "loss": largest(
            abs(a.loss - b.loss) / abs(b.loss) for a, b in zip(again, steps, strict=True)
        ),
        "norm": largest(
            abs(a.grad_norm / b.grad_norm - 1) for a, b in zip(again, steps, strict=True)
        ),
        "params": largest(
            float((others[name] - value).abs().max()) for name, value in params.items()
        ),
    }
    if before == after:
        for (drawn, metrics, _), (drawn_again, metrics_again, _) in zip(
            whole.by_rank, other, strict=True
        ):
            assert metrics_again == metrics and drawn_again == drawn
        for of_generator in zip(*(drawn for drawn, *_ in whole.by_rank), strict=True):
            assert len({str(drawn) for drawn in of_generator}) == before.world_size
        assert not any(found.values()), found
    assert (
        found["loss"] <= RELATIVE and found["norm"] <= RELATIVE and found["params"] <= ABSOLUTE
    ), found
    return found


@pytest.mark.parametrize(("before", "after"), ONCE, ids=label)
def test_a_run_goes_on_from_its_checkpoint(before, after, uninterrupted, problem, pool_of):
    check(before, after, uninterrupted, problem, pool_of)


@pytest.mark.matrix
@pytest.mark.parametrize(("before", "after"), [*ONCE, *MATRIX], ids=label)
def test_every_pair_of_layouts(before, after, uninterrupted, problem, pool_of, record_property):
    found = check(before, after, uninterrupted, problem, pool_of)
    record_property("resume", (f"{label(before)}, then {label(after)}", found))
