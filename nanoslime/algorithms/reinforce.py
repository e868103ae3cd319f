"""REINFORCE with a baseline instead of a critic: RLOO, and REINFORCE++ in two forms."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoslime.algorithms.grpo import GRPO
from nanoslime.config.algorithm import ReinforcePPConfig


class RLOO(GRPO):
    """Leave-one-out (arXiv 2402.14740) under PPO's clipped loss.

    With one step per rollout, that is REINFORCE's own loss.
    """

    def rollout_advantages(self, rewards: Sequence[float]) -> list[float]:
        """r_i - mean of the others, which is n / (n - 1) (r_i - mean of all)."""
        num_rewards = len(rewards)
        num_others = max(num_rewards - 1, 1)
        centred = super().rollout_advantages(rewards)
        return [value * num_rewards / num_others for value in centred]


class ReinforcePPBaseline(GRPO):
    """arXiv 2501.03262: reward - mean of its group, whitened over the batch."""


class ReinforcePP(GRPO):
    """arXiv 2501.03262: the reward as each token's return, whitened over the batch."""

    config: ReinforcePPConfig

    def rollout_advantages(self, rewards: Sequence[float]) -> list[float]:
        return list(rewards)

    def returns(self, advantage: float, mask: Tensor, penalty: Tensor) -> Tensor:
        """[T]: sum over s >= t of gamma^(s-t) x_s; s - t counts all positions.

        x is -penalty, plus the reward on the last token in the loss. The last token may
        not be in it: tool output may follow.
        """
        rewards = torch.where(mask, -penalty, 0.0).double()
        last_in_loss = mask.nonzero()[-1:, 0]  # [1], or [0] where nothing is in the loss
        rewards[last_in_loss] += advantage
        discounted_sums = discounted(rewards, self.config.gamma)
        return torch.where(mask, discounted_sums, 0.0).float()


def discounted(rewards: Tensor, gamma: float) -> Tensor:
    """[T]: sum over s >= t of gamma^(s-t) rewards[s], in log2(T) doublings of the span."""
    total = rewards
    span = 1
    while span < len(total):
        total = total + gamma**span * F.pad(total[span:], (0, span))
        span *= 2
    return total
