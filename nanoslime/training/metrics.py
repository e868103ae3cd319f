"""Metrics of one optimizer step: summed over micro-batches and DP ranks, divided once."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from nanoslime.algorithms.corrections import bounded_exp
from nanoslime.algorithms.kl import k3
from nanoslime.batch import Maximum, Metric, MicroBatch, Minimum, TokenMean, WeightedMean

_LOSS = "train/loss"
_ESS = "train/ess_ratio"
_IMPORTANCE = "train/importance_weight_mean"
_ADVANTAGE = "train/advantage_mean"
_ADVANTAGE_STD = "train/advantage_std"
# Two means that are reduced with the others, and from which _ESS and _ADVANTAGE_STD are made.
_IMPORTANCE_SQUARED = "squared importance weight"
_ADVANTAGE_SQUARED = "squared advantage"


@dataclass(frozen=True, slots=True)
class ReducedMetrics:
    """The metrics of an optimizer step over all of its micro-batches and DP ranks."""

    loss: float
    means: dict[str, float]
    maxima: dict[str, float]
    minima: dict[str, float]


class MetricSums:
    """Adds up the metrics of one rank's micro-batches, and reduces them over ranks.

    To each micro-batch's metrics it adds `engine_gap_metrics` and `advantage_metrics`.
    """

    def __init__(self) -> None:
        # By name, of float64. A sum is [total, count], where the count is 0 for a mean that has
        # a denominator.
        self._sums: dict[str, Tensor] = {}
        self._denominators: dict[str, float] = {}
        self._maxima: dict[str, Tensor] = {}
        # Less the values, so that all extremes are reduced as maxima.
        self._negated_minima: dict[str, Tensor] = {}

    def add(
        self, loss: Tensor, metrics: dict[str, Metric], logprobs: Tensor, batch: MicroBatch
    ) -> None:
        """Adds a micro-batch: `loss` and `metrics` of PolicyGradient.loss for `logprobs` [T]."""
        self._add(_LOSS, WeightedMean(loss, batch.denominator))
        own = engine_gap_metrics(logprobs, batch) | advantage_metrics(batch)
        for name, metric in (metrics | own).items():
            self._add(name, metric)

    def _add(self, name: str, metric: Metric) -> None:
        if isinstance(metric, Maximum):
            _keep_largest(self._maxima, name, metric.value)
            return
        if isinstance(metric, Minimum):
            _keep_largest(self._negated_minima, name, -metric.value)
            return
        total = metric.total.detach().double()
        count = torch.zeros_like(total)
        if isinstance(metric, TokenMean):
            count = metric.count.double()
        else:
            self._denominators[name] = metric.denominator
        self._sums[name] = self._sums.get(name, 0.0) + torch.stack([total, count])

    def reduce(self, group: ProcessGroup | None) -> ReducedMetrics:
        """Reduces over the ranks of `group` (None: this rank alone), in two collectives.

        Every rank must have added at least one micro-batch. What is taken over no token
        is 0.
        """
        sums = torch.stack([*self._sums.values()])
        largest = torch.stack([*self._maxima.values(), *self._negated_minima.values()])
        if group is not None:
            dist.all_reduce(sums, group=group)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        extremes = [0.0 if value == -math.inf else value for value in largest.tolist()]
        num_maxima = len(self._maxima)
        maxima = dict(zip(self._maxima, extremes[:num_maxima], strict=True))
        negated_minima = zip(self._negated_minima, extremes[num_maxima:], strict=True)
        minima = {name: -value for name, value in negated_minima}
        means = {}
        for name, (total, count) in zip(self._sums, sums.tolist(), strict=True):
            means[name] = total / self._denominators.get(name, max(count, 1.0))
        loss = means.pop(_LOSS)
        importance_squared = means.pop(_IMPORTANCE_SQUARED)
        means[_ESS] = means[_IMPORTANCE] ** 2 / max(importance_squared, 1e-300)
        variance = means.pop(_ADVANTAGE_SQUARED) - means[_ADVANTAGE] ** 2
        means[_ADVANTAGE_STD] = math.sqrt(max(variance, 0.0))
        return ReducedMetrics(loss, means, maxima, minima)


def _keep_largest(extremes: dict[str, Tensor], name: str, value: Tensor) -> None:
    value = value.detach().double()
    extremes[name] = torch.maximum(extremes.get(name, value), value)


def advantage_metrics(batch: MicroBatch) -> dict[str, Metric]:
    """Statistics of the advantages as the loss has them, a token at a time: whitened, and
    less the KL in the reward.

    The mean of the squares gives train/advantage_std, the standard deviation over all
    tokens in the loss.
    """
    mask = batch.loss_mask
    num_tokens = mask.sum()
    advantages = torch.where(mask, batch.advantages, 0.0).double()
    is_zero = mask & (advantages == 0)
    return {
        _ADVANTAGE: TokenMean(advantages.sum(), num_tokens),
        _ADVANTAGE_SQUARED: TokenMean(advantages.square().sum(), num_tokens),
        "train/advantage_zero_ratio": TokenMean(is_zero.sum(), num_tokens),
        "train/advantage_max": Maximum(torch.where(mask, advantages, -torch.inf).max()),
        "train/advantage_min": Minimum(torch.where(mask, advantages, torch.inf).min()),
    }


def engine_gap_metrics(logprobs: Tensor, batch: MicroBatch) -> dict[str, Metric]:
    """Metrics of how far trainer and engine are apart on the tokens in the loss.

    The trainer's logprobs are the old ones if there are any (the policy that sampled),
    else `logprobs` [T]. train/logprob_gap_mean and train/logprob_gap_max are of the
    absolute difference. train/rollout_kl is k3 of KL(engine || trainer), and
    train/rollout_kl_k1 its signed estimate, engine's - trainer's logprob. The mean of the
    importance weights w = trainer / engine over n tokens, and that of their squares, give
    train/ess_ratio, the effective sample size (sum w)^2 / (n sum w^2): it is 1 where the
    two agree.
    """
    trainer = logprobs.detach()
    if batch.old_logprobs is not None:
        trainer = batch.old_logprobs
    mask = batch.loss_mask
    num_tokens = mask.sum()
    zero = torch.zeros_like(trainer)
    log_weight = torch.where(mask, trainer - batch.rollout_logprobs, zero)
    gap = log_weight.abs()
    weight = torch.where(mask, bounded_exp(log_weight.double()), 0.0)
    return {
        "train/logprob_gap_mean": TokenMean(gap.sum(), num_tokens),
        "train/logprob_gap_max": Maximum(gap.max()),
        "train/rollout_kl": TokenMean(k3(zero, log_weight).sum(), num_tokens),
        "train/rollout_kl_k1": TokenMean(-log_weight.sum(), num_tokens),
        _IMPORTANCE: TokenMean(weight.sum(), num_tokens),
        _IMPORTANCE_SQUARED: TokenMean(weight.square().sum(), num_tokens),
    }
