"""Metrics of one optimizer step: sums over micro-batches and data-parallel ranks, divided once."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from nanoslime.algorithms.corrections import bounded_exp
from nanoslime.algorithms.kl import k3
from nanoslime.batch import MicroBatch

_GAP = "train/logprob_gap"
_MAX, _MEAN = "max:", "mean:"
_W, _W2 = "sum of importance weights", "sum of their squares"


class MetricSums:
    """What a step's micro-batches report: sums weighted like the loss; under "mean:" names sums over the
    tokens of the loss, under "max:" names maxima.

    Adds how far trainer and engine are apart on the tokens of the loss, where the trainer speaks by its old
    logprobs if there are any (the policy that sampled): train/logprob_gap_mean and _max, of the absolute
    difference; train/rollout_kl, k3 of KL(engine || trainer); train/ess_ratio, the effective sample size
    (sum w)^2 / (n sum w^2) of the importance weights w = trainer / engine, 1 where the two agree.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor], logprobs: Tensor, batch: MicroBatch) -> None:
        """`metrics` as Algorithm.loss returns them, `logprobs` [T] those it was given."""
        trainer = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        mask, zero = batch.loss_mask, torch.zeros_like(trainer)
        log_w = torch.where(mask, trainer - batch.rollout_logprobs, zero)
        w = torch.where(mask, bounded_exp(log_w.double()), 0.0)
        metrics = {
            **metrics,
            f"{_MEAN}{_GAP}_mean": log_w.abs().sum(),
            f"{_MAX}{_GAP}_max": log_w.abs().max(),
            f"{_MEAN}train/rollout_kl": k3(zero, log_w).sum(),
            _W: w.sum(),
            _W2: w.square().sum(),
        }
        for name, value in metrics.items():
            value = value.detach().double()
            if name.startswith(_MAX):
                name = name.removeprefix(_MAX)
                self._maxima[name] = torch.maximum(self._maxima.get(name, value), value)
            else:
                self._sums[name] = self._sums.get(name, 0) + value

    def reduce(
        self, group: ProcessGroup | None, denominator: float, num_tokens: int
    ) -> dict[str, float]:
        """Over the ranks of `group` (None: this one alone), which all have added at least one micro-batch.

        Sums are divided by `denominator`, those of "mean:" names by `num_tokens`. Names lose their prefix.
        """
        sums, maxima = (
            torch.stack(list(self._sums.values())),
            torch.stack(list(self._maxima.values())),
        )
        if group is not None:
            dist.all_reduce(sums, group=group)
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
        values = dict(zip(self._sums, sums.tolist(), strict=True))
        num_tokens = max(num_tokens, 1)
        means = {"train/ess_ratio": values.pop(_W) ** 2 / max(num_tokens * values.pop(_W2), 1e-300)}
        for name, value in values.items():
            means[name.removeprefix(_MEAN)] = value / (num_tokens if _MEAN in name else denominator)
        return means | dict(zip(self._maxima, maxima.tolist(), strict=True))
