"""Which groups are trained on; whatever is dropped is counted with its reason."""

from collections import Counter
from collections.abc import Sequence

from nanoslime.algorithms.rewards import rewards_by_group, spreads
from nanoslime.types import Sample, SampleGroup, Status

_UNUSABLE = {Status.ERROR: "sample_error", Status.ABORTED: "sample_aborted"}


def filter_groups(
    groups: Sequence[SampleGroup], *, drop_zero_std: bool
) -> tuple[list[SampleGroup], Counter[str]]:
    """The groups to train on, in order, and how many samples or groups were dropped for
    which reason.

    Samples: sample_error, sample_aborted, sample_no_response (no token in the loss).
    Groups: group_empty (no sample left) and, with `drop_zero_std`, group_zero_std: the
    rewards left to a group_id do not differ, so that all its advantages are zero.
    Truncated samples are kept, also where a whole group was truncated: the reward speaks
    for them. Rewards must be set; the given groups stay as they are.
    """
    reasons: Counter[str] = Counter()
    left = []
    for group in groups:
        reasons.update(reason for sample in group.samples if (reason := _drop_reason(sample)))
        if usable := [sample for sample in group.samples if not _drop_reason(sample)]:
            left.append(SampleGroup(group.group_id, usable))
        else:
            reasons["group_empty"] += 1
    if not drop_zero_std:
        return left, reasons
    rewards = rewards_by_group(left)
    flat = {
        group_id for group_id, of_group in rewards.items() if not spreads(list(of_group.values()))
    }
    reasons["group_zero_std"] += len(flat)
    return [group for group in left if group.group_id not in flat], +reasons


def _drop_reason(sample: Sample) -> str | None:
    if sample.status in _UNUSABLE:
        return _UNUSABLE[sample.status]
    return None if sample.num_response_tokens else "sample_no_response"
