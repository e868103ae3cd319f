"""From rewards to one advantage per rollout: by group_id, for groups of any size, in
float64.
"""

from collections.abc import Sequence

import numpy as np

from nanoslime.types import SampleGroup

ZERO_STD = 1e-6  # what spreads no more than this counts as equal


def rewards_by_group(groups: Sequence[SampleGroup]) -> dict[int, dict[int, float]]:
    """{group_id: {rollout_id: reward}}, also where a group_id is spread over several
    SampleGroups.

    Raises ValueError where siblings of one rollout differ in reward, or a reward is
    missing or not finite.
    """
    found: dict[int, dict[int, float]] = {}
    for group in groups:
        for sample, reward in zip(group.samples, group.rewards, strict=True):
            where = f"group {sample.group_id}, rollout {sample.rollout_id}"
            if not np.isfinite(reward):
                raise ValueError(f"{where}: reward {reward} is not finite")
            if (
                found.setdefault(sample.group_id, {}).setdefault(sample.rollout_id, reward)
                != reward
            ):
                raise ValueError(
                    f"{where}: siblings of one rollout must share one reward, and differ"
                )
    return found


def overlong_penalty(length: int, max_length: int, buffer: int, penalty: float) -> float:
    """What is added to the reward of a response of `length` tokens: 0 up to max_length
    - buffer, from there falling linearly to -penalty at max_length (soft over-long
    punishment, arXiv 2503.14476, equation 13).
    """
    return -penalty * min(max((length - (max_length - buffer)) / buffer, 0.0), 1.0)


def spreads(rewards: Sequence[float]) -> bool:
    """Whether the rewards of a group differ, so that they say anything about its samples."""
    return (
        len(rewards) > 1 and float(np.std(np.asarray(rewards, dtype=np.float64), ddof=1)) > ZERO_STD
    )


def relative(rewards: Sequence[float], *, by_std: bool) -> list[float]:
    """r - mean (arXiv 2503.20783), with `by_std` over std + 1e-6 (arXiv 2402.03300,
    section 4.1.2; unbiased).

    Exactly zero for a group of one and for equal rewards, whose mean may not be exact.
    """
    if not spreads(rewards):
        return [0.0] * len(rewards)
    values = np.asarray(rewards, dtype=np.float64)
    scale = values.std(ddof=1) + 1e-6 if by_std else 1.0
    return ((values - values.mean()) / scale).tolist()
