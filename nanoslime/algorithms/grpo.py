"""Group-relative policy optimization (arXiv 2402.03300) and the variants that differ from it by a switch."""

import torch
from torch import Tensor

from nanoslime.algorithms.corrections import bounded_exp
from nanoslime.algorithms.policy_gradient import PolicyGradient, Terms
from nanoslime.batch import MicroBatch
from nanoslime.config.algorithm import ClippedConfig


class GRPO(PolicyGradient):
    """One importance ratio per token, under PPO's clip (arXiv 2402.03300, equation 3)."""

    config: ClippedConfig

    def policy_terms(
        self, logp: Tensor, log_ratio: Tensor, advantages: Tensor, batch: MicroBatch
    ) -> Terms:
        bounds = self.config.eps_clip, self.config.clip_high, self.config.eps_clip_c
        return clipped_policy_loss(bounded_exp(log_ratio), advantages, *bounds)


def clipped_policy_loss(
    ratio: Tensor,
    advantages: Tensor,
    eps_low: float,
    eps_high: float,
    eps_dual: float | None = None,
) -> Terms:
    """max(-ratio A, -clip(ratio, 1 - eps_low, 1 + eps_high) A), and where the clip decides (bool); all [T].

    arXiv 1707.06347, equation 7; eps_high other than eps_low is clip-higher, arXiv 2503.14476, equation 10.
    With `eps_dual`, at most -eps_dual A where A < 0 (dual clip, arXiv 1912.09729).
    """
    plain, clipped = -ratio * advantages, -ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
    terms, shares = torch.maximum(plain, clipped), {"clip_ratio": clipped > plain}
    if eps_dual is not None:
        limit = -eps_dual * advantages
        shares["dual_clip_ratio"] = (advantages < 0) & (terms > limit)
        terms = torch.where(shares["dual_clip_ratio"], limit, terms)
    return terms, shares
