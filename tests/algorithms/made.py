"""Small groups and packs for the tests by hand."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nanoslime import algorithms
from nanoslime.algorithms.policy_gradient import PolicyGradient
from nanoslime.batch import Maximum, Metric, MicroBatch, TrainBatch
from nanoslime.config.algorithm import GRPOConfig, SharedConfig
from nanoslime.types import Sample, SampleGroup, Status


def group(group_id, rewards, rollout_ids=None, lengths=None) -> SampleGroup:
    """`lengths`: tokens in the loss of each sample, 2 where not given."""
    rollout_ids = rollout_ids or range(100 * group_id, 100 * group_id + len(rewards))
    samples = [
        Sample(
            group_id=group_id,
            rollout_id=rollout_id,
            token_ids=np.arange(1 + length, dtype=np.int32),
            loss_mask=np.arange(1 + length) > 0,
            rollout_logprobs=np.zeros(1 + length, dtype=np.float32),
            policy_versions=[(0, 0)],
            status=Status.COMPLETED,
            reward=reward,
        )
        for rollout_id, reward, length in zip(
            rollout_ids, rewards, lengths or [2] * len(rewards), strict=True
        )
    ]
    return SampleGroup(group_id, samples)


def algorithm(
    config: SharedConfig | None = None, max_response_length: int = 0, **knobs
) -> PolicyGradient:
    """Of `config`, by default GRPO's with `knobs`."""
    return algorithms.make(config or GRPOConfig(**knobs), max_response_length)


def advantages(groups: Sequence[SampleGroup], made: PolicyGradient) -> list[float]:
    made.advantages(groups)
    return [s.advantage for g in groups for s in g.samples]


def shard(
    masks: Sequence[Sequence[bool]], scalars: Sequence[float], *, rollout=None, old=None, ref=None
) -> TrainBatch:
    """One rank's sequences; per-token values are given per sequence, and 0 for rollout
    where they are not.
    """

    def tensors(values):
        return None if values is None else [torch.tensor(v, dtype=torch.float32) for v in values]

    return TrainBatch(
        token_ids=[torch.arange(len(m)) for m in masks],
        loss_mask=[torch.tensor(m, dtype=torch.bool) for m in masks],
        rollout_logprobs=tensors(rollout or [[0.0] * len(m) for m in masks]),
        advantages=list(scalars),
        token_weights=[1.0] * len(masks),
        microbatches=[list(range(len(masks)))],
        denominator=1.0,
        num_tokens=sum(map(sum, masks)),
        num_sequences=len(masks),
        temperature=1.0,
        old_logprobs=tensors(old),
        ref_logprobs=tensors(ref),
    )


def pack(
    old, advantage, *, mask=None, weights=None, ref=None, rollout=None, bounds=None
) -> MicroBatch:
    """Sequences on one token axis [T], by default one; whatever is not given is 0, or 1
    where it weighs.
    """
    size = len(old)
    cu_seqlens = torch.tensor(bounds or [0, size], dtype=torch.int32)
    return MicroBatch(
        token_ids=torch.arange(size),
        positions=torch.arange(size),
        cu_seqlens=cu_seqlens,
        lengths=cu_seqlens.diff().tolist(),
        loss_mask=torch.tensor(mask or [True] * size),
        token_weights=torch.tensor(weights or [1.0] * size),
        advantages=torch.tensor(advantage),
        rollout_logprobs=torch.tensor(rollout or [0.0] * size),
        old_logprobs=torch.tensor(old),
        ref_logprobs=None if ref is None else torch.tensor(ref),
        temperature=1.0,
        denominator=1.0,
    )


def loss(
    current, batch: MicroBatch, made: PolicyGradient | None = None, *, entropy=None, **knobs
) -> tuple[float, list[float], dict[str, float]]:
    """The loss, its gradient to `current` [T], and the metrics: their totals, and maxima.

    The entropy is 0 where none is given.
    """
    made = made or algorithm(**knobs)
    logprobs = torch.tensor(current, requires_grad=True)
    entropy = torch.zeros(len(current)) if entropy is None else torch.tensor(entropy)
    total, metrics = made.loss(logprobs, entropy, batch)
    total.backward()
    numbers = {name: float(number(metric)) for name, metric in metrics.items()}
    return total.item(), logprobs.grad.tolist(), numbers


def number(metric: Metric) -> Tensor:
    """The total of a mean, before it is divided, or the value of a maximum."""
    if isinstance(metric, Maximum):
        return metric.value
    return metric.total
