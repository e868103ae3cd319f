"""Rewards by name: a file here and a line in REWARDS.

The table lies in `config`, where the login node can check the name of a reward.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nanoslime.config import DataConfig
from nanoslime.config.model import REWARDS as REWARDS
from nanoslime.plugins import resolve
from nanoslime.types import Prompt, RunError, Sample

Reward = Callable[..., Any]

# What a reward gets by name where it has a parameter of that name.
BY_NAME = frozenset({"status", "prompt", "sample", "reward_url", "timeout_s"})


def check(data: DataConfig) -> None:
    """Raises RunError where data.reward, or a part of it, cannot be loaded or called."""
    for name in data.reward_weights(data.reward):
        make(name)


def make(name: str) -> Reward:
    """The reward of this name. Raises RunError where it cannot be loaded or called."""
    reward: Reward = resolve(name, REWARDS, "data.reward")
    if not callable(reward):
        raise RunError(f"data.reward={name!r} is {reward!r}; name a function of a response")
    try:
        inspect.signature(reward).bind("", None, {}, **dict.fromkeys(asked_names(reward)))
    except (TypeError, ValueError) as error:
        raise RunError(
            f"data.reward={name!r} cannot be called with (text, label, metadata): {error}"
        ) from error
    return reward


def asked_names(reward: Reward) -> frozenset[str]:
    """Those of BY_NAME that the reward has a parameter for."""
    return BY_NAME & inspect.signature(reward).parameters.keys()


def known(sample: Sample, prompt: Prompt, data: DataConfig) -> dict[str, Any]:
    """What a reward may ask for by name."""
    return {
        "status": sample.status,
        "prompt": prompt.text,
        # The experts of a sample are many, and no reward's business.
        "sample": sample if sample.routed_experts is None else replace(sample, routed_experts=None),
        "reward_url": data.reward_url,
        "timeout_s": data.reward_timeout_s,
    }


def call(
    reward: Reward, asked: Iterable[str], arguments: Sequence[Any], named: Mapping[str, Any]
) -> float:
    """`reward(*arguments)`, text, label and metadata, with what it asks for of `named`.

    Raises what the reward raises, and what `number` does.
    """
    return number(reward(*arguments, **{name: named[name] for name in asked}))


def number(value: Any) -> float:
    """What a reward has returned. Raises ValueError where it is no finite number."""
    if isinstance(value, str | bytes | None):
        raise ValueError(f"the reward returned {value!r:.100}, which is no number")
    reward = float(value)
    if not math.isfinite(reward):
        raise ValueError(f"the reward returned {reward}, which is not finite")
    return reward
