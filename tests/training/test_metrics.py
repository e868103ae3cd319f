"""Metrics are the same numbers however a step is cut into micro-batches and ranks."""

import pytest
import torch
import torch.distributed as dist

from nanoslime.batch import MicroBatch
from nanoslime.training.metrics import MetricSums


def micro(rollout, mask):
    size = len(rollout)
    return MicroBatch(
        token_ids=torch.zeros(size, dtype=torch.long),
        positions=torch.arange(size),
        cu_seqlens=torch.tensor([0, size], dtype=torch.int32),
        loss_mask=torch.tensor(mask),
        token_weights=torch.ones(size),
        advantages=torch.zeros(size),
        rollout_logprobs=torch.tensor(rollout),
        old_logprobs=None,
        ref_logprobs=None,
        temperature=1.0,
        denominator=4.0,
    )


FIRST = (
    {"a": torch.tensor(2.0), "max:b": torch.tensor(-3.0)},
    [-1.0, -2.0],
    micro([-1.5, 9.0], [True, False]),
)
SECOND = (
    {"a": torch.tensor(6.0), "max:b": torch.tensor(-5.0)},
    [-1.0, -2.0],
    micro([-1.0, -4.0], [True, True]),
)
EXPECTED = {"a": 2.0, "b": -3.0, "train/logprob_gap_mean": 2.5 / 5, "train/logprob_gap_max": 2.0}


def add(sums, part):
    metrics, logprobs, batch = part
    sums.add(metrics, torch.tensor(logprobs), batch)


def test_sums_are_divided_once_and_maxima_kept():
    sums = MetricSums()
    add(sums, FIRST)
    add(sums, SECOND)
    assert sums.reduce(None, denominator=4.0, num_tokens=5) == pytest.approx(EXPECTED)


def reduced_over_ranks(env):
    sums = MetricSums()
    add(sums, (FIRST, SECOND)[env.rank])
    return sums.reduce(dist.group.WORLD, denominator=4.0, num_tokens=5)


def test_ranks_add_up_to_the_same(two_ranks):
    for got in two_ranks(reduced_over_ranks):
        assert got == pytest.approx(EXPECTED)


def test_masked_logprobs_stay_out_of_the_gap():
    sums = MetricSums()
    sums.add({"max:b": torch.tensor(0.0)}, torch.tensor([-1.0, float("nan")]), FIRST[2])
    assert sums.reduce(None, 1.0, 1)["train/logprob_gap_max"] == pytest.approx(0.5)
