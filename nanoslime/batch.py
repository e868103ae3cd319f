"""What passes between samples and gradients: packed tensors that carry their own global denominators.

A `TrainBatch` is the share of one data-parallel rank in one optimizer step. It is cut into micro-batches
beforehand, with the same number on every rank, and knows the step's denominators over all ranks, so that
packing, micro-batches, DP, CP and PP cannot change the loss: a loss is a sum, divided once by
`TrainBatch.denominator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(kw_only=True, slots=True)
class TrainBatch:
    """One data-parallel rank's sequences of one optimizer step: lists have one entry per sequence.

    old_logprobs, ref_logprobs and token_advantages are filled in on the ranks before the train step. Position
    t of a per-token tensor speaks of token t, given those before it; position 0 is never in the loss.
    """

    token_ids: list[Tensor]  # int64 [T_i]
    loss_mask: list[Tensor]  # bool [T_i]
    rollout_logprobs: list[Tensor]  # float32 [T_i]
    advantages: list[float]  # one scalar per sequence
    token_weights: list[
        float
    ]  # 1 for a token mean, 1 / (tokens of its rollout) for a sequence mean
    microbatches: list[
        list[int]
    ]  # indices, never none: equally many on each DP rank, by masked-out dummies
    denominator: float  # global over DP, > 0: the loss is sum / denominator
    num_tokens: int  # global over DP: tokens in the loss of this optimizer step
    num_sequences: int  # global over DP
    temperature: float  # of sampling; logits are divided by it before every logprob
    old_logprobs: list[Tensor] | None = None
    ref_logprobs: list[Tensor] | None = None
    token_advantages: list[Tensor] | None = None
    routed_experts: list[Tensor] | None = (
        None  # int16 [T_i, num_moe_layers, topk], -1: as the router likes
    )

    def save(self, path: Path) -> None:
        """As a file for `load`, whose directory is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({f.name: getattr(self, f.name) for f in fields(self)}, path)

    @classmethod
    def load(cls, path: Path) -> TrainBatch:
        return cls(**torch.load(path, weights_only=True))

    def microbatch(self, indices: Sequence[int]) -> MicroBatch:
        """The given sequences, packed. Raises ValueError where there are none."""
        if not indices:
            raise ValueError(
                "a micro-batch needs at least one sequence; give empty ranks a masked-out one"
            )

        def packed(per_sequence: list[Tensor] | None) -> Any:
            return None if per_sequence is None else torch.cat([per_sequence[i] for i in indices])

        def spread(per_sequence: list[float]) -> Tensor:
            return torch.tensor([per_sequence[i] for i in indices]).repeat_interleave(lengths)

        lengths = torch.tensor([len(self.token_ids[i]) for i in indices])
        return MicroBatch(
            token_ids=packed(self.token_ids),
            loss_mask=packed(self.loss_mask),
            temperature=self.temperature,
            positions=torch.cat([torch.arange(n) for n in lengths.tolist()]),
            cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
            token_weights=spread(self.token_weights),
            rollout_logprobs=packed(self.rollout_logprobs),
            advantages=packed(self.token_advantages)
            if self.token_advantages
            else spread(self.advantages),
            old_logprobs=packed(self.old_logprobs),
            ref_logprobs=packed(self.ref_logprobs),
            routed_experts=packed(self.routed_experts),
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
    routed_experts: Tensor | None = None  # int16 [T, num_moe_layers, topk], -1: as the router likes

    def to(self, device: torch.device) -> MicroBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        )


@dataclass(frozen=True, slots=True)
class WeightShard:
    """A rank's own piece of a Hugging Face tensor: the part `slices` of the tensor `name` of `full_shape`.

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
    skipped: bool  # a gradient that is not finite or unusually large: no update was made
    values: dict[
        str, float
    ]  # the algorithm's, named area/what_unit; train/logprob_gap_mean and _max
    num_skipped: int = 0  # so far, also before a resume
