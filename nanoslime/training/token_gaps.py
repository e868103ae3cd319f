"""Notes on each token how far trainer and engine are apart, for people who look at samples."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoslime.algorithms.policy_gradient import PolicyGradient
from nanoslime.batch import Metric, MicroBatch
from nanoslime.storage.recorded_samples import write_gaps


class GapNotes:
    """Stands for an algorithm, and notes the gaps of every micro-batch in its loss."""

    def __init__(self, algorithm: PolicyGradient) -> None:
        self._algorithm = algorithm
        # The lengths of its sequences, tokens [T] and gaps [T] of each micro-batch.
        self._noted: list[tuple[list[int], Tensor, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._algorithm, name)

    def loss(
        self, logprobs: Tensor, entropy: Tensor | None, batch: MicroBatch
    ) -> tuple[Tensor, dict[str, Metric]]:
        # As for train/logprob_gap_mean: the old logprobs are of the policy that sampled.
        trainer = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        in_loss = torch.where(batch.loss_mask, trainer - batch.rollout_logprobs, torch.nan)
        # They stay on the device: nobody waits for them during the step.
        self._noted.append((batch.lengths, batch.token_ids.int(), in_loss.half()))
        return self._algorithm.loss(logprobs, entropy, batch)

    def write(self, path: Path) -> None:
        """Writes the gaps of all sequences that were noted."""
        sequences = []
        for lengths, token_ids, gaps in self._noted:
            of_tokens = token_ids.cpu().split(lengths)
            of_gaps = gaps.cpu().split(lengths)
            sequences += zip(of_tokens, of_gaps, strict=True)
        write_gaps(path, [(tokens.numpy(), gaps.numpy()) for tokens, gaps in sequences])
