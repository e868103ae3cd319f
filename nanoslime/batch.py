"""What passes between samples and gradients: packed tensors that carry their own global denominators.

A `TrainBatch` is the share of one data-parallel rank in one optimizer step. It is cut into micro-batches
beforehand, with the same number on every rank, and knows the step's denominators over all ranks, so that
packing, micro-batches, DP, CP and PP cannot change the loss: a loss is a sum, divided once by
`TrainBatch.denominator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class TrainBatch:
    """One data-parallel rank's sequences of one optimizer step. Lists have one entry per sequence, tensors
    inside are [T_i].

    old_logprobs, ref_logprobs and token_advantages are filled in on the ranks before the train step.
    Position t of every per-token tensor speaks of token t, given the tokens before it; position 0 is never
    in the loss.
    """

    token_ids: list[Tensor]  # int64 [T_i]
    loss_mask: list[Tensor]  # bool [T_i]
    rollout_logprobs: list[Tensor]  # float32 [T_i]
    advantages: list[float]  # one scalar per sequence
    token_weights: list[
        float
    ]  # per sequence: 1 for a token mean; 1 / (tokens of its rollout) for a sequence mean
    microbatches: list[
        list[int]
    ]  # indices into the lists; equally many on every DP rank, an entry may be empty
    denominator: float  # global over DP, > 0: the loss is sum / denominator
    num_tokens: int  # global over DP: tokens in the loss of this optimizer step
    num_sequences: int  # global over DP
    temperature: float  # of sampling; logits are divided by it before every logprob
    old_logprobs: list[Tensor] | None = None
    ref_logprobs: list[Tensor] | None = None
    token_advantages: list[Tensor] | None = None

    def microbatch(self, indices: Sequence[int]) -> MicroBatch:
        """Packs the given sequences into one MicroBatch; with no indices, a MicroBatch of zero tokens is
        refused.
        """
        if not indices:
            raise ValueError("a micro-batch needs at least one sequence; give empty ranks a masked-out one")

        def packed(per_sequence: list[Tensor] | None) -> Tensor | None:
            return None if per_sequence is None else torch.cat([per_sequence[i] for i in indices])

        lengths = [len(self.token_ids[i]) for i in indices]
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        sequence = torch.repeat_interleave(torch.arange(len(indices)), torch.tensor(lengths))
        weights = torch.tensor([self.token_weights[i] for i in indices])[sequence]
        if self.token_advantages is None:
            advantages = torch.tensor([self.advantages[i] for i in indices])[sequence]
        else:
            advantages = torch.cat([self.token_advantages[i] for i in indices])
        return MicroBatch(
            token_ids=torch.cat([self.token_ids[i] for i in indices]),
            positions=torch.cat([torch.arange(n) for n in lengths]),
            cu_seqlens=bounds,
            loss_mask=torch.cat([self.loss_mask[i] for i in indices]),
            token_weights=weights,
            advantages=advantages,
            rollout_logprobs=torch.cat([self.rollout_logprobs[i] for i in indices]),
            old_logprobs=packed(self.old_logprobs),
            ref_logprobs=packed(self.ref_logprobs),
            temperature=self.temperature,
            denominator=self.denominator,
        )


@dataclass(kw_only=True, slots=True)
class MicroBatch:
    """Whole sequences packed on one token axis [T]; sequence s is cu_seqlens[s]:cu_seqlens[s+1]."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], from 0 within each sequence
    cu_seqlens: Tensor  # int32 [S+1]
    loss_mask: Tensor  # bool [T]
    token_weights: Tensor  # float32 [T]
    advantages: Tensor  # float32 [T]
    rollout_logprobs: Tensor  # float32 [T]
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    temperature: float
    denominator: float

    @property
    def lengths(self) -> list[int]:
        return (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).tolist()

    def to(self, device: torch.device | str) -> MicroBatch:
        moved = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class WeightShard:
    """A rank's own piece of a Hugging Face tensor: `tensor` is the part `slices` of a tensor `name` of
    `full_shape`.

    `tensor` is a live view of the parameter (or a copy where the layout forces one): read it before the next
    step.
    """

    name: str
    full_shape: tuple[int, ...]
    slices: tuple[slice, ...]  # one per dimension, with start and stop set
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimizer step's result, the same on every rank. Means are over the global batch."""

    loss: float
    grad_norm: float  # before clipping
    lr: float
    skipped: bool  # a non-finite gradient: no update was made
    values: dict[
        str, float
    ]  # the algorithm's metrics, named area/what_unit, plus train/logprob_gap_mean and _max
