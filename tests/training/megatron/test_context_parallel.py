"""Packs over the ranks of a context-parallel group: their parts, the whole, and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanoslime.training.megatron import cpu_compat
from nanoslime.training.megatron.context_parallel import (
    ContextParallelShard,
    gather,
    positions_by_rank,
)

pytestmark = pytest.mark.megatron


def pack(lengths):
    """cu_seqlens and positions of sequences of these lengths."""
    ends = torch.tensor(lengths).cumsum(0)
    cu_seqlens = F.pad(ends, (1, 0)).int()
    positions = torch.cat([torch.arange(length) for length in lengths])
    return cu_seqlens, positions


def test_each_rank_has_the_chunks_that_make_its_attention_equal_by_hand():
    assert positions_by_rank(torch.tensor([0, 8, 12]), 2).tolist() == [
        [0, 1, 6, 7, 8, 11],
        [2, 3, 4, 5, 9, 10],
    ]
    assert positions_by_rank(torch.tensor([0, 16]), 4).tolist() == [
        [0, 1, 14, 15],
        [2, 3, 12, 13],
        [4, 5, 10, 11],
        [6, 7, 8, 9],
    ]
    assert positions_by_rank(torch.tensor([0, 3, 5]), 1).tolist() == [[0, 1, 2, 3, 4]]


def shard_and_gather(env, lengths, length_multiple):
    """Where the padded sequences begin, and this rank's part of the values 1, 2, 3, ..."""
    cpu_compat.install()
    cu_seqlens, positions = pack(lengths)
    cp_shard = ContextParallelShard(cu_seqlens, positions, dist.group.WORLD, length_multiple)
    values = torch.arange(1, len(positions) + 1)
    local = cp_shard.local(values)
    assert torch.equal(cp_shard.gather(local), values)
    pairs = cp_shard.gather(torch.stack([local, -local], 1))
    assert pairs.tolist() == [[value, -value] for value in values.tolist()]
    return cp_shard.padded_cu_seqlens.tolist(), local.tolist()


def test_sequences_are_padded_at_their_end_and_the_last_one_to_the_multiple(one_rank, two_ranks):
    assert one_rank(shard_and_gather, [3, 2], 1) == [([0, 3, 5], [1, 2, 3, 4, 5])]
    assert one_rank(shard_and_gather, [3, 2], 4) == [([0, 3, 8], [1, 2, 3, 4, 5, 0, 0, 0])]
    assert two_ranks(shard_and_gather, [7, 3], 4) == [
        ([0, 8, 12], [1, 2, 7, 0, 8, 0]),
        ([0, 8, 12], [3, 4, 5, 6, 9, 10]),
    ]
    for padded_cu_seqlens, _ in two_ranks(shard_and_gather, [7, 1], 8):
        assert padded_cu_seqlens == [0, 8, 16]


def gradients(env, sum_gradients):
    """This rank's positions, and the gradient there of a weighted sum of the whole.

    The weights differ between ranks where gradients are summed.
    """
    cpu_compat.install()
    cu_seqlens = torch.tensor([0, 8, 12])
    weights = torch.arange(12.0)
    if sum_gradients:
        weights = weights + 100 * env.rank
    local = positions_by_rank(cu_seqlens, 2)[env.rank].float().requires_grad_()
    whole = gather(local, cu_seqlens, dist.group.WORLD, sum_gradients=sum_gradients)
    (whole * weights).sum().backward()
    return local.detach().tolist(), local.grad.tolist()


def test_the_gradient_of_a_local_part_is_summed_over_ranks_only_where_asked(two_ranks):
    for positions, gradient in two_ranks(gradients, False):
        assert gradient == positions
    for positions, gradient in two_ranks(gradients, True):
        assert gradient == [2 * position + 100 for position in positions]
