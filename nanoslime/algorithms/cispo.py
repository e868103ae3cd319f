"""CISPO (MiniMax-M1, arXiv 2506.13585): REINFORCE under a clipped, detached weight."""

from torch import Tensor

from nanoslime.algorithms.corrections import bounded_exp
from nanoslime.algorithms.policy_gradient import PolicyGradient, PolicyTerms, clip_flags
from nanoslime.batch import MicroBatch


class CISPO(PolicyGradient):
    """The clip limits the weight of a token's gradient; no token loses its gradient."""

    def policy_terms(
        self, logp: Tensor, log_ratio: Tensor, advantages: Tensor, batch: MicroBatch
    ) -> PolicyTerms:
        """-clip(ratio, 1 - eps_clip, 1 + eps_clip_high) A logprob (equation 4), the
        clipped ratio detached.

        The clipped ratio is the weight of equation 5.
        """
        ratio = bounded_exp(log_ratio.detach())
        weight = ratio.clamp(1 - self.config.eps_clip, 1 + self.config.clip_high)
        flags = clip_flags(low=weight > ratio, high=weight < ratio)
        return -weight * advantages * logp, flags
