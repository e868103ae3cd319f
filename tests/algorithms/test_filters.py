"""What is dropped before training, and under which name it is counted."""

import numpy as np
import pytest

from nanoslime.algorithms.filters import filter_groups
from nanoslime.types import Sample, SampleGroup, Status


def group(group_id, rewards, statuses=None, mask=(False, True)):
    return SampleGroup(
        group_id,
        [
            Sample(
                group_id=group_id,
                rollout_id=10 * group_id + i,
                token_ids=np.zeros(2, dtype=np.int32),
                loss_mask=np.array(mask),
                rollout_logprobs=np.zeros(2, dtype=np.float32),
                policy_versions=[(0, 0)],
                status=statuses[i] if statuses else Status.COMPLETED,
                reward=reward,
            )
            for i, reward in enumerate(rewards)
        ],
    )


def outcome(*groups, drop_zero_std=True):
    kept, reasons = filter_groups(groups, drop_zero_std=drop_zero_std)
    return [(g.group_id, len(g.samples)) for g in kept], dict(reasons)


@pytest.mark.parametrize("rewards", [[0.7] * 8, [0.1] * 6, [1.0], [0.0, 0.0]])
def test_equal_rewards_are_dropped_and_counted(rewards):
    groups = group(1, rewards), group(2, [0.0, 1.0])
    assert outcome(*groups) == ([(2, 2)], {"group_zero_std": 1})
    assert outcome(*groups, drop_zero_std=False) == ([(1, len(rewards)), (2, 2)], {})


def test_small_differences_are_kept():
    assert outcome(group(1, [0.5, 0.5001])) == ([(1, 2)], {})


def test_failed_samples_leave_their_group():
    statuses = [Status.ERROR, Status.COMPLETED, Status.TRUNCATED, Status.ABORTED]
    mixed = group(1, [0.0, 1.0, 0.0, 0.5], statuses)
    assert outcome(mixed) == ([(1, 2)], {"sample_error": 1, "sample_aborted": 1})
    assert len(mixed.samples) == 4


def test_failed_samples_take_no_part_in_the_spread():
    flat_but_for_an_error = group(
        1, [0.0, 1.0, 1.0], [Status.ERROR, Status.COMPLETED, Status.COMPLETED]
    )
    assert outcome(flat_but_for_an_error) == ([], {"sample_error": 1, "group_zero_std": 1})


def test_group_without_a_usable_sample_is_dropped_whatever_the_filter():
    lost = group(1, [0.0, 1.0], [Status.ERROR] * 2)
    empty = group(2, [0.0, 1.0], mask=(False, False))
    assert outcome(lost, empty, drop_zero_std=False) == (
        [],
        {"sample_error": 2, "sample_no_response": 2, "group_empty": 2},
    )


def test_truncated_groups_are_trained_on():
    assert outcome(group(1, [0.0, 1.0], [Status.TRUNCATED] * 2)) == ([(1, 2)], {})


def test_a_group_spread_over_parts_is_judged_as_a_whole():
    whole = group(1, [1.0, 0.0])
    parts = [SampleGroup(1, [sample]) for sample in whole.samples]
    assert outcome(*parts) == ([(1, 1), (1, 1)], {})
