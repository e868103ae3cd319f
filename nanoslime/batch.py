"""The packed tensors between samples and gradients, with their global denominators.

A `BatchPlan` is the share of one data-parallel rank in one optimizer step, in numbers
alone; the rank makes a `TrainBatch` of it with the arrays of its samples. It is cut
into micro-batches beforehand, with the same number on every rank, and knows the step's
denominators over all ranks. Packing, micro-batches, DP, CP and PP therefore cannot change
the loss: a loss is a sum, and is divided once, by `TrainBatch.denominator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoslime.models.rules import Box
from nanoslime.types import KeptArrays, SampleArrays


@dataclass(kw_only=True, slots=True)
class StepShare:
    """One data-parallel rank's share of an optimizer step. A list has one entry per sequence."""

    advantages: list[float]  # one scalar per sequence
    # 1 for a token mean, 1 / (tokens of the sequence's rollout) for a sequence mean
    token_weights: list[float]
    # Indices of sequences. None is empty: masked-out dummy sequences make them equally
    # many on each DP rank.
    microbatches: list[list[int]]
    denominator: float  # global over DP, > 0: the loss is sum / denominator
    num_tokens: int  # global over DP: tokens in the loss of this optimizer step
    num_sequences: int  # global over DP
    temperature: float  # of sampling; logits are divided by it before every logprob


@dataclass(kw_only=True, slots=True)
class BatchPlan(StepShare):
    """What the driver decides of a `TrainBatch`, without the arrays of its samples."""

    # One for each sequence; None is a dummy.
    arrays: list[SampleArrays | KeptArrays | None]
    # (num_moe_layers, topk) where the samples of the step have routed experts.
    expert_shape: tuple[int, int] | None
    # Tokens that an older version sampled are not in the loss; None keeps all.
    oldest_version_in_loss: int | None


@dataclass(kw_only=True, slots=True)
class TrainBatch(StepShare):
    """The sequences of a share, each list with one entry per sequence.

    old_logprobs, ref_logprobs and token_advantages are filled in on the ranks before the
    train step. Position t of a per-token tensor describes token t, given the tokens before
    it; position 0 is never in the loss.
    """

    token_ids: list[Tensor]  # int64 [T_i]
    loss_mask: list[Tensor]  # bool [T_i]
    rollout_logprobs: list[Tensor]  # float32 [T_i]
    old_logprobs: list[Tensor] | None = None
    ref_logprobs: list[Tensor] | None = None
    token_advantages: list[Tensor] | None = None
    # int16 [T_i, num_moe_layers, topk]; -1 leaves the choice to the router
    routed_experts: list[Tensor] | None = None

    def save(self, path: Path) -> None:
        """Writes a file for `load`, and makes its directory."""
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        torch.save(values, path)

    @classmethod
    def load(cls, path: Path) -> TrainBatch:
        values = torch.load(path, weights_only=True)
        return cls(**values)

    def microbatch(self, indices: Sequence[int]) -> MicroBatch:
        """Packs the sequences `indices`. Raises ValueError where there are none."""
        if not indices:
            raise ValueError(
                "a micro-batch needs at least one sequence; give empty ranks a masked-out one"
            )
        lengths = [len(self.token_ids[i]) for i in indices]
        num_tokens = torch.tensor(lengths)
        positions = torch.cat([torch.arange(length) for length in lengths])
        cu_seqlens = F.pad(num_tokens.cumsum(0), (1, 0)).to(torch.int32)
        if self.token_advantages:
            advantages = _packed(self.token_advantages, indices)
        else:
            advantages = _on_every_token(self.advantages, indices, num_tokens)
        return MicroBatch(
            token_ids=_packed(self.token_ids, indices),
            positions=positions,
            cu_seqlens=cu_seqlens,
            lengths=lengths,
            loss_mask=_packed(self.loss_mask, indices),
            token_weights=_on_every_token(self.token_weights, indices, num_tokens),
            advantages=advantages,
            rollout_logprobs=_packed(self.rollout_logprobs, indices),
            old_logprobs=_packed_if_any(self.old_logprobs, indices),
            ref_logprobs=_packed_if_any(self.ref_logprobs, indices),
            temperature=self.temperature,
            denominator=self.denominator,
            routed_experts=_packed_if_any(self.routed_experts, indices),
        )


def _packed(per_sequence: list[Tensor], indices: Sequence[int]) -> Tensor:
    """[T, ...]: the tensors of the sequences `indices`, one after the other."""
    return torch.cat([per_sequence[i] for i in indices])


def _packed_if_any(per_sequence: list[Tensor] | None, indices: Sequence[int]) -> Tensor | None:
    if per_sequence is None:
        return None
    return _packed(per_sequence, indices)


def _on_every_token(
    per_sequence: list[float], indices: Sequence[int], num_tokens: Tensor
) -> Tensor:
    """float32 [T]: the value of its sequence for each token. `num_tokens` is [S]."""
    values = torch.tensor([per_sequence[i] for i in indices])
    return values.repeat_interleave(num_tokens)


@dataclass(kw_only=True, slots=True)
class MicroBatch:
    """Whole sequences packed on one token axis [T]; sequence s is
    cu_seqlens[s]:cu_seqlens[s+1].
    """

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], from 0 within each sequence
    cu_seqlens: Tensor  # int32 [S+1]
    lengths: list[int]  # tokens of each sequence, known without asking the device
    loss_mask: Tensor  # bool [T]
    token_weights: Tensor  # float32 [T]
    advantages: Tensor  # float32 [T]
    rollout_logprobs: Tensor  # float32 [T]
    old_logprobs: Tensor | None  # float32 [T]
    ref_logprobs: Tensor | None  # float32 [T]
    temperature: float
    denominator: float
    # int16 [T, num_moe_layers, topk]; -1 leaves the choice to the router
    routed_experts: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """A copy whose tensors are on `device`."""
        moved = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                moved[name] = on_device(value, device)
        return replace(self, **moved)


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`; the host does not wait for what a GPU still computes."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class WeightShard:
    """A rank's own part of a Hugging Face tensor: the box `slices` of the tensor `name`
    of `full_shape`.

    `tensor` is a live view of the parameter (or a copy where the layout forces one): read
    it before the next step.
    """

    name: str
    full_shape: tuple[int, ...]
    slices: tuple[slice, ...]  # one per dimension, with start and stop set
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class OwnedShard:
    """What a rank holds of a Hugging Face tensor, without its values."""

    name: str
    full_shape: tuple[int, ...]
    box: Box  # in the full tensor


@dataclass(frozen=True, slots=True)
class WeightedMean:
    """One micro-batch's part of a metric that is weighted as the loss is.

    The metric is the sum of `total` over all micro-batches and DP ranks of the step, over
    `denominator`.
    """

    total: Tensor  # scalar: a sum over tokens, each with its token_weight
    denominator: float  # the step's own, MicroBatch.denominator: the same everywhere


@dataclass(frozen=True, slots=True)
class TokenMean:
    """One micro-batch's part of an unweighted mean over the tokens in the loss.

    The metric is the sum of `total` over the sum of `count`, over all micro-batches and
    DP ranks of the step.
    """

    total: Tensor  # scalar: a sum over the tokens in the loss
    count: Tensor  # scalar: how many tokens are in the loss


@dataclass(frozen=True, slots=True)
class Maximum:
    """One micro-batch's part of a maximum over the tokens in the loss."""

    value: Tensor  # scalar


@dataclass(frozen=True, slots=True)
class Minimum:
    """One micro-batch's part of a minimum over the tokens in the loss."""

    value: Tensor  # scalar


Metric = WeightedMean | TokenMean | Maximum | Minimum


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """The result of an optimizer step, the same on all ranks. Names are area/what_unit."""

    loss: float
    grad_norm: float  # before clipping
    lr: float
    skipped: bool  # no update was made: the gradient was not finite or unusually large
    means: dict[str, float]  # over the global batch
    maxima: dict[str, float]  # over the global batch
    num_skipped: int = 0  # optimizer steps without an update so far, also before a resume
    minima: dict[str, float] = field(default_factory=dict)  # over the global batch
