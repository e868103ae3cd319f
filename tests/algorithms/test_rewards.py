"""Rewards to advantages by hand, and what is easily got wrong: groups that are told apart
by position rather than by group_id, and equal rewards whose mean is not exact.
"""

import numpy as np
import pytest

from nanoslime.algorithms.rewards import overlong_penalty, relative, spreads
from nanoslime.config.algorithm import CISPOConfig, GRPOConfig, GSPOConfig, ReinforcePPConfig
from nanoslime.types import SampleGroup
from tests.algorithms.made import advantages, algorithm, group


def test_with_std_it_is_the_reward_in_units_of_the_unbiased_std():
    # mean 0.5, sum of squares 1, std sqrt(1 / 3) = 0.577350
    assert relative([1, 0, 0, 1], by_std=True) == pytest.approx(
        [0.866024, -0.866024, -0.866024, 0.866024]
    )
    # mean 0.25, sum of squares 0.5625 + 3 x 0.0625 = 0.75, std sqrt(0.75 / 3) = 0.5
    first = relative([1, 0, 0, 0], by_std=True)[0]
    assert first == pytest.approx(0.75 / (0.5 + 1e-6), rel=1e-12)


def test_without_std_it_is_only_centred():
    assert relative([1, 0, 0, 0], by_std=False) == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("config", [GRPOConfig, GSPOConfig, CISPOConfig])
def test_the_group_relative_algorithms_take_std_on_or_off(config):
    groups = [group(0, [1.0, 0.0, 0.0, 0.0])]
    by_std = advantages(groups, algorithm(config()))
    assert by_std[0] == pytest.approx(1.5, rel=1e-5)  # 0.75 / 0.5
    centred = advantages(groups, algorithm(config(normalize_by_std=False)))
    assert centred[0] == 0.75


@pytest.mark.parametrize(
    "rewards",
    [[0.7] * 8, [float(np.float32(0.7))] * 8, [0.3] * 6, [0.1] * 16, [0.1] * 3, [1.0] * 4, [5.0]],
)
@pytest.mark.parametrize("by_std", [True, False])
def test_zero_variance_group_gets_exactly_zero(rewards, by_std):
    """By float32 means, 8 x 0.7 is 6e-8 off its mean: over std + 1e-6, that is 0.06."""
    assert relative(rewards, by_std=by_std) == [0.0] * len(rewards)
    assert not spreads(rewards)


def test_rewards_differ_by_their_unbiased_standard_deviation():
    """Of two rewards it is their distance over sqrt(2); the biased one would be half of it."""
    assert spreads([0.0, 1.5e-6]) and not spreads([0.0, 1.3e-6])
    assert relative([0.0, 1.5e-6], by_std=False) == pytest.approx([-0.75e-6, 0.75e-6])


def test_statistics_go_by_group_id_whatever_the_size_order_and_packaging_of_groups():
    one = group(1, [1.0, 0.0])
    two = group(2, [10.0, 20.0, 30.0])
    parts = [
        SampleGroup(2, two.samples[:1]),
        SampleGroup(1, one.samples[:1]),
        SampleGroup(2, two.samples[1:]),
        SampleGroup(1, one.samples[1:]),
    ]
    advantages(parts, algorithm())
    assert [s.advantage for s in one.samples] == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-5)
    assert [s.advantage for s in two.samples] == pytest.approx([-1, 0, 1], rel=1e-6)


def test_a_filtered_batch_is_not_one_group():
    """Groups of 3 and 1 are left of 2 x 4. As one group, the last would have -1.5."""
    left = [group(0, [1.0, 1.0, 1.0]), group(1, [0.0])]
    assert advantages(left, algorithm()) == [0.0] * 4


def test_fan_out_siblings_count_once():
    # rollouts 7 and 8 with rewards 1 and 0: mean 0.5, std sqrt(0.5); by samples the mean
    # would be 0.75
    got = advantages([group(0, [1, 1, 1, 0], rollout_ids=[7, 7, 7, 8])], algorithm())
    assert got == pytest.approx([0.5**0.5] * 3 + [-(0.5**0.5)], rel=1e-5)


def test_siblings_that_differ_in_reward_are_refused():
    with pytest.raises(ValueError, match="group 4, rollout 7.*share one reward"):
        advantages([group(4, [1, 0], rollout_ids=[7, 7])], algorithm())


@pytest.mark.parametrize("reward", [None, float("nan"), float("inf")])
def test_unusable_reward_is_refused_by_name(reward):
    with pytest.raises(ValueError, match="group 3.*reward"):
        advantages([group(3, [1.0, reward])], algorithm())


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, 0), (60, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (120, -1)],
)
def test_overlong_penalty_falls_linearly_over_the_buffer(length, expected):
    assert overlong_penalty(length, 100, 20, 1.0) == expected
    assert overlong_penalty(length, 100, 20, 3.0) == 3 * expected


def test_overlong_shaping_enters_the_advantage_and_not_the_reward():
    # of at most 10 tokens, with a buffer of 4: lengths 6, 8, 10, 10 lose 0, 0.5, 1, 1
    groups = [group(0, [1.0, 1.0, 1.0, 1.0], lengths=[6, 8, 10, 10])]
    made = algorithm(normalize_by_std=False, overlong_buffer=4, max_response_length=10)
    got = advantages(groups, made)
    assert got == [0.625, 0.125, -0.375, -0.375]  # 1, 0.5, 0, 0 less their mean 0.375
    assert groups[0].rewards == [1.0] * 4
    shaped = ReinforcePPConfig(overlong_buffer=4, overlong_penalty=2.0)
    got = advantages(groups, algorithm(shaped, max_response_length=10))
    assert got == [1.0, 0.0, -1.0, -1.0]


@pytest.mark.parametrize("lengths", [[2, 10, 6], [10, 2, 6]])
def test_of_siblings_the_longest_is_judged(lengths):
    groups = [group(0, [1.0, 1.0, 1.0], rollout_ids=[1, 1, 2], lengths=lengths)]
    made = algorithm(normalize_by_std=False, overlong_buffer=4, max_response_length=10)
    got = advantages(groups, made)
    assert got == [-0.5, -0.5, 0.5]  # shaped 0 and 1
