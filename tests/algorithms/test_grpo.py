"""GRPO by hand: small numbers worked out on paper, one property each."""

import math

import numpy as np
import pytest
import torch

from nanoslime import algorithms
from nanoslime.algorithms.grpo import GRPO, clipped_policy_loss
from nanoslime.batch import MicroBatch, TrainBatch
from nanoslime.config.algorithm import GRPOConfig
from nanoslime.types import Sample, SampleGroup, Status


def group(group_id, rewards, rollout_ids=None):
    rollout_ids = rollout_ids or range(100 * group_id, 100 * group_id + len(rewards))
    samples = [
        Sample(
            group_id=group_id,
            rollout_id=rollout_id,
            token_ids=np.arange(3, dtype=np.int32),
            loss_mask=np.array([False, True, True]),
            rollout_logprobs=np.array([0, -1, -1], dtype=np.float32),
            policy_versions=[(0, 0)],
            status=Status.COMPLETED,
            reward=reward,
        )
        for rollout_id, reward in zip(rollout_ids, rewards, strict=True)
    ]
    return SampleGroup(group_id, samples)


def advantages(groups, **knobs):
    GRPO(GRPOConfig(**knobs)).advantages(groups)
    return [s.advantage for g in groups for s in g.samples]


def batch(logp_old, advantage, *, mask=None, weights=None, ref=None, rollout=None):
    """One sequence on the token axis."""
    size = len(logp_old)
    return MicroBatch(
        token_ids=torch.arange(size),
        positions=torch.arange(size),
        cu_seqlens=torch.tensor([0, size], dtype=torch.int32),
        loss_mask=torch.tensor(mask or [True] * size),
        token_weights=torch.tensor(weights or [1.0] * size),
        advantages=torch.tensor(advantage),
        rollout_logprobs=torch.tensor(rollout or [0.0] * size),
        old_logprobs=torch.tensor(logp_old),
        ref_logprobs=None if ref is None else torch.tensor(ref),
        temperature=1.0,
        denominator=1.0,
    )


def loss(current, micro, **knobs):
    current = torch.tensor(current, requires_grad=True)
    total, metrics = GRPO(GRPOConfig(**knobs)).loss(current, None, micro)
    total.backward()
    return total.item(), current.grad.tolist(), {k: float(v) for k, v in metrics.items()}


# advantages


def test_advantage_is_the_reward_in_units_of_the_unbiased_std():
    a = 0.866024
    assert advantages([group(0, [1, 0, 0, 1])]) == pytest.approx([a, -a, -a, a], abs=1e-6)
    assert advantages([group(0, [1, 0, 0, 0])])[0] == pytest.approx(0.75 / (0.5 + 1e-6), rel=1e-12)


def test_without_std_it_is_only_centred():
    assert advantages([group(0, [1, 0, 0, 0])], normalize_by_std=False) == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("rewards", [[0.7] * 8, [0.3] * 6, [0.1] * 16, [0.1] * 3, [1.0] * 4, [5.0]])
@pytest.mark.parametrize("by_std", [True, False])
def test_equal_rewards_give_exactly_zero(rewards, by_std):
    assert advantages([group(0, rewards)], normalize_by_std=by_std) == [0.0] * len(rewards)


def test_groups_are_told_apart_by_id_whatever_their_size_or_order():
    one, two = group(1, [1.0, 0.0]), group(2, [10.0, 20.0, 30.0])
    parts = [
        SampleGroup(2, two.samples[:1]),
        SampleGroup(1, one.samples[:1]),
        SampleGroup(2, two.samples[1:]),
        SampleGroup(1, one.samples[1:]),
    ]
    advantages(parts)
    assert [s.advantage for s in one.samples] == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-5)
    assert [s.advantage for s in two.samples] == pytest.approx([-1, 0, 1], rel=1e-6)


def test_siblings_of_one_rollout_count_once():
    got = advantages([group(0, [1, 1, 1, 0], rollout_ids=[7, 7, 7, 8])])
    assert got == pytest.approx([0.5**0.5] * 3 + [-(0.5**0.5)], rel=1e-5)


def test_siblings_that_differ_in_reward_are_refused():
    with pytest.raises(ValueError, match="group 4, rollout 7.*share one reward"):
        advantages([group(4, [1, 0], rollout_ids=[7, 7])])


@pytest.mark.parametrize("reward", [None, float("nan"), float("inf")])
def test_unusable_reward_is_refused_by_name(reward):
    with pytest.raises(ValueError, match="group 3.*reward"):
        advantages([group(3, [1.0, reward])])


# the policy loss


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected", "gradient", "clipped"),
    [
        (2.0, 1.1, -2.2, -2.2, 0),  # inside
        (2.0, 1.5, -2.4, 0.0, 1),  # good and already likelier: held at 1.2
        (2.0, 0.5, -1.0, -1.0, 0),  # good and less likely: pulled back without limit
        (-2.0, 0.5, 1.6, 0.0, 1),  # bad and already less likely: held at 0.8
        (-2.0, 1.5, 3.0, 3.0, 0),  # bad and likelier: pushed down without limit
        (-2.0, 0.9, 1.8, 1.8, 0),
    ],
)
def test_clip_on_both_sides_with_both_signs(advantage, ratio, expected, gradient, clipped):
    total, grad, metrics = loss([math.log(ratio) - 1], batch([-1.0], [advantage]))
    assert total == pytest.approx(expected, rel=1e-5)
    assert grad == pytest.approx([gradient], rel=1e-5)
    assert metrics["train/clip_ratio"] == clipped
    assert metrics["train/ppo_kl_abs"] == pytest.approx(abs(math.log(ratio)), rel=1e-5)
    assert metrics["max:train/ppo_kl_abs_max"] == pytest.approx(abs(math.log(ratio)), rel=1e-5)


def test_clip_higher_moves_the_upper_edge_only():
    ratio, ones = torch.tensor([1.25, 0.7]), torch.tensor([1.0, -1.0])
    terms, clipped = clipped_policy_loss(ratio, ones, 0.2, 0.28)
    assert terms.tolist() == pytest.approx([-1.25, 0.8]) and clipped.tolist() == [False, True]
    total, _, _ = loss([math.log(1.25)], batch([0.0], [1.0]), eps_clip_high=0.28)
    assert total == pytest.approx(-1.25)
    total, _, _ = loss([math.log(1.5)], batch([0.0], [1.0]), eps_clip_high=0.28)
    assert total == pytest.approx(-1.28)


def test_old_logprobs_are_the_recomputed_or_the_rollouts():
    micro = batch([-1.0], [1.0], rollout=[-1.1])
    assert loss([-1.0], micro)[0] == pytest.approx(-1.0)
    assert loss([-1.0], micro, use_rollout_logprobs=True)[0] == pytest.approx(-math.exp(0.1))
    assert GRPO(GRPOConfig()).needs_old_logprobs
    assert not GRPO(GRPOConfig(use_rollout_logprobs=True)).needs_old_logprobs


def test_weights_and_mask_choose_the_terms():
    micro = batch([-1.0] * 4, [1.0, 2.0, 4.0, 8.0], mask=[False, True, True, True], weights=[1, 1, 0.5, 0.25])
    total, grad, metrics = loss([-1.0] * 4, micro)
    assert total == pytest.approx(-(2 + 2 + 2)) and metrics["train/policy_loss"] == pytest.approx(total)
    assert grad == pytest.approx([0, -2, -2, -2])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "low_var_kl"])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 1e4])
def test_masked_tokens_contribute_nothing_whatever_they_hold(kind, bad):
    mask, weights = [False, True], [bad, 1.0]
    micro = batch([bad, -1.0], [bad, 1.0], mask=mask, weights=weights, ref=[bad, -1.2], rollout=[bad, -1.0])
    clean = batch([-1.0], [1.0], ref=[-1.2], rollout=[-1.0])
    knobs = dict(use_kl_loss=True, kl_loss_coef=0.5, kl_loss_type=kind, use_unbiased_kl=True)
    total, grad, metrics = loss([bad, -0.9], micro, **knobs)
    expected, expected_grad, expected_metrics = loss([-0.9], clean, **knobs)
    assert total == expected and grad == [0.0, *expected_grad] and metrics == expected_metrics


# KL in the loss


@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [
        ("k1", 0.5, 1.0),
        ("k2", 0.125, 0.5),
        ("k3", math.exp(-0.5) - 0.5, 1 - math.exp(-0.5)),
        ("low_var_kl", math.exp(-0.5) - 0.5, 1 - math.exp(-0.5)),
    ],
)
def test_kl_loss_is_added_with_its_coefficient(kind, value, gradient):
    micro = batch([-1.0], [0.0], ref=[-1.5])
    total, grad, metrics = loss([-1.0], micro, use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type=kind)
    assert total == pytest.approx(0.1 * value, rel=1e-5) and grad == pytest.approx([0.1 * gradient], rel=1e-5)
    assert metrics["train/kl_loss"] == pytest.approx(value, rel=1e-5)
    assert metrics["train/ref_kl"] == pytest.approx(math.exp(-0.5) - 0.5, rel=1e-5)  # always k3


def test_unbiased_kl_is_weighted_by_the_ratio_and_its_gradient():
    micro = batch([-1.2], [0.0], ref=[-1.5])
    knobs = dict(use_kl_loss=True, kl_loss_coef=1.0, use_unbiased_kl=True)
    total, grad, _ = loss([-1.0], micro, **knobs)
    ratio, kl = math.exp(0.2), math.exp(-0.5) - 0.5
    assert total == pytest.approx(ratio * kl, rel=1e-5)
    assert grad == pytest.approx([ratio * (1 - math.exp(-0.5)) + ratio * kl], rel=1e-5)


def test_missing_logprobs_are_named():
    micro = batch([-1.0], [1.0])
    with pytest.raises(ValueError, match="ref_logprobs"):
        loss([-1.0], micro, use_kl_loss=True)
    micro.old_logprobs = None
    with pytest.raises(ValueError, match="old_logprobs"):
        loss([-1.0], micro)


# KL in the reward


def train_batch(old, ref, rollout, mask, advantage):
    return TrainBatch(
        token_ids=[torch.arange(len(old))],
        loss_mask=[torch.tensor(mask)],
        rollout_logprobs=[torch.tensor(rollout)],
        advantages=[advantage],
        token_weights=[1.0],
        microbatches=[[0]],
        denominator=1.0,
        num_tokens=1,
        num_sequences=1,
        temperature=1.0,
        old_logprobs=[torch.tensor(old)],
        ref_logprobs=[torch.tensor(ref)],
    )


def test_kl_in_the_reward_lowers_the_token_advantages():
    old, ref, rollout = [0.0, -1.0, float("nan")], [0.0, -1.5, -1.0], [0.0, -1.1, 0.0]
    shard = train_batch(old, ref, rollout, mask=[False, True, False], advantage=2.0)

    def got(**knobs):
        algorithm = GRPO(GRPOConfig(**knobs))
        assert algorithm.needs_reference == (knobs["kl_coef"] > 0)
        return algorithm.token_advantages(shard, lambda x: x)[0].tolist()

    assert got(kl_coef=0.0) == [0, 2, 0]
    assert got(kl_coef=0.1, kl_loss_type="k1") == pytest.approx([0, 2 - 0.05, 0])
    assert got(kl_coef=0.1, kl_loss_type="k3") == pytest.approx([0, 2 - 0.1 * (math.exp(-0.5) - 0.5), 0])
    assert got(kl_coef=0.1, kl_loss_type="k1", use_rollout_logprobs=True) == pytest.approx([0, 2 - 0.04, 0])


def test_kl_in_the_reward_is_not_in_the_loss_as_well():
    micro = batch([-1.0], [1.0], ref=[-1.5])
    assert loss([-1.0], micro, kl_coef=0.1)[0] == pytest.approx(-1.0)


# the table


def test_table_makes_what_the_config_names():
    made = algorithms.make(GRPOConfig(denominator="sequences"))
    assert isinstance(made, GRPO) and made.denominator == "sequences"
