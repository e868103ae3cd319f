"""Knobs of the algorithms, one class each. Their maths is in nanoslime/algorithms; `name` picks it there."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nanoslime.config.base import knobs

Level = Literal["token", "sequence", "geometric"]
Positive = Annotated[float, Field(gt=0)]
_NEEDS = {  # what does nothing while the other is off
    "kl_loss_coef": "use_kl_loss",
    "use_unbiased_kl": "use_kl_loss",
    "overlong_penalty": "overlong_buffer",
    "tis_level": "use_tis",
    "tis_clip": "use_tis",
    "tis_clip_low": "use_tis",
    "reject_low": "reject",
    "reject_high": "reject",
    "opsm_delta": "use_opsm",
}


@knobs
class CorrectionConfig:
    """What is done about engine and trainer giving the same tokens different probabilities.

    w = trainer's old policy / engine's policy, of a token, of a sequence (product of its tokens' w) or as the
    geometric mean of a sequence. What is rejected stays in the denominator of the loss.
    """

    use_tis: bool = False
    """Truncated importance sampling: weight the policy loss by w, held within [tis_clip_low, tis_clip]."""
    tis_level: Level = "token"
    tis_clip: float = Field(default=2.0, gt=0)
    tis_clip_low: float = Field(default=0.0, ge=0)
    reject: Literal["none", "token", "sequence", "geometric"] = "none"
    """No gradient of what has w outside [reject_low, reject_high]. IcePop: token, with use_tis and
    tis_clip >= reject_high; masked importance sampling: sequence or geometric."""
    reject_low: float = Field(default=0.5, ge=0)
    reject_high: float = Field(default=2.0, gt=0)
    veto: float = Field(default=0.0, ge=0, lt=1)
    """Reject a sequence in which any token's w is below; 0: off."""
    use_opsm: bool = False
    """Off-policy sequence masking: no policy loss of a sequence with negative advantage that has drifted."""
    opsm_delta: float = Field(default=1e-4, ge=0)
    """How far: mean of old - current logprobs."""


@knobs
class SharedConfig:
    """What all algorithms have in common."""

    eps_clip: float = Field(default=0.2, gt=0, le=1)
    eps_clip_high: Positive | None = None
    """Upper clip where it differs from the lower (clip-higher, arXiv 2503.14476)."""
    denominator: Literal["tokens", "sequences", "fixed"] = "tokens"
    """Mean over the tokens of the optimizer step, mean over rollouts of their token means, or mean over
    rollouts of their sum over rollout.max_new_tokens (arXiv 2503.20783)."""
    overlong_buffer: int = Field(default=0, ge=0)
    """Last tokens before rollout.max_new_tokens in which the reward falls by overlong_penalty; 0: off."""
    overlong_penalty: float = Field(default=1.0, gt=0)
    old_logprobs: Literal["recomputed", "rollout", "current"] = "recomputed"
    """Those of the trainer before its steps, those the engine reported, or those of the step itself."""
    kl_coef: float = Field(default=0.0, ge=0)
    """KL in the reward (subtracted from the token advantages); excludes use_kl_loss."""
    use_kl_loss: bool = False
    kl_loss_coef: float = Field(default=0.0, ge=0)
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k3"
    """Estimator of the KL, in the reward too."""
    use_unbiased_kl: bool = False
    """Weight the KL loss by the importance ratio of the current to the old policy."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Bonus for entropy: subtracted from the loss."""
    normalize_advantages: bool = False
    """Whiten the token advantages over all tokens of a rollout, on all ranks and of all its steps."""
    filter_zero_std: bool = True
    """Drop groups whose rewards, as given and not shaped for length, are all equal."""
    correction: CorrectionConfig = Field(default_factory=CorrectionConfig)

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0 or self.use_kl_loss

    @property
    def clip_high(self) -> float:
        return self.eps_clip if self.eps_clip_high is None else self.eps_clip_high

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        c, old = self.correction, self.old_logprobs
        tis, reject = (c.tis_clip_low, c.tis_clip), (c.reject_low, c.reject_high)
        compares = c.use_tis or c.reject != "none" or c.veto > 0
        same = "use_tis, reject and veto compare the trainer with the engine; old_logprobs=rollout makes them"
        none = "needs the old policy, which old_logprobs=current has not; choose recomputed"
        values, defaults = vars(self) | vars(c), vars(SharedConfig) | vars(CorrectionConfig)
        off = [name for name, switch in _NEEDS.items() if values[switch] in (False, 0, "none")]
        idle = {f"{n}={values[n]} needs {_NEEDS[n]}": values[n] != defaults[n] for n in off}
        ppo_clip, eps = isinstance(self, ClippedConfig), (self.eps_clip, self.clip_high)
        problems = idle | {
            f"eps_clip and eps_clip_high {eps} must ascend; give both": ppo_clip
            and eps[0] > eps[1],
            "kl_coef and use_kl_loss exclude each other; set one": self.kl_coef > 0
            and self.use_kl_loss,
            f"correction.tis_clip_low and tis_clip {tis} must ascend": tis[0] > tis[1],
            f"correction.reject_low and reject_high {reject} must ascend": reject[0] > reject[1],
            f"{same} the same; choose recomputed or current": old == "rollout" and compares,
            f"kl_coef {none}": old == "current" and self.kl_coef > 0,
            f"use_opsm {none}": old == "current" and c.use_opsm,
        }
        for problem in (text for text, is_there in problems.items() if is_there):
            raise ValueError(problem)
        return self


@knobs
class ClippedConfig(SharedConfig):
    """Those whose loss is PPO's clipped one."""

    eps_clip_c: Annotated[float, Field(gt=1)] | None = None
    """Dual clip: upper bound of the loss over |advantage| where the advantage is negative."""


@knobs
class GRPOConfig(ClippedConfig):
    """Group-relative policy optimization (arXiv 2402.03300) and the variants that differ by a switch.

    Dr.GRPO (arXiv 2503.20783): normalize_by_std false, denominator fixed. DAPO (arXiv 2503.14476):
    eps_clip_high 0.28, denominator tokens, overlong_buffer, and rollout.dynamic_sampling_rounds.
    """

    name: Literal["grpo"] = "grpo"
    normalize_by_std: bool = True
    """False: advantages are only centred (arXiv 2503.20783)."""


@knobs
class GSPOConfig(ClippedConfig):
    """Group sequence policy optimization (arXiv 2507.18071): one ratio per sequence, clipped much closer."""

    name: Literal["gspo"] = "gspo"
    normalize_by_std: bool = True
    eps_clip: float = Field(default=3e-4, gt=0, le=1)
    eps_clip_high: Positive | None = 4e-4
    denominator: Literal["tokens", "sequences", "fixed"] = "sequences"


@knobs
class CISPOConfig(SharedConfig):
    """Clipped importance weights, detached (arXiv 2506.13585): no token loses its gradient."""

    name: Literal["cispo"] = "cispo"
    normalize_by_std: bool = True
    eps_clip: float = Field(default=1.0, gt=0, le=1)
    """1: no lower bound, as in the paper."""
    eps_clip_high: Positive | None = 0.2


@knobs
class RLOOConfig(ClippedConfig):
    """REINFORCE leave-one-out (arXiv 2402.14740): the baseline is the mean of the other rewards."""

    name: Literal["rloo"] = "rloo"


@knobs
class ReinforcePPConfig(ClippedConfig):
    """REINFORCE++ (arXiv 2501.03262): discounted token returns, whitened; no baseline of the group."""

    name: Literal["reinforce_plus_plus"] = "reinforce_plus_plus"
    gamma: float = Field(default=1.0, gt=0, le=1)
    normalize_advantages: bool = True
    filter_zero_std: bool = False


@knobs
class ReinforcePPBaselineConfig(ClippedConfig):
    """REINFORCE++ with the group's mean as baseline (arXiv 2501.03262), whitened over the batch."""

    name: Literal["reinforce_plus_plus_baseline"] = "reinforce_plus_plus_baseline"
    normalize_advantages: bool = True


AnyAlgorithm = (
    GRPOConfig
    | GSPOConfig
    | CISPOConfig
    | RLOOConfig
    | ReinforcePPConfig
    | ReinforcePPBaselineConfig
)
AlgorithmConfig = Annotated[AnyAlgorithm, Field(discriminator="name")]
