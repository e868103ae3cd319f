"""The clipped policy loss by hand: both edges with both signs, clip-higher, dual clip."""

import math

import pytest
import torch

from nanoslime.algorithms.grpo import clipped_policy_loss
from nanoslime.config.algorithm import (
    GRPOConfig,
    ReinforcePPBaselineConfig,
    ReinforcePPConfig,
    RLOOConfig,
)
from tests.algorithms.made import algorithm, loss, pack


@pytest.mark.parametrize(
    "config", [GRPOConfig, RLOOConfig, ReinforcePPConfig, ReinforcePPBaselineConfig]
)
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
def test_clip_on_both_sides_with_both_signs(config, advantage, ratio, expected, gradient, clipped):
    total, grad, metrics = loss(
        [math.log(ratio) - 1], pack([-1.0], [advantage]), algorithm(config(eps_clip=0.2))
    )
    assert total == pytest.approx(expected, rel=1e-5)
    assert grad == pytest.approx([gradient], rel=1e-5)
    assert metrics["train/clip_ratio"] == clipped
    assert metrics["train/clip_low_ratio"] == (clipped and ratio < 1)
    assert metrics["train/clip_high_ratio"] == (clipped and ratio > 1)


def test_clip_higher_moves_the_upper_edge_only():
    ratio = torch.tensor([1.25, 0.7])
    ones = torch.tensor([1.0, -1.0])
    terms, flags = clipped_policy_loss(ratio, ones, 0.2, 0.28)
    assert terms.tolist() == pytest.approx([-1.25, 0.8])  # 1.25 is below 1.28; 0.7 is held at 0.8
    assert flags["clip_ratio"].tolist() == [False, True]
    total, _, _ = loss([math.log(1.25)], pack([0.0], [1.0]), eps_clip_high=0.28)
    assert total == pytest.approx(-1.25)
    total, _, _ = loss([math.log(1.5)], pack([0.0], [1.0]), eps_clip_high=0.28)
    assert total == pytest.approx(-1.28)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "expected", "gradient", "dual"),
    [
        (-1.0, 2.0, 3.0, 0.0, 1),  # e^2 = 7.39 is held at 3
        (-2.0, 2.0, 6.0, 0.0, 1),
        (-1.0, math.log(2.5), 2.5, 2.5, 0),  # below 3
        (1.0, 2.0, -1.2, 0.0, 0),  # a good token: the plain clip
        (-1.0, math.log(0.5), 0.8, 0.0, 0),
    ],
)
def test_dual_clip_bounds_the_loss_of_bad_tokens(advantage, log_ratio, expected, gradient, dual):
    total, grad, metrics = loss([log_ratio], pack([0.0], [advantage]), eps_clip_c=3.0)
    assert total == pytest.approx(expected, rel=1e-5)
    assert grad == pytest.approx([gradient], rel=1e-5)
    assert metrics["train/dual_clip_ratio"] == dual


def test_an_overflowing_ratio_gives_a_finite_gradient():
    """exp(200) is inf in float32; inf times the zero gradient of a clip is NaN."""
    for advantage in (1.0, -1.0):
        total, grad, _ = loss([200.0], pack([0.0], [advantage]))
        assert math.isfinite(total) and grad == [0.0]
