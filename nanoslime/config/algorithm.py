"""Knobs of the algorithms, one class each.

Their maths is in nanoslime/algorithms, where `name` picks it.
"""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from nanoslime.config.base import knobs

Level = Literal["token", "sequence", "geometric"]
Positive = Annotated[float, Field(gt=0)]


# Switches, and the settings beside them that mean nothing without them.
SETTINGS_OF = {
    "algorithm.use_kl_loss": ("kl_loss_coef", "use_unbiased_kl"),
    "algorithm.overlong_buffer": ("overlong_penalty",),
    "algorithm.correction.use_tis": ("tis_level", "tis_clip", "tis_clip_low"),
    "algorithm.correction.use_opsm": ("opsm_delta",),
    "algorithm.correction.reject": ("reject_low", "reject_high"),
}


def _refuse_idle_settings(config: object, section: str) -> None:
    """Raises ValueError for a setting in `section` that is set while its switch is off."""
    for switch, names in SETTINGS_OF.items():
        place, _, field = switch.rpartition(".")
        if place != section or getattr(config, field) not in (False, 0, "none"):
            continue
        for name in names:
            value = getattr(config, name)
            if value != getattr(type(config), name):
                raise ValueError(f"{section}.{name}={value} needs {switch}")


def _refuse_descending(config: object, section: str, low: str, high: str) -> None:
    """Raises ValueError where the setting `low` is above `high`, if that is set."""
    least = getattr(config, low)
    most = getattr(config, high)
    if most is not None and least > most:
        raise ValueError(
            f"{section}.{low}={least} is above {section}.{high}={most}; "
            "give both, in ascending order"
        )


@knobs
class CorrectionConfig:
    """What is done where engine and trainer give the same tokens different probabilities.

    w is the probability under the trainer's old policy over that under the engine's
    policy. It is taken of a token, of a sequence (the product over its tokens), or as
    the geometric mean over a sequence. Rejected tokens and sequences stay in the
    denominator of the loss.
    """

    use_tis: bool = False
    """Truncated importance sampling: weight the policy loss by w, clipped to
    [tis_clip_low, tis_clip]."""
    tis_level: Level = "token"
    """Of what w is taken by use_tis: each token, the whole sequence, or its geometric mean."""
    tis_clip: float = Field(default=2.0, gt=0)
    """The largest weight that use_tis gives."""
    tis_clip_low: float = Field(default=0.0, ge=0)
    """The smallest weight that use_tis gives."""
    reject: Literal["none", "token", "sequence", "geometric"] = "none"
    """Tokens or sequences with w outside [reject_low, reject_high] give no gradient.
    IcePop is `token`, with use_tis and tis_clip >= reject_high; masked importance
    sampling is `sequence` or `geometric`."""
    reject_low: float = Field(default=0.5, ge=0)
    """The smallest w that `reject` lets through."""
    reject_high: float = Field(default=2.0, gt=0)
    """The largest w that `reject` lets through."""
    veto: float = Field(default=0.0, ge=0, lt=1)
    """Reject a sequence in which any token's w is below; 0: off."""
    use_opsm: bool = False
    """Off-policy sequence masking (arXiv 2512.02556): sequences with negative advantage
    have no policy loss where the policy has moved away from the engine that sampled
    them."""
    opsm_delta: float = Field(default=1e-4, ge=0)
    """A sequence is masked where its mean of the engine's - current logprobs is above."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        _refuse_descending(self, "algorithm.correction", "tis_clip_low", "tis_clip")
        _refuse_descending(self, "algorithm.correction", "reject_low", "reject_high")
        _refuse_idle_settings(self, "algorithm.correction")
        return self

    @property
    def compares_with_engine(self) -> bool:
        return self.use_tis or self.reject != "none" or self.veto > 0


@knobs
class SharedConfig:
    """What all algorithms have in common."""

    eps_clip: float = Field(default=0.2, gt=0, le=1)
    """The ratio of current to old policy is clipped to [1 - eps_clip, 1 + eps_clip]."""
    eps_clip_high: Positive | None = None
    """Upper clip where it differs from the lower (clip-higher, arXiv 2503.14476)."""
    denominator: Literal["tokens", "sequences", "fixed"] = "tokens"
    """tokens: the loss is a mean over the tokens of the optimizer step. sequences: a
    mean over rollouts of their means over tokens. fixed: a mean over rollouts of their
    sums, divided by rollout.max_new_tokens (arXiv 2503.20783)."""
    truncated: Literal["train", "mask"] = "train"
    """What becomes of samples that the token limit ended. train: their reward speaks for
    them. mask: they count in the baseline of their group, but their tokens leave the loss
    and its denominators (over-long filtering, arXiv 2503.14476, section 3.4). A penalty
    for length is overlong_buffer."""
    overlong_buffer: int = Field(default=0, ge=0)
    """Last tokens before rollout.max_new_tokens in which the reward falls by
    overlong_penalty; 0: off."""
    overlong_penalty: float = Field(default=1.0, gt=0)
    """By how much the reward has fallen at the end of overlong_buffer."""
    old_logprobs: Literal["auto", "recomputed", "rollout", "current"] = "auto"
    """Logprobs of the old policy, which the ratio of the loss is taken to. recomputed: by
    the trainer before its optimizer steps. rollout: as the engine reported them.
    current: of the optimizer step itself, whose ratio is always 1: with one step per
    rollout only. auto: recomputed, without its pass where the step itself gives the same
    (see RunConfig.old_logprobs); with rollout.max_staleness, rollout, unless a
    correction weighs or rejects by the engine's probabilities."""
    kl_coef: float = Field(default=0.0, ge=0)
    """KL in the reward (subtracted from the token advantages); excludes use_kl_loss."""
    use_kl_loss: bool = False
    """KL to the reference model in the loss, times kl_loss_coef; excludes kl_coef."""
    kl_loss_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL in the loss; needs use_kl_loss, which a flag `--kl-loss-coef 0` switches
    off."""
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k3"
    """Estimator of the KL, in the reward too."""
    use_unbiased_kl: bool = False
    """Weight the KL loss by the importance ratio of the current to the old policy."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Bonus for entropy: subtracted from the loss."""
    normalize_advantages: bool = False
    """Whiten the token advantages over all tokens of a rollout, on all ranks and of all
    its steps."""
    filter_zero_std: bool = True
    """Drop groups whose rewards, as given and not shaped for length, are all equal. They
    leave the denominator of the loss too, which then counts only what is trained on.
    False: they stay with advantage zero and count in the denominator, as in
    arXiv 2402.03300; KL and entropy act on them, and no others are sampled for them."""
    correction: CorrectionConfig = Field(default_factory=CorrectionConfig)
    """What is done where engine and trainer give a token different probabilities."""

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0 or self.use_kl_loss

    @property
    def clip_high(self) -> float:
        return self.eps_clip if self.eps_clip_high is None else self.eps_clip_high

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.kl_coef > 0 and self.use_kl_loss:
            raise ValueError(
                "algorithm.kl_coef and algorithm.use_kl_loss exclude each other; set one"
            )
        _refuse_idle_settings(self, "algorithm")
        self._check_old_logprobs()
        return self

    def _check_old_logprobs(self) -> None:
        if self.old_logprobs == "rollout" and self.correction.compares_with_engine:
            raise ValueError(
                "algorithm.correction: use_tis, reject and veto compare the trainer with the "
                "engine; algorithm.old_logprobs=rollout makes them the same; "
                "choose recomputed or current"
            )
        if self.old_logprobs == "current" and self.kl_coef > 0:
            raise ValueError(
                "algorithm.kl_coef needs the old policy, which algorithm.old_logprobs=current "
                "has not; choose recomputed"
            )


@knobs
class ClippedConfig(SharedConfig):
    """The algorithms whose loss is PPO's clipped one."""

    eps_clip_c: Annotated[float, Field(gt=1)] | None = None
    """Dual clip: the largest loss over |advantage| where the advantage is negative."""

    @model_validator(mode="after")
    def _clip_range_ascends(self) -> Self:
        _refuse_descending(self, "algorithm", "eps_clip", "eps_clip_high")
        return self


@knobs
class GRPOConfig(ClippedConfig):
    """Group-relative policy optimization (arXiv 2402.03300) and its variants by switches.

    Dr.GRPO (arXiv 2503.20783) sets normalize_by_std to false and denominator to fixed.
    DAPO (arXiv 2503.14476) sets eps_clip_high to 0.28 and denominator to tokens, and
    uses overlong_buffer and rollout.dynamic_sampling_rounds.
    """

    name: Literal["grpo"] = "grpo"
    """The algorithm; each has fields of its own."""
    normalize_by_std: bool = True
    """False: advantages are only centred (arXiv 2503.20783)."""


@knobs
class GSPOConfig(ClippedConfig):
    """Group sequence policy optimization (arXiv 2507.18071).

    A sequence has one ratio, and the clip range is much smaller.
    """

    name: Literal["gspo"] = "gspo"
    """The algorithm; each has fields of its own."""
    normalize_by_std: bool = True
    """False: advantages are only centred."""
    eps_clip: float = Field(default=3e-4, gt=0, le=1)
    eps_clip_high: Positive | None = 4e-4
    denominator: Literal["tokens", "sequences", "fixed"] = "sequences"


@knobs
class CISPOConfig(SharedConfig):
    """Clipped importance weights, detached (arXiv 2506.13585).

    No token loses its gradient.
    """

    name: Literal["cispo"] = "cispo"
    """The algorithm; each has fields of its own."""
    normalize_by_std: bool = True
    """False: advantages are only centred."""
    eps_clip: float = Field(default=1.0, gt=0, le=1)
    """1: the ratio has no lower limit, as in the paper."""
    eps_clip_high: Positive | None = 0.2


@knobs
class RLOOConfig(ClippedConfig):
    """REINFORCE leave-one-out (arXiv 2402.14740).

    The baseline of a sample is the mean reward of the other samples in its group.
    """

    name: Literal["rloo"] = "rloo"
    """The algorithm; each has fields of its own."""


@knobs
class ReinforcePPConfig(ClippedConfig):
    """REINFORCE++ (arXiv 2501.03262).

    Token returns are discounted and whitened; the group gives no baseline.
    """

    name: Literal["reinforce_plus_plus"] = "reinforce_plus_plus"
    """The algorithm; each has fields of its own."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount of the rewards of later tokens in a token's return."""
    normalize_advantages: bool = True
    filter_zero_std: bool = False


@knobs
class ReinforcePPBaselineConfig(ClippedConfig):
    """REINFORCE++ with the group's mean as baseline (arXiv 2501.03262).

    Advantages are whitened over the batch.
    """

    name: Literal["reinforce_plus_plus_baseline"] = "reinforce_plus_plus_baseline"
    """The algorithm; each has fields of its own."""
    normalize_advantages: bool = True


@knobs
class CustomConfig(ClippedConfig):
    """An algorithm of the user's own: a subclass of PolicyGradient."""

    name: str = Field(pattern=r"^[A-Za-z_]\w*(\.\w+)*:\w+$")
    """The algorithm, as package.module:Name of a subclass of PolicyGradient."""
    normalize_by_std: bool = True
    """False: advantages are only centred."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its own knobs, which it finds in `self.config.options`."""


CUSTOM = "package.module:Name"


def _tag(algorithm: Any) -> str:
    """The name of a class of the table, or what stands for all names of the user's own."""
    name = algorithm.get("name") if isinstance(algorithm, dict) else algorithm.name
    return CUSTOM if ":" in str(name) else str(name)


AlgorithmConfig = Annotated[
    Annotated[GRPOConfig, Tag("grpo")]
    | Annotated[GSPOConfig, Tag("gspo")]
    | Annotated[CISPOConfig, Tag("cispo")]
    | Annotated[RLOOConfig, Tag("rloo")]
    | Annotated[ReinforcePPConfig, Tag("reinforce_plus_plus")]
    | Annotated[ReinforcePPBaselineConfig, Tag("reinforce_plus_plus_baseline")]
    | Annotated[CustomConfig, Tag(CUSTOM)],
    Discriminator(_tag),
]
# The classes by name; CUSTOM stands for all names of the user's own.
ALGORITHM_CONFIGS: dict[str, type[SharedConfig]] = {
    tag.tag: algorithm for algorithm, tag in map(get_args, get_args(get_args(AlgorithmConfig)[0]))
}
