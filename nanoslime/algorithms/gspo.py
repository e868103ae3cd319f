"""Group sequence policy optimization (arXiv 2507.18071): the ratio of a sequence, not of a token."""

from collections.abc import Sequence

from torch import Tensor

from nanoslime.algorithms.grpo import Clipped
from nanoslime.algorithms.policy_gradient import Terms
from nanoslime.algorithms.rewards import relative
from nanoslime.algorithms.sequences import sequence_mean
from nanoslime.batch import MicroBatch
from nanoslime.config.algorithm import GSPOConfig


class GSPO(Clipped):
    config: GSPOConfig

    def rollout_advantages(self, rewards: Sequence[float]) -> list[float]:
        return relative(rewards, by_std=self.config.normalize_by_std)

    def policy_terms(self, logp: Tensor, log_ratio: Tensor, advantages: Tensor, batch: MicroBatch) -> Terms:
        """Every token has its sequence's s = exp(mean of current - old logprobs) (equation 7) under the clip
        (equation 5); the gradient goes through s, that is to all its tokens alike.
        """
        of_sequence = sequence_mean(log_ratio, batch.loss_mask, batch.cu_seqlens)
        return super().policy_terms(logp, of_sequence, advantages, batch)
