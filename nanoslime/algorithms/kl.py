"""Estimators of KL(policy || reference) per token (J. Schulman, "Approximating KL
divergence", 2020).

All take logprobs of the sampled tokens, of any one shape, and work with d = ref_logprobs
- logprobs.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

KLType = Literal["k1", "k2", "k3", "low_var_kl"]


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """-d: unbiased in value, of either sign."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d^2 / 2: never negative; its gradient is the unbiased one."""
    return (ref_logprobs - logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor, limit: float = torch.inf) -> Tensor:
    """exp(d) - 1 - d: unbiased in value, never negative (arXiv 2402.03300, equation 4).

    It is zero where both are equal. d is held within +-`limit`.
    """
    d = (ref_logprobs - logprobs).clamp(-limit, limit)
    return torch.expm1(d) - d


_ESTIMATORS: dict[KLType, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "low_var_kl": partial(k3, limit=20.0),
}


def approx_kl(
    logprobs: Tensor, ref_logprobs: Tensor, kind: KLType, ratio: Tensor | None = None
) -> Tensor:
    """The estimator `kind`, times the importance ratio where one is given.

    With the ratio of the current to the sampling policy, not detached, value and gradient
    are those of the KL of the current policy (arXiv 2512.02556, "unbiased KL estimate").

    low_var_kl is k3 held within +-10. It also holds d within +-20, since an infinite
    exp(d) has a NaN gradient even where it is clamped. Raises ValueError for an unknown
    kind.
    """
    if kind not in _ESTIMATORS:
        known = ", ".join(_ESTIMATORS)
        raise ValueError(f"kl_loss_type={kind!r} is unknown; choose one of {known}")
    kl = _ESTIMATORS[kind](logprobs, ref_logprobs)
    if ratio is not None:
        kl = kl * ratio
    if kind == "low_var_kl":
        kl = kl.clamp(-10.0, 10.0)
    return kl
