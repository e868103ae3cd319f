"""Metrics are the same numbers however a step is cut into micro-batches and ranks."""

import math

import pytest
import torch
import torch.distributed as dist

from nanoslime.batch import Maximum, MicroBatch, Minimum, TokenMean, WeightedMean
from nanoslime.training.metrics import MetricSums


def micro(rollout, mask, advantages=None):
    size = len(rollout)
    return MicroBatch(
        token_ids=torch.zeros(size, dtype=torch.long),
        positions=torch.arange(size),
        cu_seqlens=torch.tensor([0, size], dtype=torch.int32),
        lengths=[size],
        loss_mask=torch.tensor(mask),
        token_weights=torch.ones(size),
        advantages=torch.tensor(advantages or [0.0] * size),
        rollout_logprobs=torch.tensor(rollout),
        old_logprobs=None,
        ref_logprobs=None,
        temperature=1.0,
        denominator=4.0,
    )


def metrics(weighted, total, count, maximum):
    return {
        "a": WeightedMean(torch.tensor(weighted), 4.0),
        "c": TokenMean(torch.tensor(total), torch.tensor(count)),
        "b": Maximum(torch.tensor(maximum)),
        "d": Minimum(torch.tensor(maximum)),
    }


# the loss, the algorithm's metrics, logprobs, and the micro-batch
FIRST = (
    8.0,
    metrics(weighted=2.0, total=1.0, count=2, maximum=-3.0),
    [-1.0, -2.0],
    micro([-1.5, 9.0], [True, False], [2.0, 99.0]),
)
SECOND = (
    -2.0,
    metrics(weighted=6.0, total=4.0, count=3, maximum=-5.0),
    [-1.0, -2.0],
    micro([-1.0, -4.0], [True, True], [0.0, -4.0]),
)
# log w = trainer - engine of the three tokens: 0.5, 0, 2
E_HALF = math.exp(0.5)
E_TWO = math.exp(2)
MEANS = {
    "a": 2.0,  # (2 + 6) / 4
    "c": 1.0,  # (1 + 4) / (2 + 3)
    "train/logprob_gap_mean": 2.5 / 3,
    "train/rollout_kl": (E_HALF - 1.5 + 0 + E_TWO - 3) / 3,  # exp(log w) - 1 - log w
    "train/rollout_kl_k1": -2.5 / 3,
    "train/importance_weight_mean": (E_HALF + 1 + E_TWO) / 3,
    "train/ess_ratio": (E_HALF + 1 + E_TWO) ** 2 / (3 * (E_HALF**2 + 1 + E_TWO**2)),
}
MEANS |= {
    "train/advantage_mean": -2 / 3,  # of 2, 0 and -4
    "train/advantage_std": math.sqrt(20 / 3 - 4 / 9),
    "train/advantage_zero_ratio": 1 / 3,
}
MAXIMA = {"b": -3.0, "train/logprob_gap_max": 2.0, "train/advantage_max": 2.0}
MINIMA = {"d": -5.0, "train/advantage_min": -4.0}


def add(sums, part):
    loss, metrics, logprobs, batch = part
    sums.add(torch.tensor(loss), metrics, torch.tensor(logprobs), batch)


def assert_expected(reduced):
    assert reduced.loss == 1.5  # (8 - 2) / 4
    assert reduced.means == pytest.approx(MEANS)
    assert reduced.maxima == pytest.approx(MAXIMA)
    assert reduced.minima == pytest.approx(MINIMA)


def test_sums_are_divided_once_and_maxima_kept():
    sums = MetricSums()
    add(sums, FIRST)
    add(sums, SECOND)
    assert_expected(sums.reduce(None))


def reduced_over_ranks(env):
    sums = MetricSums()
    add(sums, (FIRST, SECOND)[env.rank])
    return sums.reduce(dist.group.WORLD)


def test_ranks_add_up_to_the_same(two_ranks):
    for reduced in two_ranks(reduced_over_ranks):
        assert_expected(reduced)


def test_masked_logprobs_stay_out_of_the_gap():
    sums = MetricSums()
    batch = micro([-1.5, 9.0], [True, False])
    sums.add(torch.tensor(0.0), {}, torch.tensor([-1.0, float("nan")]), batch)
    assert sums.reduce(None).maxima["train/logprob_gap_max"] == pytest.approx(0.5)


def values_of(trainer, rollout, old=None):
    """All metrics of one micro-batch without metrics of an algorithm."""
    batch = micro(rollout, [True] * len(rollout))
    batch.old_logprobs = None if old is None else torch.tensor(old)
    sums = MetricSums()
    sums.add(torch.tensor(0.0), {}, torch.tensor(trainer), batch)
    reduced = sums.reduce(None)
    return reduced.means | reduced.maxima


def test_the_gap_is_by_absolute_value():
    # The gaps are -0.5 and 0.1: their maximum is 0.1, their mean -0.2.
    got = values_of([-1.0, -1.0], [-0.5, -1.1])
    assert got["train/logprob_gap_max"] == pytest.approx(0.5)
    assert got["train/logprob_gap_mean"] == pytest.approx(0.3)
    assert got["train/rollout_kl"] > 0


def test_the_trainer_speaks_by_its_old_logprobs_where_there_are_any():
    assert values_of([-3.0], [-1.0], old=[-1.0])["train/logprob_gap_max"] == 0


def test_the_effective_sample_size_is_whole_where_both_agree_and_falls_to_one_token_in_n():
    agreed = values_of([-1.0] * 4, [-1.0] * 4)
    assert agreed["train/ess_ratio"] == 1
    one_counts = values_of([0.0] * 4, [-15.0, 0.0, 0.0, 0.0])
    assert one_counts["train/ess_ratio"] == pytest.approx(1 / 4, rel=1e-3)
    overflowing = values_of([200.0, 0.0], [0.0, 0.0])
    assert overflowing["train/ess_ratio"] == pytest.approx(1 / 2)


def test_a_step_with_nothing_in_the_loss_has_finite_metrics():
    sums = MetricSums()
    sums.add(torch.tensor(0.0), {}, torch.zeros(2), micro([0.0, 0.0], [False, False]))
    reduced = sums.reduce(None)
    values = {**reduced.means, **reduced.maxima, **reduced.minima}
    assert values == dict.fromkeys(values, 0.0) and len(values) == 11 and reduced.loss == 0
