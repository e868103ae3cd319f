"""Packs over the ranks of a context-parallel group: their parts, the whole, and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from nanoslime.training.megatron import context_parallel, cpu_compat
from nanoslime.training.megatron.context_parallel import ContextParallelShard, positions_by_rank

pytestmark = pytest.mark.megatron

CPU = torch.device("cpu")


def test_each_rank_has_the_chunks_that_make_its_attention_equal_by_hand():
    assert positions_by_rank([8, 4], 2).tolist() == [
        [0, 1, 6, 7, 8, 11],
        [2, 3, 4, 5, 9, 10],
    ]
    assert positions_by_rank([16], 4).tolist() == [
        [0, 1, 14, 15],
        [2, 3, 12, 13],
        [4, 5, 10, 11],
        [6, 7, 8, 9],
    ]
    assert positions_by_rank([3, 2], 1).tolist() == [[0, 1, 2, 3, 4]]


def shard_and_gather(env, lengths, length_multiple):
    """Where the padded sequences begin, and this rank's part of the values 1, 2, 3, ..."""
    cpu_compat.install()
    cp_shard = ContextParallelShard(lengths, dist.group.WORLD, length_multiple, CPU)
    values = torch.arange(1, sum(lengths) + 1)
    local = cp_shard.local(values)
    assert torch.equal(cp_shard.tokens + 1, local)  # -1 is padding
    assert torch.equal(cp_shard.gather(local), values)
    pairs = cp_shard.gather(torch.stack([local, -local], 1))
    assert pairs.tolist() == [[value, -value] for value in values.tolist()]
    padded = cp_shard.gather_padded(local)
    starts = cp_shard.padded_cu_seqlens.tolist()
    first = 1
    for start, length in zip(starts, lengths, strict=False):
        assert padded[start : start + length].tolist() == list(range(first, first + length))
        first += length
    assert cp_shard.padded_lengths == cp_shard.padded_cu_seqlens.diff().tolist()
    return starts, local.tolist(), cp_shard.positions.tolist()


def test_sequences_are_padded_at_their_end_and_the_last_one_to_the_multiple(one_rank, two_ranks):
    assert one_rank(shard_and_gather, [3, 2], 1) == [([0, 3, 5], [1, 2, 3, 4, 5], [0, 1, 2, 0, 1])]
    assert one_rank(shard_and_gather, [3, 2], 4) == [
        ([0, 3, 8], [1, 2, 3, 4, 5, 0, 0, 0], [0, 1, 2, 0, 1, 2, 3, 4])
    ]
    assert two_ranks(shard_and_gather, [7, 3], 4) == [
        ([0, 8, 12], [1, 2, 7, 0, 8, 0], [0, 1, 6, 7, 0, 3]),
        ([0, 8, 12], [3, 4, 5, 6, 9, 10], [2, 3, 4, 5, 1, 2]),
    ]
    for padded_cu_seqlens, *_ in two_ranks(shard_and_gather, [7, 1], 8):
        assert padded_cu_seqlens == [0, 8, 16]


def gradients(env, sum_gradients):
    """This rank's positions, and the gradient there of a weighted sum of the whole.

    The weights differ between ranks where gradients are summed.
    """
    cpu_compat.install()
    lengths = [8, 4]
    cp_shard = ContextParallelShard(lengths, dist.group.WORLD, 4, CPU)
    weights = torch.arange(12.0)
    if sum_gradients:
        weights = weights + 100 * env.rank
    local = positions_by_rank(lengths, 2)[env.rank].float().requires_grad_()
    whole = cp_shard.gather_padded(local) if sum_gradients else cp_shard.gather(local)
    (whole * weights).sum().backward()
    return local.detach().tolist(), local.grad.tolist()


def test_the_gradient_of_a_local_part_is_summed_over_ranks_only_where_asked(two_ranks):
    for positions, gradient in two_ranks(gradients, False):
        assert gradient == positions
    for positions, gradient in two_ranks(gradients, True):
        assert gradient == [2 * position + 100 for position in positions]


@dataclass
class Group:
    """Two ranks, of which this is the second."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 1


def test_the_indices_are_known_without_a_look_at_the_device(monkeypatch):
    """A tensor on the device meta has no values: what asks for one raises."""
    monkeypatch.setattr(
        context_parallel,
        "gather_from_sequence_parallel_region",
        lambda local, **_: torch.cat([local, local]),
    )
    meta = torch.device("meta")
    cp_shard = ContextParallelShard([7, 3], Group(), 4, meta)
    local = cp_shard.local(torch.empty(10, device=meta))
    assert local.shape == cp_shard.positions.shape == (6,)
    assert cp_shard.gather(local).shape == (10,)
    assert cp_shard.gather_padded(local).shape == (12,)
    assert cp_shard.local_lengths == [4, 2]
    with pytest.raises(RuntimeError, match="meta"):
        cp_shard.padded_cu_seqlens.tolist()
