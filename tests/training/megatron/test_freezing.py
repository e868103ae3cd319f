"""With frozen parameters, several ranks make the same step as FSDP on one rank."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoslime.algorithms.grpo import GRPO
from nanoslime.batch import StepMetrics
from nanoslime.plugins import resolve
from nanoslime.training.backend import RankEnv
from tests.models.hf import save_model
from tests.training.parity import (
    BACKENDS,
    KL,
    CopiedShard,
    Layout,
    assemble,
    copied,
    train_batch,
)
from tests.training.rank_pool import RankPool
from tests.training.reference import make_step

pytestmark = pytest.mark.megatron

DISTRIBUTED = (("distributed_optimizer", True),)
RECOMPUTE = (("recompute", True),)
SOME = ("embed_tokens", r"layers\.0\.mlp", r"layers\.3\.self_attn", "model.norm")
FIRST_STAGE = ("embed_tokens", r"layers\.[01]\.")
ALL_BUT_EXPERTS = r"^(?!.*\.experts\.)"


@pytest.fixture(scope="module", params=["qwen3", "qwen3_untied"])
def model_dir(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), request.param)


@dataclass
class Step:
    """A step's metrics, and the weights before and after it: of one rank, or assembled."""

    before: Any
    metrics: StepMetrics
    after: Any


def frozen_step(
    env: RankEnv, layout: Layout, model_dir: Path, step: dict[str, Any], patterns: tuple[str, ...]
) -> Step:
    """Runs on one rank."""
    backend_class = resolve(layout.backend, BACKENDS, "backend")
    backend = backend_class(layout.config(freeze=list(patterns)), model_dir, env)
    before = copied(backend.weight_shards())
    batch = train_batch(step, backend.dp_rank, backend.dp_size, layout.sequences)
    metrics = backend.train_step(batch, GRPO(KL))
    return Step(before, metrics, copied(backend.weight_shards()))


def together(pool: RankPool, *arguments: Any) -> Step:
    """The step of all ranks."""
    ranks = pool(frozen_step, *arguments)
    for rank in ranks:
        assert rank.metrics == ranks[0].metrics
    return Step(
        before=assemble(shard for rank in ranks for shard in rank.before),
        metrics=ranks[0].metrics,
        after=assemble(shard for rank in ranks for shard in rank.after),
    )


def unchanged(step: Step) -> set[str]:
    return {name for name, value in step.before.items() if torch.equal(value, step.after[name])}


def assert_same_step(found: Step, expected: Step) -> None:
    assert found.metrics.grad_norm == pytest.approx(expected.metrics.grad_norm, rel=1e-5)
    for name, value in expected.after.items():
        torch.testing.assert_close(found.after[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("patterns", "layout"),
    [
        (SOME, Layout(tp_size=2, pp_size=2)),
        (SOME, Layout(tp_size=2, dp_size=2, options=DISTRIBUTED)),
        (SOME, Layout(backend="fsdp", dp_size=2)),
        (FIRST_STAGE, Layout(pp_size=2)),  # nothing to train on a stage
        (FIRST_STAGE, Layout(pp_size=2, options=RECOMPUTE)),
        (FIRST_STAGE, Layout(pp_size=2, vpp_size=2, sequences=1)),
        (FIRST_STAGE, Layout(pp_size=2, dp_size=2, options=DISTRIBUTED)),
    ],
    ids=str,
)
def test_in_any_layout_the_step_is_that_of_one_rank(
    patterns, layout, model_dir, one_rank, two_ranks, four_ranks
):
    step = make_step(model_dir, 0)
    pool = two_ranks if layout.world_size == 2 else four_ranks
    found = together(pool, layout, model_dir, step, patterns)
    expected = together(one_rank, Layout(backend="fsdp"), model_dir, step, patterns)
    assert found.metrics.grad_norm > 0
    assert found.before.keys() == expected.after.keys()
    assert unchanged(found) == unchanged(expected)
    num_frozen = {SOME: 1 + 3 + 6 + 1, FIRST_STAGE: 1 + 2 * 11}[patterns]
    assert len(unchanged(found)) == num_frozen
    assert_same_step(found, expected)


def test_a_megatron_tensor_frozen_in_part_is_refused_by_name(model_dir, one_rank):
    step = make_step(model_dir, 0)
    refused = (
        "selects a part of Megatron's decoder.layers.0.self_attention.linear_qkv.weight;"
        " freeze .*k_proj.weight, .*v_proj.weight as well"
    )
    with pytest.raises(AssertionError, match=refused):
        one_rank(frozen_step, Layout(), model_dir, step, ["q_proj"])


def test_one_expert_of_a_layer_is_refused_which_no_checkpoint_could_hold(one_rank, tmp_path):
    model_dir = save_model(tmp_path / "model", "qwen3_moe")
    step = make_step(model_dir, 0)
    refused = (
        "selects a part of Megatron's decoder.layers.1.mlp.experts.experts.linear_fc[12].weight;"
        " freeze .*1.mlp.experts.1.*_proj.weight, .* as well"
    )
    with pytest.raises(AssertionError, match=refused):
        one_rank(frozen_step, Layout(), model_dir, step, [r"layers\.1\..*experts\.0\."])


@dataclass
class Continued:
    """The step after a save or a load, on one rank."""

    metrics: StepMetrics
    after: list[CopiedShard]


def resumed(
    env: RankEnv, layout: Layout, model_dir: Path, path: Path, patterns: list[str]
) -> tuple[Continued, Continued]:
    """A step, save, a step; and in another backend load, a step. Runs on one rank."""
    backend_class = resolve(layout.backend, BACKENDS, "backend")
    config = layout.config(freeze=patterns)
    steps = [make_step(model_dir, number) for number in range(2)]

    first = backend_class(config, model_dir, env)
    batches = [train_batch(step, first.dp_rank, first.dp_size) for step in steps]
    first.train_step(batches[0], GRPO(KL))
    first.save(path)
    metrics = first.train_step(batches[1], GRPO(KL))
    uninterrupted = Continued(metrics, copied(first.weight_shards()))

    second = backend_class(config, model_dir, env)
    second.load(path)
    metrics = second.train_step(batches[1], GRPO(KL))
    return uninterrupted, Continued(metrics, copied(second.weight_shards()))


@pytest.mark.parametrize("options", [(), DISTRIBUTED], ids=["whole", "distributed"])
@pytest.mark.parametrize(
    ("family", "layout", "patterns"),
    [
        ("qwen3_moe", Layout(), [ALL_BUT_EXPERTS]),
        ("qwen3_moe", Layout(pp_size=2), [ALL_BUT_EXPERTS, r"layers\.[01]\."]),
        ("qwen3", Layout(pp_size=2), FIRST_STAGE),
        ("qwen3_untied", Layout(pp_size=2), (r"layers\.[23]\.", "model.norm", "lm_head")),
    ],
)
def test_what_has_nothing_to_train_is_saved_and_loaded(
    family, layout, patterns, options, one_rank, two_ranks, tmp_path
):
    model_dir = save_model(tmp_path / "model", family)
    path = tmp_path / "saved"
    path.mkdir()
    pool = two_ranks if layout.world_size > 1 else one_rank
    ranks = pool(resumed, replace(layout, options=options), model_dir, path, list(patterns))
    for uninterrupted, continued in ranks:
        assert continued.metrics == uninterrupted.metrics
        for found, expected in zip(continued.after, uninterrupted.after, strict=True):
            assert torch.equal(values_of(found), values_of(expected))


def values_of(shard: CopiedShard) -> Tensor:
    _, _, _, values = shard
    return values


@pytest.mark.parametrize("frozen", [r"mlp\.gate\.", r"\.experts\.", r"layers\.[01]\..*experts"])
def test_experts_and_their_routers_can_be_frozen(frozen, two_ranks, one_rank, tmp_path):
    model_dir = save_model(tmp_path, "qwen3_moe")
    step = make_step(model_dir, 0)
    distributed = Layout(dp_size=2, options=(("ep_size", 2), *DISTRIBUTED))
    found = together(two_ranks, distributed, model_dir, step, [frozen])
    selected = {name for name in found.before if re.search(frozen, name)}
    assert selected
    assert unchanged(found) == selected
    expected = together(one_rank, Layout(), model_dir, step, [frozen])
    assert_same_step(found, expected)
