"""CISPO by hand: the weight is clipped and has no gradient, and no token loses its own."""

import math

import pytest

from nanoslime.config.algorithm import CISPOConfig
from tests.algorithms.made import algorithm, loss, pack


@pytest.mark.parametrize(
    ("advantage", "ratio", "weight"),
    [(2.0, 1.1, 1.1), (2.0, 1.5, 1.2), (2.0, 0.1, 0.1), (-2.0, 0.1, 0.1), (-2.0, 1.5, 1.2)],
)
def test_the_gradient_is_the_clipped_weight_times_the_advantage(advantage, ratio, weight):
    old = -1.0
    current = math.log(ratio) - 1
    total, grad, metrics = loss([current], pack([old], [advantage]), algorithm(CISPOConfig()))
    assert total == pytest.approx(-weight * advantage * current, rel=1e-5)
    assert grad == pytest.approx([-weight * advantage], rel=1e-5)
    assert metrics["train/clip_ratio"] == (weight != ratio)
    assert metrics["train/clip_high_ratio"] == (weight < ratio)
    assert metrics["train/clip_low_ratio"] == 0


def test_a_lower_bound_may_be_set():
    made = algorithm(CISPOConfig(eps_clip=0.3))
    _, grad, metrics = loss([math.log(0.1)], pack([0.0], [1.0]), made)
    assert grad == pytest.approx([-0.7])
    assert metrics["train/clip_ratio"] == metrics["train/clip_low_ratio"] == 1
