"""GSPO by hand: one ratio for a sequence, and a gradient through it to all tokens alike."""

import math

import pytest

from nanoslime.config.algorithm import GSPOConfig
from tests.algorithms.made import algorithm, loss, pack


def test_tokens_share_the_geometric_mean_ratio_of_their_sequence():
    # token 0 is no part of the first sequence's mean: (0.3 + 0.1) / 2 = 0.2; the
    # second's: -0.1
    batch = pack([0.0] * 4, [1.0] * 4, mask=[False, True, True, True], bounds=[0, 3, 4])
    made = algorithm(GSPOConfig(eps_clip=0.5, eps_clip_high=0.5))
    total, grad, metrics = loss([7.0, 0.3, 0.1, -0.1], batch, made)
    first = math.exp(0.2)
    second = math.exp(-0.1)
    assert total == pytest.approx(-(2 * first + second), rel=1e-5)
    # d/dx of -2 exp((x + y) / 2) is -exp((x + y) / 2): the same for both tokens
    assert grad == pytest.approx([0.0, -first, -first, -second], rel=1e-5)
    assert metrics["train/clip_ratio"] == 0


def test_a_sequence_is_clipped_as_a_whole():
    # the mean 0.2 is above log 1.1, although the second token alone is below
    batch = pack([0.0, 0.0], [1.0, 1.0])
    total, grad, metrics = loss(
        [0.4, 0.0], batch, algorithm(GSPOConfig(eps_clip=0.1, eps_clip_high=0.1))
    )
    assert total == pytest.approx(-2.2) and grad == [0.0, 0.0]
    assert metrics["train/clip_ratio"] == 2


def test_the_clip_is_close_and_the_mean_is_over_sequences_unless_said_otherwise():
    made = algorithm(GSPOConfig())
    assert made.config.denominator == "sequences"
    batch = pack([0.0], [1.0])
    assert loss([3.9e-4], batch, made)[2]["train/clip_ratio"] == 0
    assert loss([4.1e-4], batch, made)[2]["train/clip_ratio"] == 1
    bad = pack([0.0], [-1.0])
    assert loss([-2.9e-4], bad, made)[2]["train/clip_ratio"] == 0
    assert loss([-3.1e-4], bad, made)[2]["train/clip_ratio"] == 1
