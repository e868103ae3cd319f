"""What of a rollout is trained on, with which advantages, and how the whole rollout is
described.
"""

import math
from itertools import count

import numpy as np
import pytest

from nanoslime.algorithms.prepare import group_metrics, prepare
from nanoslime.training.batching import BatchingOptions
from nanoslime.types import Sample, SampleGroup, Status
from tests.algorithms.made import algorithm, group
from tests.training.batches import make_train_batches

_rollout_ids = count()


def sample(reward: float | None, num_response: int, status: Status, group_id: int = 0) -> Sample:
    mask = np.array([False, False] + [True] * num_response)
    return Sample(
        group_id=group_id,
        rollout_id=next(_rollout_ids),
        token_ids=np.zeros(len(mask), np.int32),
        loss_mask=mask,
        status=status,
        rollout_logprobs=np.zeros(len(mask), np.float32),
        policy_versions=[(2, 0)],
        reward=reward,
    )


def test_metrics_by_hand():
    first = [
        sample(1.0, 1, Status.COMPLETED),
        sample(0.0, 2, Status.TRUNCATED),
        sample(0.0, 3, Status.COMPLETED),
    ]
    second = [sample(1.0, 6, Status.COMPLETED, 1), sample(None, 0, Status.ERROR, 1)]
    assert group_metrics([SampleGroup(0, first), SampleGroup(1, second)]) == {
        "rollout/reward_mean": 0.5,
        "rollout/reward_std": 0.5,
        "rollout/zero_std_ratio": 0.5,
        "rollout/response_tokens_mean": 2.4,
        "rollout/response_tokens_p50": 2.0,
        "rollout/response_tokens_p90": pytest.approx(4.8),  # 0.6 of the way from 3 to 6
        "rollout/response_tokens_p99": pytest.approx(5.88),
        "rollout/response_tokens_max": 6.0,
        "rollout/truncated_ratio": 0.2,
        "rollout/aborted_ratio": 0.0,
        "rollout/error_ratio": 0.2,
        "rollout/num_samples": 5.0,
    }


def test_ratios_are_over_samples_with_and_without_a_reward():
    failed = SampleGroup(0, [sample(None, 0, Status.ERROR) for _ in range(3)])
    cut = SampleGroup(1, [sample(1.0, 4, Status.TRUNCATED, 1) for _ in range(3)])
    metrics = group_metrics([failed, cut])
    assert metrics["rollout/error_ratio"] == 0.5
    assert metrics["rollout/truncated_ratio"] == 0.5
    assert metrics["rollout/zero_std_ratio"] == 1.0


@pytest.mark.parametrize("groups", [[], [SampleGroup(0, [])]])
def test_an_empty_rollout_has_metrics_too(groups):
    metrics = group_metrics(groups)
    assert math.isnan(metrics["rollout/reward_mean"])
    assert metrics["rollout/num_samples"] == 0
    assert metrics["rollout/zero_std_ratio"] == 0


def test_what_is_kept_has_advantages_and_what_is_dropped_is_counted():
    equal = group(1, [0.5, 0.5])
    failed = group(2, [0.0, 1.0])
    failed.samples[0].status = Status.ERROR
    mixed = group(3, [1.0, 0.0])
    made = algorithm(normalize_by_std=False, filter_zero_std=True)
    prepared = prepare([equal, failed, mixed], made)
    [kept] = prepared.groups
    assert kept.group_id == 3
    assert [s.advantage for s in kept.samples] == [0.5, -0.5]
    assert prepared.dropped == {"sample_error": 1, "group_zero_std": 2}
    counts = {
        name: value for name, value in prepared.metrics.items() if name.startswith("rollout/drop")
    }
    assert counts == {
        "rollout/dropped_sample_error": 1,
        "rollout/dropped_sample_aborted": 0,
        "rollout/dropped_sample_no_response": 0,
        "rollout/dropped_group_empty": 0,
        "rollout/dropped_group_zero_std": 2,
    }
    assert prepared.metrics["rollout/dropped_sample_error"] == 1
    assert prepared.metrics["rollout/dropped_group_zero_std"] == 2
    assert prepared.metrics["rollout/num_samples"] == 6
    assert [s.advantage for s in equal.samples] == [None, None]


def test_all_is_kept_where_groups_of_equal_rewards_are_not_filtered():
    equal = group(1, [0.5, 0.5])
    prepared = prepare([equal], algorithm(filter_zero_std=False))
    assert len(prepared.groups) == 1
    assert prepared.dropped == {}
    assert [s.advantage for s in prepared.groups[0].samples] == [0.0, 0.0]


def test_the_ratio_of_equal_groups_is_that_of_the_filter():
    """A group_id in two parts is one group, siblings count once, rewards may differ by rounding,
    and samples that cannot be trained on say nothing.
    """
    parts = group(0, [1.0, 0.0]).samples
    aborted = group(3, [0.0, 1.0])
    aborted.samples[0].status = Status.ABORTED
    failed = group(4, [0.0, 1.0])
    for one in failed.samples:
        one.status = Status.ERROR
    groups = [
        SampleGroup(0, parts[:1]),
        SampleGroup(0, parts[1:]),
        group(1, [0.3, 0.1 + 0.2]),
        group(2, [1.0, 1.0, 0.0], rollout_ids=[7, 7, 8]),
        aborted,
        failed,
    ]
    metrics = prepare(groups, algorithm(filter_zero_std=True)).metrics
    assert metrics["rollout/dropped_group_zero_std"] == 2  # 1 and 3, of 0 to 3
    assert metrics["rollout/zero_std_ratio"] == 2 / 4
    assert (
        prepare(groups, algorithm(filter_zero_std=False)).metrics["rollout/zero_std_ratio"] == 0.5
    )


@pytest.mark.parametrize(("filtered", "denominator"), [(True, 4), (False, 8)])
def test_groups_of_equal_rewards_count_in_the_denominator_unless_they_are_filtered(
    filtered, denominator
):
    groups = [group(1, [0.5, 0.5]), group(2, [0.0, 1.0])]
    prepared = prepare(groups, algorithm(filter_zero_std=filtered))
    options = BatchingOptions(
        num_steps=1, dp_size=1, max_tokens=50, denominator="tokens", temperature=1.0
    )
    [[batch]] = make_train_batches(prepared.groups, options)
    assert batch.denominator == denominator


def test_each_part_of_a_weighted_reward_has_its_mean():
    groups = [group(0, [0.0, 1.0]), group(1, [0.0, 1.0])]
    first, second, *_ = [member for one in groups for member in one.samples]
    first.reward_parts = {"f1": 0.5, "my.module:brief": 1.0}
    second.reward_parts = {"f1": 1.0, "my.module:brief": 0.0}
    metrics = prepare(groups, algorithm()).metrics
    assert metrics["rollout/reward_f1_mean"] == 0.75
    assert metrics["rollout/reward_my.module:brief_mean"] == 0.5
