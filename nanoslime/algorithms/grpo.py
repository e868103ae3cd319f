"""Group-relative policy optimization (arXiv 2402.03300) and the variants that differ from
it by a switch.
"""

import torch
from torch import Tensor

from nanoslime.algorithms.corrections import bounded_exp
from nanoslime.algorithms.policy_gradient import PolicyGradient, PolicyTerms, clip_flags
from nanoslime.batch import MicroBatch
from nanoslime.config.algorithm import ClippedConfig


class GRPO(PolicyGradient):
    """One importance ratio per token, under PPO's clip (arXiv 2402.03300, equation 3)."""

    config: ClippedConfig

    def policy_terms(
        self, logp: Tensor, log_ratio: Tensor, advantages: Tensor, batch: MicroBatch
    ) -> PolicyTerms:
        return clipped_policy_loss(
            bounded_exp(log_ratio),
            advantages,
            eps_low=self.config.eps_clip,
            eps_high=self.config.clip_high,
            eps_dual=self.config.eps_clip_c,
        )


def clipped_policy_loss(
    ratio: Tensor,
    advantages: Tensor,
    eps_low: float,
    eps_high: float,
    eps_dual: float | None = None,
) -> PolicyTerms:
    """max(-ratio A, -clip(ratio, 1 - eps_low, 1 + eps_high) A) [T], and flags [T] where
    the clip decides.

    `ratio`, `advantages` [T]. The source is arXiv 1707.06347, equation 7; an eps_high
    other than eps_low is clip-higher, arXiv 2503.14476, equation 10. With `eps_dual`, a
    term is at most -eps_dual A where A < 0 (dual clip, arXiv 1912.09729).
    The lower limit can decide only where A < 0, and the upper one only where A > 0.
    """
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
    terms = torch.maximum(unclipped, clipped)
    decides = clipped > unclipped
    flags = clip_flags(low=decides & (advantages < 0), high=decides & (advantages > 0))
    if eps_dual is not None:
        limit = -eps_dual * advantages
        above_limit = (advantages < 0) & (terms > limit)
        terms = torch.where(above_limit, limit, terms)
        flags["dual_clip_ratio"] = above_limit
    return terms, flags
