"""The FSDP2 backend against plain PyTorch, one sequence at a time, on one rank and on
two.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from nanoslime.algorithms.grpo import GRPO
from nanoslime.batch import Maximum, TokenMean, TrainBatch, WeightedMean
from nanoslime.config.algorithm import GRPOConfig
from nanoslime.config.model import ModelConfig
from nanoslime.config.rollout import RolloutConfig
from nanoslime.config.run import RunConfig
from nanoslime.config.training import TrainingConfig
from nanoslime.training.batching import BatchingOptions
from nanoslime.training.fsdp import FSDPBackend
from nanoslime.types import RunError, Sample, SampleGroup, Status
from tests.training.batches import make_train_batches
from tests.training.parity import grad_shards, values_of

TEMPERATURE = 0.8
VOCAB = 67  # odd, so that two ranks have unequal shares
FULL_GRPO = dict(use_kl_loss=True, kl_loss_coef=0.1, use_unbiased_kl=True)


@pytest.fixture(scope="session", params=[True, False], ids=["tied", "untied"])
def model_dir(request, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=request.param,
        initializer_range=0.2,
    )
    directory = tmp_path_factory.mktemp("qwen3")
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def run_config(training=(), algorithm=FULL_GRPO, dtype="float32"):
    knobs = dict(
        backend="fsdp",
        lr=1e-2,
        adam_eps=1e-3,
        weight_decay=0.1,
        clip_grad=0.5,
        lr_schedule="linear",
    )
    return RunConfig(
        model=ModelConfig(dtype=dtype),
        rollout=RolloutConfig(num_rollout=10),
        algorithm=GRPOConfig(**algorithm),
        training=TrainingConfig(**knobs | dict(training)),
    )


def steps(dp_size, max_tokens=40, num_steps=2):
    """[step][rank] of seven sequences in three groups, of 3 to 30 tokens."""
    rng = np.random.default_rng(0)
    groups = []
    rollout = 0
    for group_id, sizes in enumerate([(30, 3), (11, 9, 14), (5, 22)]):
        samples = []
        for length in sizes:
            mask = np.arange(length) >= max(1, length // 3)
            samples.append(
                Sample(
                    group_id=group_id,
                    rollout_id=rollout,
                    token_ids=rng.integers(0, VOCAB, length).astype(np.int32),
                    loss_mask=mask,
                    rollout_logprobs=np.where(mask, -3 + rng.normal(size=length), 0).astype(
                        np.float32
                    ),
                    policy_versions=[(0, 0)],
                    status=Status.COMPLETED,
                    advantage=float(rng.normal()),
                )
            )
            rollout += 1
        groups.append(SampleGroup(group_id, samples))
    options = BatchingOptions(
        num_steps=num_steps,
        dp_size=dp_size,
        max_tokens=max_tokens,
        denominator="sequences",
        temperature=TEMPERATURE,
    )
    return make_train_batches(groups, options)


def with_old_and_ref(shard: TrainBatch, of_policy, of_reference) -> TrainBatch:
    """Old logprobs a little off the policy's, by a rule that knows only the sequence; no
    ratio near a clip edge.
    """
    old = [
        lp + 0.05 * torch.sin(ids.float())
        for lp, ids in zip(of_policy, shard.token_ids, strict=True)
    ]
    return replace(shard, old_logprobs=old, ref_logprobs=of_reference)


# what runs on the ranks


def backend_on(env, config, model_dir):
    return FSDPBackend(config, Path(model_dir), env)


def pieces(shards):
    return [
        (s.name, s.full_shape, [(c.start, c.stop) for c in s.slices], s.tensor.clone())
        for s in shards
    ]


def train(env, config, model_dir, plan_by_step):
    """Two steps: logprobs, metrics and gradients of each, and the weights at the end."""
    backend = backend_on(env, config, model_dir)
    reports = []
    for shards in plan_by_step:
        shard = shards[env.rank]
        policy = backend.logprobs(shard, "policy")
        ref = backend.logprobs(shard, "ref")
        metrics = backend.train_step(with_old_and_ref(shard, policy, ref), GRPO(config.algorithm))
        reports.append((policy, ref, metrics, pieces(grad_shards(backend))))
    return reports, pieces(backend.weight_shards())


def whole(pieces_by_rank):
    """{name: full tensor}, put together from the pieces of all ranks; each element must
    be covered.
    """
    tensors = {}
    for name, shape, slices, piece in (p for pieces in pieces_by_rank for p in pieces):
        full = tensors.setdefault(name, torch.full(shape, torch.nan))
        full[tuple(slice(*s) for s in slices)] = piece
    assert not any(t.isnan().any() for t in tensors.values())
    return tensors


# plain PyTorch


def plain_logprobs(model, token_ids):
    logits = model(input_ids=token_ids[None]).logits[0, :-1] / TEMPERATURE
    return torch.cat([torch.zeros(1), logits.log_softmax(-1).gather(1, token_ids[1:, None])[:, 0]])


@torch.no_grad()
def plain_entropy(model, token_ids):
    log_p = (model(input_ids=token_ids[None]).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
    return torch.cat([torch.zeros(1), -(log_p.exp() * log_p).sum(-1)])


def plain_training(config, model_dir, plan_by_step):
    """The same in one process without FSDP, packing or sharding, in the classic way: one
    sequence after the other.
    """
    model, reference = (
        AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32) for _ in range(2)
    )
    knobs = config.training
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in model.parameters() if p.dim() > 1],
                "weight_decay": knobs.weight_decay,
            },
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(knobs.adam_beta1, knobs.adam_beta2),
        eps=knobs.adam_eps,
    )
    algorithm = GRPO(config.algorithm)
    reports = []
    for step, (shard,) in enumerate(plan_by_step):
        with torch.no_grad():
            policy = [plain_logprobs(model, ids) for ids in shard.token_ids]
            ref = [plain_logprobs(reference, ids) for ids in shard.token_ids]
        shard = with_old_and_ref(shard, policy, ref)
        optimizer.zero_grad()
        total = 0.0
        values = {}
        for i, ids in enumerate(shard.token_ids):
            logprobs = plain_logprobs(model, ids)
            entropy = plain_entropy(model, ids)
            loss, metrics = algorithm.loss(logprobs, entropy, shard.microbatch([i]))
            (loss / shard.denominator).backward()
            total += loss.item() / shard.denominator
            for name, metric in metrics.items():
                match metric:
                    case WeightedMean():
                        value = metric.total.item() / shard.denominator
                    case TokenMean():
                        value = metric.total.item() / shard.num_tokens
                    case Maximum():
                        continue
                values[name] = values.get(name, 0) + value
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), knobs.clip_grad).item()
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = knobs.lr * (
            1 - step / 10
        )
        optimizer.step()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        reports.append((policy, ref, (total, norm, values), grads))
    return reports, {name: p.detach() for name, p in model.named_parameters()}


def by_content(shards, per_sequence_by_rank):
    """{token ids: logprobs}, dummies left out, to compare whatever the layout."""
    return {
        tuple(ids.tolist()): lp
        for shard, per_sequence in zip(shards, per_sequence_by_rank, strict=True)
        for ids, mask, lp in zip(shard.token_ids, shard.loss_mask, per_sequence, strict=True)
        if mask.any()
    }


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("max_tokens", [1, 1000], ids=["one_by_one", "packed"])
def test_training_is_that_of_plain_pytorch(world_size, max_tokens, model_dir, one_rank, two_ranks):
    config = run_config()
    expected_reports, expected_weights = plain_training(config, model_dir, steps(1))
    plan_by_step = steps(world_size, max_tokens)
    by_rank = (one_rank, two_ranks)[world_size - 1](train, config, model_dir, plan_by_step)
    for step, (policy, ref, (loss, norm, values), grads) in enumerate(expected_reports):
        got = [reports[step] for reports, _ in by_rank]
        for mine, theirs in ((0, policy), (1, ref)):
            ours = by_content(plan_by_step[step], [report[mine] for report in got])
            for key, lp in by_content(steps(1)[step], [theirs]).items():
                torch.testing.assert_close(ours[key], lp, rtol=1e-5, atol=2e-5)
        for report in got:
            metrics = report[2]
            assert not metrics.skipped
            assert metrics.lr == pytest.approx(1e-2 * (1 - step / 10))
            assert metrics.loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
            assert metrics.grad_norm == pytest.approx(norm, rel=1e-5)
            for name in values:
                assert values_of(metrics)[name] == pytest.approx(
                    values[name], rel=1e-4, abs=1e-6
                ), name
        ours = whole([report[3] for report in got])
        assert ours.keys() == grads.keys()
        for name, grad in grads.items():
            assert (ours[name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name
    first_norm = expected_reports[0][2][1]
    assert first_norm > config.training.clip_grad  # so that clipping was compared as well
    weights = whole([weights for _, weights in by_rank])
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)


def test_a_pad_token_in_a_sequence_is_trained_as_any_other(model_dir, tmp_path, one_rank):
    """transformers would give the row of the pad token in the embedding no gradient."""
    shutil.copytree(model_dir, tmp_path / "padded")
    file = tmp_path / "padded" / "config.json"
    content = json.loads(file.read_text())
    [[shard]] = steps(1, num_steps=1)
    content["pad_token_id"] = int(shard.token_ids[0][0])
    file.write_text(json.dumps(content))
    gradients = []
    for directory in (model_dir, tmp_path / "padded"):
        [(reports, _)] = one_rank(train, run_config(), directory, [[shard]])
        gradients.append(whole([reports[0][3]])["model.embed_tokens.weight"])
    assert gradients[0][content["pad_token_id"]].any()
    assert torch.equal(*gradients)


def weights_at_start(env, config, model_dir):
    return pieces(backend_on(env, config, model_dir).weight_shards())


def test_weight_shards_are_the_tensors_of_the_files(model_dir, two_ranks):
    weights = whole(two_ranks(weights_at_start, run_config(), model_dir))
    files = load_file(model_dir / "model.safetensors")
    assert weights.keys() == files.keys()
    assert all(torch.equal(weights[name], files[name]) for name in files)


def reference_after_training(env, config, model_dir, plan_by_step):
    backend = backend_on(env, config, model_dir)
    shard = plan_by_step[0][env.rank]
    before = backend.logprobs(shard, "policy")
    backend.train_step(with_old_and_ref(shard, before, before), GRPO(config.algorithm))
    after = backend.logprobs(shard, "policy")
    return before, after, backend.logprobs(shard, "ref"), backend.logprobs(shard, "policy")


def test_reference_stays_and_the_policy_comes_back(model_dir, two_ranks):
    for before, after, ref, again in two_ranks(
        reference_after_training, run_config(), model_dir, steps(2)
    ):
        for a, b, c, d in zip(before, after, ref, again, strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)
        assert max((b - a).abs().max() for a, b in zip(before, after, strict=True)) > 1e-3


def step_with_nan(env, config, model_dir, plan_by_step):
    backend = backend_on(env, config, model_dir)
    start = pieces(backend.weight_shards())
    poisoned, healthy = (shards[env.rank] for shards in plan_by_step)
    if env.rank == 0:
        poisoned = replace(poisoned, advantages=[math.nan] * len(poisoned.advantages))
    outcomes = []
    for shard in (poisoned, healthy):
        old = backend.logprobs(shard, "policy")
        metrics = backend.train_step(replace(shard, old_logprobs=old), GRPO(config.algorithm))
        changed = any(
            not torch.equal(a[3], b[3])
            for a, b in zip(start, pieces(backend.weight_shards()), strict=True)
        )
        outcomes.append((metrics.skipped, changed))
    return outcomes


def test_one_ranks_nan_makes_all_skip_and_go_on(model_dir, two_ranks):
    config = run_config(algorithm={})
    assert (
        two_ranks(step_with_nan, config, model_dir, steps(2))
        == [[(True, False), (False, True)]] * 2
    )


def first_step_only(env, config, model_dir, plan_by_step, checkpoint):
    backend = backend_on(env, config, model_dir)
    _one_step(backend, config, plan_by_step[0][env.rank])
    backend.save(Path(checkpoint))
    torch.manual_seed(5)


def resumed_second_step(env, config, model_dir, plan_by_step, checkpoint):
    backend = backend_on(env, config, model_dir)
    backend.load(Path(checkpoint))
    metrics = _one_step(backend, config, plan_by_step[1][env.rank])
    return metrics, pieces(backend.weight_shards()), torch.initial_seed()


def _one_step(backend, config, shard):
    shard = with_old_and_ref(
        shard, backend.logprobs(shard, "policy"), backend.logprobs(shard, "ref")
    )
    return backend.train_step(shard, GRPO(config.algorithm))


def test_a_resumed_run_continues_exactly(model_dir, two_ranks, one_rank, tmp_path):
    config = run_config()
    uninterrupted = two_ranks(train, config, model_dir, steps(2))
    two_ranks(first_step_only, config, model_dir, steps(2), tmp_path)
    resumed = two_ranks(resumed_second_step, config, model_dir, steps(2), tmp_path)
    for (reports, weights), (metrics, resumed_weights, seed) in zip(
        uninterrupted, resumed, strict=True
    ):
        assert metrics == reports[1][2]
        assert all(torch.equal(a[3], b[3]) for a, b in zip(weights, resumed_weights, strict=True))
        assert seed != 5
    # and on another number of ranks, up to rounding
    (metrics, weights, _) = one_rank(resumed_second_step, config, model_dir, steps(1), tmp_path)[0]
    assert metrics.loss == pytest.approx(resumed[0][0].loss, rel=1e-5, abs=1e-6)
    expected = whole([weights for _, weights, _ in resumed])
    for name, value in whole([weights]).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


def test_recompute_changes_nothing(model_dir, two_ranks):
    plain = two_ranks(train, run_config(), model_dir, steps(2))
    recomputed = two_ranks(train, run_config(training={"recompute": True}), model_dir, steps(2))
    expected = whole([reports[0][3] for reports, _ in plain])
    for name, grad in whole([reports[0][3] for reports, _ in recomputed]).items():
        assert (grad - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


def logprobs_twice(env, config, model_dir):
    backend = backend_on(env, config, model_dir)
    shard = steps(1, num_steps=1)[0][0]
    return [backend.logprobs(shard, "policy") for _ in range(2)]


@pytest.mark.parametrize(
    ("family", "dropout"),
    [
        ("StableLm", {"hidden_dropout": 0.5}),  # a module
        ("Starcoder2", {"residual_dropout": 0.5, "embedding_dropout": 0.5}),  # a call of a function
    ],
)
def test_recomputing_drops_nothing_out(family, dropout, tmp_path, one_rank):
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, **dropout)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    [plain] = one_rank(logprobs_twice, run_config(algorithm={}), tmp_path)
    [recomputed] = one_rank(logprobs_twice, run_config({"recompute": True}, algorithm={}), tmp_path)
    for values in zip(*plain, *recomputed, strict=True):
        assert all(torch.equal(values[0], other) for other in values[1:])


# Its modules drop half of their input out, and no setting says so.
DROPPING_MODEL = """
import torch
from transformers import Qwen3ForCausalLM


class DroppingForCausalLM(Qwen3ForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.act_fn = torch.nn.Sequential(layer.mlp.act_fn, torch.nn.Dropout(0.5))
"""


def test_recomputing_drops_nothing_out_that_no_setting_names(model_dir, tmp_path, one_rank):
    shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "modeling_dropping.py").write_text(DROPPING_MODEL)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "modeling_dropping.DroppingForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = run_config({"recompute": True}, algorithm={})
    trusting = replace(config, model=replace(config.model, trust_remote_code=True))
    [plain] = one_rank(logprobs_twice, run_config(algorithm={}), model_dir)
    [recomputed] = one_rank(logprobs_twice, trusting, tmp_path)
    for values in zip(*plain, *recomputed, strict=True):
        assert all(torch.equal(values[0], other) for other in values[1:])


def test_bfloat16_computes_near_float32_with_float32_main_weights(model_dir, two_ranks):
    full = two_ranks(train, run_config(), model_dir, steps(2))
    half = two_ranks(train, run_config(dtype="bfloat16"), model_dir, steps(2))
    for (reports, _), (half_reports, weights) in zip(full, half, strict=True):
        gaps = [(a - b).abs().max() for a, b in zip(reports[0][0], half_reports[0][0], strict=True)]
        assert 1e-4 < max(gaps) < 0.3
        assert all(
            piece.dtype == torch.float32 for _, _, _, piece in (*weights, *half_reports[0][3])
        )


@pytest.fixture
def damaged(model_dir, tmp_path):
    """A copy of the model whose tensors were changed by the given function."""

    def make(change) -> Path:
        (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
        tensors = load_file(model_dir / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "has no model.norm.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "model.safetensors holds extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(5)}),
            r"model.norm.weight has shape \[5\].* \[32\]",
        ),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_files_that_do_not_fit_are_refused_by_name(change, message, damaged, one_rank):
    with pytest.raises(AssertionError, match=message):
        one_rank(weights_at_start, run_config(), damaged(change))


def reference_not_kept(env, config, model_dir, plan_by_step):
    backend_on(env, config, model_dir).logprobs(plan_by_step[0][0], "ref")


def test_reference_logprobs_need_a_reference(model_dir, one_rank):
    with pytest.raises(AssertionError, match="the algorithm needs no reference"):
        one_rank(reference_not_kept, run_config(algorithm={}), model_dir, steps(1))


@pytest.mark.parametrize(
    "field", ["tp_size", "pp_size", "vpp_size", "cp_size", "ep_size", "etp_size"]
)
def test_other_parallel_dimensions_are_refused(field, model_dir):
    with pytest.raises(
        RunError, match=f"training.{field}=2 needs --backend megatron; with fsdp set 1"
    ):
        FSDPBackend(run_config(training={field: 2}), model_dir, None)
