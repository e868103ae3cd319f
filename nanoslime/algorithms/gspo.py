"""Group sequence policy optimization (arXiv 2507.18071): the ratio of a sequence, not of
a token.
"""

from torch import Tensor

from nanoslime.algorithms.grpo import GRPO
from nanoslime.algorithms.policy_gradient import PolicyTerms
from nanoslime.algorithms.sequences import sequence_mean
from nanoslime.batch import MicroBatch


class GSPO(GRPO):
    """GRPO's clipped loss, in which all tokens of a sequence have one importance ratio."""

    def policy_terms(
        self, logp: Tensor, log_ratio: Tensor, advantages: Tensor, batch: MicroBatch
    ) -> PolicyTerms:
        """Every token has its sequence's s = exp(mean of current - old logprobs)
        (equation 7) under the clip (equation 5); the gradient goes through s, that is to
        all tokens of the sequence alike.
        """
        sequence_log_ratio = sequence_mean(log_ratio, batch.loss_mask, batch.cu_seqlens)
        return super().policy_terms(logp, sequence_log_ratio, advantages, batch)
