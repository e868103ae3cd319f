"""Whole tensors of a trainer on its rank 0, to compare them with what others have."""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from nanoslime.models.rules import whole
from nanoslime.weight_sync.exchange import Exchange
from nanoslime.weight_sync.plan import Source, Target, TrainerWeights


def whole_on_rank_0(shape: tuple[int, ...], sources: Sequence[Source]) -> list[Target]:
    """The whole tensor, on rank 0."""
    return [Target(0, whole(shape))]


def whole_tensors(weights: TrainerWeights) -> dict[str, Tensor]:
    """All tensors on rank 0, and nothing elsewhere. Collective."""
    [everything] = weights.plan(whole_on_rank_0, bucket_bytes=sys.maxsize)
    gathered = {
        tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype, device=weights.device)
        for tensor, _ in everything.targets_on(weights.rank)
    }
    exchange = Exchange([everything], weights.rank, weights.device)
    exchange.bring(0, list(weights.shards()), list(gathered.values()))
    return gathered
