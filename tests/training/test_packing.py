"""Whole sequences into few and full micro-batches, and these onto ranks of equal cost."""

import time

import numpy as np
import pytest

from nanoslime.training.packing import pack, sequence_costs

PARITY = 24_576.0


def trace(seed, median, number=512, cap=16_384):
    lengths = np.random.default_rng(seed).lognormal(np.log(median), 1.0, number)
    return lengths.clip(1, cap).astype(int).tolist()


def packed(lengths, num_ranks=8, max_tokens=16_384, parity_tokens=PARITY):
    ranks = pack(lengths, num_ranks=num_ranks, max_tokens=max_tokens, parity_tokens=parity_tokens)
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(i for rank in ranks for m in rank for i in m) == list(range(len(lengths)))
    for microbatch in (m for rank in ranks for m in rank):
        num_tokens = sum(lengths[i] for i in microbatch)
        assert num_tokens <= max_tokens or len(microbatch) == 1
    return ranks


def imbalance(lengths, ranks, parity_tokens=PARITY):
    costs = sequence_costs(lengths, parity_tokens)
    loads = [sum(costs[i] for m in rank for i in m) for rank in ranks]
    return max(loads) / (sum(loads) / len(loads))


@pytest.mark.parametrize("median", [1000, 2048, 3000, 4096])
@pytest.mark.parametrize("seed", range(5))
def test_a_long_tail_takes_as_few_micro_batches_as_its_tokens_and_ranks_are_level(median, seed):
    lengths = trace(seed, median)
    ranks = packed(lengths)
    assert len(ranks[0]) == -(-sum(lengths) // (8 * 16_384))  # no packing has fewer
    assert imbalance(lengths, ranks) <= 1.01


def test_eight_thousand_sequences_take_seconds_at_most():
    started = time.monotonic()
    lengths = trace(0, 2048, 8192)
    ranks = packed(lengths, num_ranks=64)
    assert imbalance(lengths, ranks) <= 1.01
    assert time.monotonic() - started < 20  # 0.4 s on a quiet machine


@pytest.mark.parametrize("multiple", [2, 3, 4])
def test_ranks_have_a_multiple_of_so_many_micro_batches_and_no_more(multiple):
    lengths = trace(0, 2048)
    ranks = pack(lengths, num_ranks=8, max_tokens=16_384, parity_tokens=PARITY, multiple=multiple)
    least = len(packed(lengths)[0])
    assert {len(rank) for rank in ranks} == {-(-least // multiple) * multiple}
    assert sorted(i for rank in ranks for m in rank for i in m) == list(range(len(lengths)))
    assert all(m for rank in ranks for m in rank)


def test_costs_by_hand():
    assert sequence_costs([100, 50], parity_tokens=100) == [200, 75]


def test_where_levelled_micro_batches_do_not_fit_full_ones_do():
    """Levelled, 5 + 4 and 5 + 3 leave no room for the other 3."""
    assert sorted(packed([5, 5, 4, 3, 3], num_ranks=2, max_tokens=10)) == [[[0, 1]], [[2, 3, 4]]]


def test_sequences_above_the_budget_go_alone_and_nothing_joins_them():
    ranks = packed([50, 4, 3, 50, 3], num_ranks=1, max_tokens=10)
    assert sorted(ranks[0]) == [[0], [1, 2, 4], [3]]


def test_short_ranks_have_empty_micro_batches_and_only_they():
    assert sorted(packed([5, 5, 5], num_ranks=4, max_tokens=10)) == [[[]], [[0]], [[1]], [[2]]]
    assert packed([], num_ranks=2) == [[[]], [[]]]


def test_the_costliest_micro_batch_comes_first_on_every_rank():
    lengths = trace(1, 2048)
    costs = sequence_costs(lengths, PARITY)
    for rank in packed(lengths):
        of_microbatches = [sum(costs[i] for i in m) for m in rank]
        assert of_microbatches == sorted(of_microbatches, reverse=True)


def test_attention_decides_where_tokens_are_equal():
    """One of 8 and eight of 1 have as many tokens, but not as much attention."""
    lengths = [8] + [1] * 16
    ranks = packed(lengths, 2, 100, parity_tokens=4.0)
    [rank_of_long] = [rank for rank in ranks if any(0 in m for m in rank)]
    # It has 24 of 44 units of cost: no other joins it.
    assert sum(lengths[i] for m in rank_of_long for i in m) == 8
