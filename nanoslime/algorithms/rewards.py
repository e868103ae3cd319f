"""From rewards to one advantage per rollout: by group_id, groups of any size, float64."""

from collections.abc import Sequence

import numpy as np

from nanoslime.types import Group, Scored

ZERO_STD = 1e-6  # values with no larger standard deviation count as equal


def rewards_by_group[S: Scored](groups: Sequence[Group[S]]) -> dict[int, dict[int, float]]:
    """{group_id: {rollout_id: reward}}.

    A group_id may be spread over several groups. Raises ValueError where siblings
    of one rollout differ in reward, or a reward is missing or not finite.
    """
    found: dict[int, dict[int, float]] = {}
    for group in groups:
        for sample, reward in zip(group.samples, group.rewards, strict=True):
            if not np.isfinite(reward):
                raise ValueError(
                    f"group {sample.group_id}, rollout {sample.rollout_id}:"
                    f" reward {reward} is not finite"
                )
            rollout_rewards = found.setdefault(sample.group_id, {})
            first_reward = rollout_rewards.setdefault(sample.rollout_id, reward)
            if reward != first_reward:
                raise ValueError(
                    f"group {sample.group_id}, rollout {sample.rollout_id}: siblings of one"
                    f" rollout must share one reward, but have {first_reward} and {reward}"
                )
    return found


def overlong_penalty(length: int, max_length: int, buffer: int, penalty: float) -> float:
    """The amount added to the reward of a response of `length` tokens, never positive.

    It is 0 up to max_length - buffer, and from there falls linearly to -penalty at
    max_length (soft over-long punishment, arXiv 2503.14476, equation 13); without a buffer 0.
    """
    if not buffer:
        return 0.0
    tokens_in_buffer = length - (max_length - buffer)
    share = min(max(tokens_in_buffer / buffer, 0.0), 1.0)
    return -penalty * share


def spreads(rewards: Sequence[float]) -> bool:
    """Whether the rewards of a group differ, so that they say anything about its samples."""
    if len(rewards) < 2:
        return False
    values = np.asarray(rewards, dtype=np.float64)
    return float(values.std(ddof=1)) > ZERO_STD


def relative(rewards: Sequence[float], *, by_std: bool) -> list[float]:
    """r - mean (arXiv 2503.20783); with `by_std`, over std + 1e-6 (arXiv 2402.03300,
    section 4.1.2).

    std is unbiased. The result is exactly zero for a group of one and for equal rewards,
    whose mean may not be exact.
    """
    if not spreads(rewards):
        return [0.0] * len(rewards)
    values = np.asarray(rewards, dtype=np.float64)
    centred = values - values.mean()
    scale = values.std(ddof=1) + 1e-6 if by_std else 1.0
    return (centred / scale).tolist()
