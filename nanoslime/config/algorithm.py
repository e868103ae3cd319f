"""Knobs of the algorithms. Their maths is in nanoslime/algorithms; `name` picks it from the table there."""

from typing import Literal, Self

from pydantic import Field, model_validator

from nanoslime.config.base import knobs


@knobs
class GRPOConfig:
    """Group-relative policy optimization (arXiv 2402.03300) and the variants that differ by a switch."""

    name: Literal["grpo"] = "grpo"
    normalize_by_std: bool = True
    """False: advantages are only centred (arXiv 2503.20783)."""
    eps_clip: float = Field(default=0.2, gt=0, lt=1)
    eps_clip_high: float | None = None
    """Upper clip where it differs from the lower (clip-higher, arXiv 2503.14476)."""
    denominator: Literal["tokens", "sequences"] = "tokens"
    """Mean over the tokens of the optimizer step, or mean over rollouts of their token means."""
    kl_coef: float = Field(default=0.0, ge=0)
    """KL in the reward (subtracted from the token advantages); excludes use_kl_loss."""
    use_kl_loss: bool = False
    kl_loss_coef: float = Field(default=0.0, ge=0)
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k3"
    use_unbiased_kl: bool = False
    """Weight the KL loss by the importance ratio of the current to the old policy."""
    use_rollout_logprobs: bool = False
    """Old logprobs are those the engine reported; otherwise the trainer recomputes them before its step."""
    filter_zero_std: bool = True
    """Drop groups whose rewards are all equal."""

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0 or self.use_kl_loss

    @model_validator(mode="after")
    def _one_kl(self) -> Self:
        if self.kl_coef > 0 and self.use_kl_loss:
            both = "kl_coef (KL in the reward) and use_kl_loss (KL in the loss)"
            raise ValueError(f"{both} exclude each other; set one")
        if self.use_unbiased_kl and not self.use_kl_loss:
            raise ValueError("use_unbiased_kl weights the KL loss; it needs use_kl_loss")
        return self


AlgorithmConfig = GRPOConfig
