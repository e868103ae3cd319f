"""REINFORCE with a baseline instead of a critic: leave-one-out (RLOO), and REINFORCE++ in
its two forms.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoslime.algorithms.grpo import GRPO
from nanoslime.config.algorithm import ReinforcePPConfig


class RLOO(GRPO):
    """arXiv 2402.14740; the loss is PPO's clipped one, the same as REINFORCE's with one
    step per rollout.
    """

    def rollout_advantages(self, rewards: Sequence[float]) -> list[float]:
        """r_i - mean of the others, which is n / (n - 1) (r_i - mean of all)."""
        n = len(rewards)
        return [value * n / max(n - 1, 1) for value in super().rollout_advantages(rewards)]


class ReinforcePPBaseline(GRPO):
    """arXiv 2501.03262: reward - mean of its group, whitened over the batch."""


class ReinforcePP(GRPO):
    """arXiv 2501.03262: the reward itself, as a return of each token, whitened over the
    batch.
    """

    config: ReinforcePPConfig

    def rollout_advantages(self, rewards: Sequence[float]) -> list[float]:
        return list(rewards)

    def returns(self, advantage: float, mask: Tensor, penalty: Tensor) -> Tensor:
        """[T]: sum over s >= t of gamma^(s-t) x_s, where x is -penalty, plus the reward
        on the last token in the loss (not always the last: tool output may follow). s - t
        counts all positions.
        """
        rewards = torch.where(mask, -penalty, 0.0).double()
        rewards[mask.nonzero()[-1:, 0]] += advantage
        return torch.where(mask, discounted(rewards, self.config.gamma), 0.0).float()


def discounted(rewards: Tensor, gamma: float) -> Tensor:
    """[T]: sum over s >= t of gamma^(s-t) rewards[s], in log2(T) steps that double the
    span.
    """
    total, span = rewards, 1
    while span < len(total):
        total = total + gamma**span * F.pad(total[span:], (0, span))
        span *= 2
    return total
