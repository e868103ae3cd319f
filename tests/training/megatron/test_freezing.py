"""Frozen parameters where the model lies on several ranks: the same step as FSDP on one rank."""

import re
from dataclasses import replace

import pytest
import torch

from nanoslime.algorithms.grpo import GRPO
from nanoslime.plugins import resolve
from tests.models.hf import save_model
from tests.training.parity import BACKENDS, KL, Layout, assemble, copied, train_batch
from tests.training.reference import make_step

pytestmark = pytest.mark.megatron
DISTRIBUTED = (("distributed_optimizer", True),)
RECOMPUTE = (("recompute", True),)
SOME = ("embed_tokens", r"layers\.0\.mlp", r"layers\.3\.self_attn", "model.norm")
FIRST_STAGE = ("embed_tokens", r"layers\.[01]\.")


@pytest.fixture(scope="module", params=["qwen3", "qwen3_untied"])
def model_dir(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), request.param)


def frozen_step(env, layout, model_dir, step, patterns):
    """On one rank: weights, metrics of a step, weights after it."""
    make = resolve(layout.backend, BACKENDS, "backend")
    backend = make(layout.config(freeze=list(patterns)), model_dir, env)
    before = copied(backend.weight_shards())
    batch = train_batch(step, backend.dp_rank, backend.dp_size, layout.sequences)
    metrics = backend.train_step(batch, GRPO(KL))
    return before, metrics, copied(backend.weight_shards())


def together(pool, *arguments):
    results = pool(frozen_step, *arguments)
    whole = [assemble(piece for result in results for piece in result[i]) for i in (0, 2)]
    assert all(result[1] == results[0][1] for result in results)
    return *whole, results[0][1]


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
    step, pool = make_step(model_dir, 0), {2: two_ranks, 4: four_ranks}[layout.world_size]
    before, after, metrics = together(pool, layout, model_dir, step, patterns)
    _, expected, alone = together(one_rank, Layout(backend="fsdp"), model_dir, step, patterns)
    assert metrics.grad_norm == pytest.approx(alone.grad_norm, rel=1e-5) and metrics.grad_norm > 0
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if torch.equal(before[name], expected[name])}
    assert len(still) == {SOME: 1 + 3 + 6 + 1, FIRST_STAGE: 1 + 2 * 11}[patterns]
    for name in before:
        torch.testing.assert_close(after[name], expected[name], rtol=0, atol=1e-5)


def test_a_megatron_tensor_frozen_in_part_is_refused_by_name(model_dir, one_rank):
    part = "selects a part of Megatron's decoder.layers.0.self_attention.linear_qkv.weight"
    with pytest.raises(
        AssertionError, match=rf"{part}; freeze .*k_proj.weight, .*v_proj.weight as well"
    ):
        one_rank(frozen_step, Layout(), model_dir, make_step(model_dir, 0), ["q_proj"])


def test_one_expert_of_a_layer_is_refused_which_no_checkpoint_could_hold(one_rank, tmp_path):
    model_dir = save_model(tmp_path / "model", "qwen3_moe")
    part = "selects a part of Megatron's decoder.layers.1.mlp.experts.experts.linear_fc[12].weight"
    with pytest.raises(
        AssertionError, match=rf"{part}; freeze .*1.mlp.experts.1.*_proj.weight, .* as well"
    ):
        one_rank(
            frozen_step,
            Layout(),
            model_dir,
            make_step(model_dir, 0),
            [r"layers\.1\..*experts\.0\."],
        )


def resumed(env, layout, model_dir, tmp, patterns):
    """On one rank, the weights after: a step, save, a step; and load of that in another backend, a step."""
    make, results = resolve(layout.backend, BACKENDS, "backend"), []
    for number in range(2):
        backend = make(layout.config(freeze=patterns), model_dir, env)
        batches = [
            train_batch(make_step(model_dir, i), backend.dp_rank, backend.dp_size) for i in range(2)
        ]
        if number:
            backend.load(tmp)
        else:
            backend.train_step(batches[0], GRPO(KL))
            backend.save(tmp)
        metrics = backend.train_step(batches[1], GRPO(KL))
        results.append((metrics, copied(backend.weight_shards())))
    return results


ALL_BUT_EXPERTS = r"^(?!.*\.experts\.)"


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
    model_dir, saved = save_model(tmp_path / "model", family), tmp_path / "saved"
    saved.mkdir()
    pool = two_ranks if layout.world_size > 1 else one_rank
    results = pool(resumed, replace(layout, options=options), model_dir, saved, list(patterns))
    for (metrics, expected), (again, found) in results:
        assert again == metrics
        assert all(torch.equal(a[3], b[3]) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("frozen", [r"mlp\.gate\.", r"\.experts\.", r"layers\.[01]\..*experts"])
def test_experts_and_their_routers_can_be_frozen(frozen, two_ranks, one_rank, tmp_path):
    model_dir = save_model(tmp_path, "qwen3_moe")
    split = Layout(dp_size=2, options=(("ep_size", 2), *DISTRIBUTED))
    step = make_step(model_dir, 0)
    before, after, metrics = together(two_ranks, split, model_dir, step, [frozen])
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if re.search(frozen, name)} and still
    _, expected, alone = together(one_rank, Layout(), model_dir, step, [frozen])
    assert metrics.grad_norm == pytest.approx(alone.grad_norm, rel=1e-5)
    for name in before:
        torch.testing.assert_close(after[name], expected[name], rtol=0, atol=1e-5)
