"""Packs over the ranks of a context-parallel group: who has what, how it comes together, and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanoslime.training.megatron import cpu_compat
from nanoslime.training.megatron.context_parallel import Spread, gather, held_by_ranks

pytestmark = pytest.mark.megatron


def pack(lengths):
    """cu_seqlens and positions of sequences of these lengths."""
    ends = torch.tensor(lengths).cumsum(0)
    return F.pad(ends, (1, 0)).int(), torch.cat([torch.arange(n) for n in lengths])


def test_each_rank_has_the_chunks_that_make_its_attention_equal_by_hand():
    assert held_by_ranks(torch.tensor([0, 8, 12]), 2).tolist() == [
        [0, 1, 6, 7, 8, 11],
        [2, 3, 4, 5, 9, 10],
    ]
    held = held_by_ranks(torch.tensor([0, 16]), 4)
    assert held.tolist() == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    assert held_by_ranks(torch.tensor([0, 3, 5]), 1).tolist() == [[0, 1, 2, 3, 4]]


def spread(env, lengths, multiple):
    cpu_compat.install()
    bounds, positions = pack(lengths)
    it = Spread(bounds, positions, dist.group.WORLD, multiple)
    values = torch.arange(1, len(positions) + 1)
    here = it.here(values)
    assert torch.equal(it.whole(here), values)
    assert it.whole(torch.stack([here, -here], 1)).tolist() == [[v, -v] for v in values.tolist()]
    return it.bounds.tolist(), here.tolist()


def test_sequences_are_padded_at_their_end_and_the_last_one_to_the_multiple(one_rank, two_ranks):
    assert one_rank(spread, [3, 2], 1) == [([0, 3, 5], [1, 2, 3, 4, 5])]
    assert one_rank(spread, [3, 2], 4) == [([0, 3, 8], [1, 2, 3, 4, 5, 0, 0, 0])]
    assert two_ranks(spread, [7, 3], 4) == [
        ([0, 8, 12], [1, 2, 7, 0, 8, 0]),
        ([0, 8, 12], [3, 4, 5, 6, 9, 10]),
    ]
    assert [bounds for bounds, _ in two_ranks(spread, [7, 1], 8)] == [[0, 8, 16]] * 2


def gradients(env, sum_gradients):
    """Of a weighted sum of the whole, with weights that differ between ranks where gradients are summed."""
    cpu_compat.install()
    bounds, weights = torch.tensor([0, 8, 12]), torch.arange(12.0)
    if sum_gradients:
        weights = weights + 100 * env.rank
    here = held_by_ranks(bounds, 2)[env.rank].float().requires_grad_()
    (gather(here, bounds, dist.group.WORLD, sum_gradients=sum_gradients) * weights).sum().backward()
    return here.detach().tolist(), here.grad.tolist()


def test_the_gradient_of_a_share_is_that_of_its_places_summed_over_ranks_or_not(two_ranks):
    for places, grad in two_ranks(gradients, False):
        assert grad == places
    for places, grad in two_ranks(gradients, True):
        assert grad == [2 * place + 100 for place in places]
