"""When the policy is evaluated, on which sets of prompts, and how their samples are drawn."""

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from nanoslime.config.base import knobs
from nanoslime.config.model import PromptsConfig, check_titles
from nanoslime.config.rollout import LOWEST_TEMPERATURE, leaves_tokens

# The set that data.eval_prompts is.
HELD_OUT = "held_out"


def _greedy_or_sampled(temperature: float) -> float:
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise ValueError(
            f"temperature={temperature} of an evaluation is neither greedy nor sampled; set 0, or "
            f"{LOWEST_TEMPERATURE} or more"
        )
    return temperature


# 0 is greedy: the likeliest token.
EvalTemperature = Annotated[float, Field(ge=0), AfterValidator(_greedy_or_sampled)]


@knobs
class EvalSetConfig(PromptsConfig):
    """One set of prompts that the policy is evaluated on; what is left out is as in `eval`,
    and where that has no such field, as in training. Metrics are called eval/<name>/..."""

    _setting = "eval.sets"
    n_samples_per_prompt: int | None = Field(default=None, ge=1)
    """Default: eval.n_samples_per_prompt; 1 in a set with temperature 0 of its own."""
    temperature: EvalTemperature | None = None
    """Temperature of the samples; 0: greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that have this probability together; 1: from all."""
    top_k: Annotated[int, leaves_tokens("eval.sets.top_k")] = -1
    """Sample from so many of the likeliest tokens; -1: from all."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Tokens of an answer at most; default: rollout.max_new_tokens."""
    max_prompts: int | None = Field(default=None, ge=0)
    """The first so many; 0: all."""
    pass_reward: float = 1.0
    """A sample passes, for pass@k, with at least this reward."""


@knobs
class EvalConfig:
    sets: list[EvalSetConfig] = Field(default_factory=list)
    """Sets of prompts beside data.eval_prompts, which is the set "held_out" and comes first.
    The first of all sets chooses the best checkpoint, and gives reward_before and reward_after.
    As flags, the prompts of the sets (a.jsonl,b.jsonl), or settings of one as a JSON object."""
    interval: int = Field(default=0, ge=0)
    """Evaluate after every so many rollouts. 0: only before the first and after the last one."""
    n_samples_per_prompt: int = Field(default=1, ge=1)
    """Samples of each prompt, over which the reward is averaged."""
    temperature: EvalTemperature = 1.0
    """Temperature of the samples; 0: greedy."""
    max_prompts: int = Field(default=0, ge=0)
    """Evaluate on so many prompts of a set at most; 0: on all."""
    seed: int = 0
    """Seed of the samples, on engines that honour one."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        check_titles(self.sets)
        return self

    def due(self, step: int, num_rollout: int) -> bool:
        """Whether the policy is evaluated after this step; after the last one it always is."""
        done = step + 1
        if done == num_rollout:
            return True
        return self.interval > 0 and done % self.interval == 0
