"""CISPO (MiniMax-M1, arXiv 2506.13585): REINFORCE under a clipped importance weight that has no gradient."""

from torch import Tensor

from nanoslime.algorithms.corrections import bounded_exp
from nanoslime.algorithms.policy_gradient import PolicyGradient, Terms
from nanoslime.batch import MicroBatch


class CISPO(PolicyGradient):
    def policy_terms(
        self, logp: Tensor, log_ratio: Tensor, advantages: Tensor, batch: MicroBatch
    ) -> Terms:
        """-clip(ratio, 1 - eps_clip, 1 + eps_clip_high) A logprob, the first factor detached: equation 4,
        with the weight of equation 5. No token loses its gradient to the clip.
        """
        ratio = bounded_exp(log_ratio.detach())
        weight = ratio.clamp(1 - self.config.eps_clip, 1 + self.config.clip_high)
        return -weight * advantages * logp, {"clip_ratio": weight != ratio}
