"""What all algorithms share, by hand: masks and weights, old logprobs, KL in loss and
reward, entropy.
"""

import math

import pytest
import torch

from nanoslime.algorithms.policy_gradient import PolicyGradient, whitened
from nanoslime.batch import TokenMean
from nanoslime.config.algorithm import CISPOConfig, GRPOConfig, ReinforcePPConfig
from tests.algorithms.made import algorithm, loss, pack, shard


def test_weights_and_mask_choose_the_terms():
    batch = pack(
        [-1.0] * 4, [1.0, 2.0, 4.0, 8.0], mask=[False, True, True, True], weights=[1, 1, 0.5, 0.25]
    )
    total, grad, metrics = loss([-1.0] * 4, batch)
    assert total == pytest.approx(-(2 + 2 + 2))
    assert metrics["train/policy_loss"] == pytest.approx(total)
    assert grad == pytest.approx([0, -2, -2, -2])


def test_moves_are_measured_by_absolute_value_over_the_tokens_of_the_loss():
    batch = pack([-1.0] * 3, [0.0] * 3, mask=[False, True, True], weights=[0.1] * 3)
    _, _, metrics = loss([5.0, -0.7, -1.4], batch)
    assert metrics["train/ppo_kl_abs"] == pytest.approx(0.3 + 0.4)
    # The move of -0.4 counts; the largest value is 0.3.
    assert metrics["train/ppo_kl_abs_max"] == pytest.approx(0.4)


# old logprobs


def test_old_logprobs_are_recomputed_the_rollouts_or_current():
    batch = pack([-1.2], [1.0], rollout=[-1.1])
    assert loss([-1.0], batch, eps_clip=0.9)[0] == pytest.approx(-math.exp(0.2))
    assert loss([-1.0], batch, eps_clip=0.9, old_logprobs="rollout")[0] == pytest.approx(
        -math.exp(0.1)
    )
    total, grad, metrics = loss([-1.0], batch, old_logprobs="current")
    assert (total, grad) == (-1.0, [-1.0])
    assert metrics["train/ppo_kl_abs"] == 0
    needs = [
        algorithm(old_logprobs=old).needs_old_logprobs
        for old in ("recomputed", "rollout", "current")
    ]
    assert needs == [True, False, False]


def test_missing_tensors_are_named():
    batch = pack([-1.0], [1.0])
    with pytest.raises(ValueError, match="no ref_logprobs.*use_kl_loss=True"):
        loss([-1.0], batch, use_kl_loss=True)
    batch.old_logprobs = None
    with pytest.raises(ValueError, match="no old_logprobs"):
        loss([-1.0], batch)
    with pytest.raises(ValueError, match="no ref_logprobs"):
        algorithm(kl_coef=0.1).token_advantages(shard([[True]], [1.0], old=[[0.0]]), lambda x: x)


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
    batch = pack([-1.0], [0.0], ref=[-1.5])
    total, grad, metrics = loss(
        [-1.0], batch, use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type=kind
    )
    assert total == pytest.approx(0.1 * value, rel=1e-5)
    assert grad == pytest.approx([0.1 * gradient], rel=1e-5)
    assert metrics["train/kl_loss"] == pytest.approx(value, rel=1e-5)
    assert metrics["train/ref_kl"] == pytest.approx(math.exp(-0.5) - 0.5, rel=1e-5)  # always k3


def test_unbiased_kl_is_weighted_by_the_ratio_and_its_gradient():
    batch = pack([-1.2], [0.0], ref=[-1.5])
    total, grad, _ = loss([-1.0], batch, use_kl_loss=True, kl_loss_coef=1.0, use_unbiased_kl=True)
    ratio = math.exp(0.2)
    kl = math.exp(-0.5) - 0.5
    assert total == pytest.approx(ratio * kl, rel=1e-5)
    assert grad == pytest.approx([ratio * (1 - math.exp(-0.5)) + ratio * kl], rel=1e-5)


# KL in the reward


def test_kl_in_the_reward_lowers_the_token_advantages():
    batch = shard(
        [[False, True, False]],
        [2.0],
        old=[[0.0, -1.0, float("nan")]],
        ref=[[0.0, -1.5, -1.0]],
        rollout=[[0.0, -1.1, 0.0]],
    )

    def got(**knobs):
        made = algorithm(**knobs)
        assert made.needs_reference == (knobs["kl_coef"] > 0)
        return made.token_advantages(batch, lambda x: x)[0].tolist()

    assert got(kl_coef=0.0) == [0, 2, 0]
    assert got(kl_coef=0.1, kl_loss_type="k1") == pytest.approx([0, 2 - 0.05, 0])
    assert got(kl_coef=0.1, kl_loss_type="k2") == pytest.approx([0, 2 - 0.0125, 0])
    assert got(kl_coef=0.1, kl_loss_type="k3") == pytest.approx(
        [0, 2 - 0.1 * (math.exp(-0.5) - 0.5), 0]
    )
    assert got(kl_coef=0.1, kl_loss_type="k1", old_logprobs="rollout") == pytest.approx(
        [0, 2 - 0.04, 0]
    )


@pytest.mark.parametrize("config", [GRPOConfig, ReinforcePPConfig])
def test_a_masked_token_gives_no_kl_whatever_its_gap(config):
    """Neither to its own advantage nor, by the returns, to those before it."""
    huge = -1e4
    batch = shard([[False, True, False, True]], [2.0], old=[[huge, 0, huge, 0]], ref=[[0.0] * 4])
    for kind in ("k1", "k2", "k3", "low_var_kl"):
        knobs = dict(kl_coef=0.1, kl_loss_type=kind, normalize_advantages=False)
        [found] = algorithm(config(**knobs)).token_advantages(batch, lambda x: x)
        assert found.tolist() == [0, 2, 0, 2], kind


def test_whitening_adds_its_epsilon_to_the_variance():
    """1e-8, which matters beside a variance of as little as 1e-9."""
    value = (1e-9 / 2) ** 0.5
    masks = [torch.tensor([False, True]), torch.tensor([False, True])]
    values = [torch.tensor([9.0, value]), torch.tensor([9.0, -value])]
    first, second = whitened(values, masks, lambda x: x)
    assert first.tolist() == pytest.approx([0.0, value / 1.1e-8**0.5], rel=1e-5)
    assert second.tolist() == pytest.approx([0.0, -value / 1.1e-8**0.5], rel=1e-5)


def test_kl_in_the_reward_is_not_in_the_loss_as_well():
    batch = pack([-1.0], [1.0], ref=[-1.5])
    assert loss([-1.0], batch, kl_coef=0.1)[0] == pytest.approx(-1.0)


# entropy


@pytest.mark.parametrize("config", [None, CISPOConfig(entropy_coef=0.1)])
def test_entropy_is_a_bonus(config):
    made = algorithm(config, entropy_coef=0.1)
    nan = float("nan")
    batch = pack([0.0] * 3, [0.0] * 3, mask=[False, True, True], weights=[1.0, 0.5, 0.5])
    entropy = torch.tensor([nan, 2.0, 4.0], requires_grad=True)
    total, metrics = made.loss(torch.zeros(3), entropy, batch)
    total.backward()
    assert total.item() == pytest.approx(-0.1 * (1 + 2))
    assert entropy.grad.tolist() == pytest.approx([0.0, -0.05, -0.05])
    assert metrics["train/entropy"] == TokenMean(torch.tensor(6.0), torch.tensor(2))


def test_without_the_bonus_the_entropy_is_only_measured():
    entropy = torch.tensor([2.0, 4.0], requires_grad=True)
    logprobs = torch.zeros(2, requires_grad=True)
    total, metrics = algorithm().loss(logprobs, entropy, pack([0.0] * 2, [1.0] * 2))
    total.backward()
    assert entropy.grad is None and total.item() == -2
    assert metrics["train/entropy"] == TokenMean(torch.tensor(6.0), torch.tensor(2))


def test_the_signed_move_of_the_policy_may_cancel_out():
    metrics = loss([-1.0, -2.0], pack([-1.5, -1.5], [1.0] * 2))[2]
    assert (metrics["train/ppo_kl_k1"], metrics["train/ppo_kl_abs"]) == (0, 1)
    assert loss([-2.0], pack([-1.5], [1.0]))[2]["train/ppo_kl_k1"] == 0.5  # old - current


def test_an_algorithm_says_what_it_needs():
    made: PolicyGradient = algorithm(denominator="sequences")
    assert made.config.denominator == "sequences"
    assert not made.needs_reference
    assert made.needs_old_logprobs
