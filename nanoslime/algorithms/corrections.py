"""Corrections for an engine and a trainer that give the same tokens other probabilities.

All of them change numerators only: a rejected token or sequence gives no gradient and
still counts in the denominator of the loss, which is computed from the original masks.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoslime.algorithms.sequences import sequence_mean, sequence_sum
from nanoslime.config.algorithm import CorrectionConfig, Level


@dataclass(frozen=True, slots=True)
class Correction:
    """The effect of the configured corrections on each token of a pack."""

    weight: Tensor  # float32 [T]: a factor of the policy term
    keep: Tensor  # bool [T]: False takes the token out of every numerator
    flags: dict[str, Tensor]  # by metric name: bool [T], True where that correction acted


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp, flat beyond +-20.

    An infinite ratio would have a NaN gradient even where a clip decides.
    """
    return log_ratio.clamp(-20.0, 20.0).exp()


def correct(
    config: CorrectionConfig, trainer: Tensor, engine: Tensor, mask: Tensor, cu_seqlens: Tensor
) -> Correction:
    """Corrects by the importance weights w = exp(trainer - engine). `trainer`, `engine`
    [T]: logprobs.

    Truncated importance sampling (F. Yao et al., "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training", 2025) multiplies by w, clamped. By token, and
    together with that weight, rejection is IcePop (arXiv 2510.18855). By sequence or
    geometric mean, it is masked importance sampling (J. Liu et al., "When Speed Kills
    Stability", 2025); the same source has the veto of a sequence that holds a token which
    the trainer finds all but impossible. Limits are compared with log w, which no clamp
    holds back. No result has a gradient if the logprobs have none.
    """
    log_w = torch.where(mask, trainer - engine, 0.0)
    weight = torch.ones_like(log_w)
    keep = torch.ones_like(mask)
    flags: dict[str, Tensor] = {}
    if config.use_tis:
        w = bounded_exp(log_weights(log_w, mask, cu_seqlens, config.tis_level))
        weight = w.clamp(config.tis_clip_low, config.tis_clip)
        flags["tis_clip_ratio"] = weight != w
    if config.reject != "none":
        log_level = log_weights(log_w, mask, cu_seqlens, config.reject)
        lowest = math.log(config.reject_low) if config.reject_low else -math.inf
        keep = (log_level >= lowest) & (log_level <= math.log(config.reject_high))
    if config.veto:
        impossible = log_w < math.log(config.veto)
        num_impossible = sequence_sum(impossible.float(), cu_seqlens)
        keep = keep & (num_impossible == 0)
    flags["rejected_ratio"] = ~keep
    return Correction(weight, keep, flags)


def log_weights(log_w: Tensor, mask: Tensor, cu_seqlens: Tensor, level: Level) -> Tensor:
    """[T]: log_w, its sum over the sequence, or its mean over the sequence's tokens in the
    loss.

    `log_w` [T] is 0 outside `mask`.
    """
    if level == "sequence":
        return sequence_sum(log_w, cu_seqlens)
    if level == "geometric":
        return sequence_mean(log_w, mask, cu_seqlens)
    return log_w


def off_policy_sequences(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, cu_seqlens: Tensor, delta: float
) -> Tensor:
    """bool [T]: the tokens that off-policy sequence masking takes out of the policy loss
    (arXiv 2512.02556, equation 9).

    Their advantage is negative, and the mean of engine's - current logprobs over their
    sequence is above `delta`. The paper's old policy is what the inference framework
    returned: the drift is that of the steps since, and that between engine and trainer.
    `log_ratio` [T] is current - engine's, 0 outside `mask`.
    """
    drift = sequence_mean(-log_ratio, mask, cu_seqlens)
    return (advantages < 0) & (drift > delta)
