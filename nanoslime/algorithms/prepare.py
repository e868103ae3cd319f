"""From scored groups to those trained on: filters, advantages and a rollout's metrics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanoslime.algorithms.filters import REASONS, filter_groups, zero_std_ids
from nanoslime.algorithms.policy_gradient import PolicyGradient
from nanoslime.types import Group, Scored, Status


@dataclass(frozen=True, slots=True)
class PreparedGroups[S: Scored]:
    """The groups of one rollout as training takes them."""

    groups: list[Group[S]]  # those to train on, in order, with advantages
    dropped: dict[str, int]  # how many samples or groups the filters dropped, by reason
    metrics: dict[str, float]  # of all groups, filtered ones included


def prepare[S: Scored](groups: Sequence[Group[S]], algorithm: PolicyGradient) -> PreparedGroups[S]:
    """Filters `groups` and gives the samples that are left their advantages.

    Rewards must be set. Raises what `filter_groups` and `PolicyGradient.advantages`
    raise.
    """
    kept, dropped = filter_groups(groups, drop_zero_std=algorithm.config.filter_zero_std)
    algorithm.advantages(kept)
    metrics = group_metrics(groups) | part_means(groups)
    for reason in REASONS:
        metrics[f"rollout/dropped_{reason}"] = float(dropped[reason])
    return PreparedGroups(kept, dict(dropped), metrics)


def group_metrics[S: Scored](groups: Sequence[Group[S]]) -> dict[str, float]:
    """Describes all samples of a rollout.

    Rewards are taken over the samples that have one. Without any, their mean and standard
    deviation are NaN. zero_std_ratio is the share of group_ids that filter_zero_std drops, or
    would drop, of those with a sample to train on.
    """
    samples = [sample for group in groups for sample in group.samples]
    lengths = [sample.num_response_tokens for sample in samples]
    statuses = [sample.status for sample in samples]
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    trainable, _ = filter_groups(groups, drop_zero_std=False)
    num_ids = len({group.group_id for group in trainable})
    # A rollout may be empty: ratios and lengths are then 0.
    num_samples = max(len(samples), 1)
    return {
        "rollout/reward_mean": float(np.mean(rewards)) if rewards else math.nan,
        "rollout/reward_std": float(np.std(rewards)) if rewards else math.nan,
        "rollout/zero_std_ratio": len(zero_std_ids(trainable)) / max(num_ids, 1),
        "rollout/response_tokens_mean": float(np.mean(lengths)) if lengths else 0.0,
        "rollout/response_tokens_p50": percentile(lengths, 50),
        "rollout/response_tokens_p90": percentile(lengths, 90),
        "rollout/response_tokens_p99": percentile(lengths, 99),
        "rollout/response_tokens_max": float(max(lengths, default=0)),
        "rollout/truncated_ratio": statuses.count(Status.TRUNCATED) / num_samples,
        "rollout/aborted_ratio": statuses.count(Status.ABORTED) / num_samples,
        "rollout/error_ratio": statuses.count(Status.ERROR) / num_samples,
        "rollout/num_samples": float(len(samples)),
    }


def percentile(values: Sequence[int], share: float) -> float:
    """The value that `share` percent of `values` do not exceed, interpolated; 0 without any."""
    return float(np.percentile(values, share)) if values else 0.0


def part_means[S: Scored](groups: Sequence[Group[S]]) -> dict[str, float]:
    """The mean of each part of a reward that is a weighted sum."""
    values: dict[str, list[float]] = {}
    for group in groups:
        for sample in group.samples:
            for name, value in sample.reward_parts.items():
                values.setdefault(name, []).append(value)
    return {f"rollout/reward_{name}_mean": float(np.mean(values[name])) for name in values}
