"""What to do about engine and trainer disagreeing on the probability of the same tokens.

Everything here changes numerators only: a rejected token or sequence gives no gradient and still counts in
the denominator of the loss, which is that of the original masks.
"""

import torch
from torch import Tensor

from nanoslime.algorithms.sequences import sequence_mean, sequence_sum
from nanoslime.config.algorithm import CorrectionConfig, Level


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp, flat beyond +-20: an infinite ratio would have a NaN gradient even where a clip decides."""
    return log_ratio.clamp(-20.0, 20.0).exp()


def correct(
    config: CorrectionConfig, trainer: Tensor, engine: Tensor, mask: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """By w = exp(trainer - engine): a weight of the policy loss (float32), what is kept in any numerator, and
    by metric name where anything was done (bool); all [T]. `trainer`, `engine` [T]: logprobs, no gradient.

    Truncated importance sampling (F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy
    RL Training", 2025) weighs by w, clamped. By token and weighed, rejection is IcePop (arXiv 2510.18855); by
    sequence or geometric mean masked importance sampling (J. Liu et al., "When Speed Kills Stability", 2025),
    with the veto of a sequence that holds a token the trainer finds all but impossible.
    """
    log_w, shares = torch.where(mask, trainer - engine, 0.0), dict[str, Tensor]()
    weight, keep = torch.ones_like(log_w), torch.ones_like(mask)
    if config.use_tis:
        w = importance(log_w, mask, cu_seqlens, config.tis_level)
        weight = w.clamp(config.tis_clip_low, config.tis_clip)
        shares["tis_clip_ratio"] = weight != w
    if config.reject != "none":
        w = importance(log_w, mask, cu_seqlens, config.reject)
        keep = (w >= config.reject_low) & (w <= config.reject_high)
    if config.veto:
        vetoed = importance(log_w, mask, cu_seqlens, "token") < config.veto
        keep = keep & (sequence_sum(vetoed.float(), cu_seqlens) == 0)
    return weight, keep, shares | {"rejected_ratio": ~keep}


def importance(log_w: Tensor, mask: Tensor, cu_seqlens: Tensor, level: Level) -> Tensor:
    """[T]: exp of log_w, of its sum over the sequence, or of its mean over the sequence's tokens in the loss.

    `log_w` [T] is 0 outside `mask`.
    """
    if level == "sequence":
        log_w = sequence_sum(log_w, cu_seqlens)
    elif level == "geometric":
        log_w = sequence_mean(log_w, mask, cu_seqlens)
    return bounded_exp(log_w)


def drifted(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, cu_seqlens: Tensor, delta: float
) -> Tensor:
    """bool [T], off-policy sequence masking (arXiv 2512.02556): the advantage is negative and the sequence's
    mean of old - current logprobs is above `delta`. `log_ratio` [T] is current - old, 0 outside `mask`.
    """
    return (advantages < 0) & (sequence_mean(-log_ratio, mask, cu_seqlens) > delta)
