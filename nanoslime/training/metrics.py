"""Metrics of one optimizer step: sums over micro-batches and data-parallel ranks, divided once."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from nanoslime.batch import MicroBatch

_GAP = "train/logprob_gap"
_MAX = "max:"


class MetricSums:
    """What a step's micro-batches report: sums weighted like the loss, and maxima under "max:" names.

    Adds train/logprob_gap_mean and _max itself: |trainer's logprobs - engine's| over the tokens of the loss.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor], logprobs: Tensor, batch: MicroBatch) -> None:
        """`metrics` as Algorithm.loss returns them, `logprobs` [T] those it was given."""
        gap = torch.where(batch.loss_mask, (logprobs.detach() - batch.rollout_logprobs).abs(), 0.0)
        metrics = {**metrics, f"{_GAP}_mean": gap.sum(), f"{_MAX}{_GAP}_max": gap.max()}
        for name, value in metrics.items():
            value = value.detach().double()
            if name.startswith(_MAX):
                name = name.removeprefix(_MAX)
                self._maxima[name] = torch.maximum(self._maxima.get(name, value), value)
            else:
                self._sums[name] = self._sums.get(name, 0) + value

    def reduce(self, group: ProcessGroup | None, denominator: float, num_tokens: int) -> dict[str, float]:
        """Over the ranks of `group` (None: this one alone), which all have added at least one micro-batch.

        Sums are divided by `denominator`, the mean logprob gap by `num_tokens`. Names lose their "max:".
        """
        sums, maxima = torch.stack(list(self._sums.values())), torch.stack(list(self._maxima.values()))
        if group is not None:
            dist.all_reduce(sums, group=group)
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
        values = dict(zip(self._sums, sums.tolist(), strict=True))
        means = {name: value / denominator for name, value in values.items()}
        means[f"{_GAP}_mean"] = values[f"{_GAP}_mean"] / max(num_tokens, 1)
        return means | dict(zip(self._maxima, maxima.tolist(), strict=True))
