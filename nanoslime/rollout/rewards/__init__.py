"""Rewards by name: a file here and a line in REWARDS.

The table lies in `config`, where the login node can check the name of a reward.
"""

import inspect
from collections.abc import Callable
from typing import Any

from nanoslime.config.model import REWARDS as REWARDS
from nanoslime.plugins import resolve
from nanoslime.types import Prompt, RunError, Sample

Reward = Callable[..., Any]


def make(name: str) -> Reward:
    """The reward that data.reward names. Raises RunError where it cannot be loaded or called."""
    try:
        reward: Reward = resolve(name, REWARDS, "data.reward")
    except ValueError as error:
        raise RunError(str(error)) from error
    if not callable(reward):
        raise RunError(f"data.reward={name!r} is {reward!r}; name a function of a response")
    return reward


def call(reward: Reward, sample: Sample, prompt: Prompt) -> float:
    """`reward(text, label, metadata)`, with `status=` and `prompt=` where it names them.

    `status` is that of the sample, `prompt` the text before its response.
    """
    known = {"status": sample.status, "prompt": prompt.text}
    parameters = inspect.signature(reward).parameters
    asked = {name: value for name, value in known.items() if name in parameters}
    return float(reward(sample.text, sample.label, prompt.metadata, **asked))
