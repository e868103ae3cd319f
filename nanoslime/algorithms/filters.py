"""Which groups are trained on. Everything that is dropped is counted with its reason."""

from collections import Counter
from collections.abc import Sequence

from nanoslime.algorithms.rewards import rewards_by_group, spreads
from nanoslime.types import Group, Scored, Status

REASONS = ("sample_error", "sample_aborted", "sample_no_response", "group_empty", "group_zero_std")
"""What `filter_groups` drops samples and groups for."""


def filter_groups[S: Scored](
    groups: Sequence[Group[S]], *, drop_zero_std: bool
) -> tuple[list[Group[S]], Counter[str]]:
    """The groups to train on, in order, and how many samples or groups were dropped, by
    reason.

    Samples are dropped for sample_error, sample_aborted and sample_no_response (no token
    in the loss). Groups are dropped for group_empty (no sample left) and, with
    `drop_zero_std`, for group_zero_std: the rewards left to a group_id do not differ, so
    that all its advantages are zero. Truncated samples are kept, also where a whole group
    was truncated: the reward speaks for them. Rewards must be set. The given groups stay
    as they are.
    """
    reasons: Counter[str] = Counter()
    left = []
    for group in groups:
        usable = []
        for sample in group.samples:
            reason = _drop_reason(sample)
            if reason is None:
                usable.append(sample)
            else:
                reasons[reason] += 1
        if usable:
            left.append(Group(group.group_id, usable))
        else:
            reasons["group_empty"] += 1
    if not drop_zero_std:
        return left, reasons
    ids = zero_std_ids(left)
    if ids:
        reasons["group_zero_std"] = len(ids)
    kept = [group for group in left if group.group_id not in ids]
    return kept, reasons


def zero_std_ids[S: Scored](groups: Sequence[Group[S]]) -> set[int]:
    """The group_ids whose rewards do not differ."""
    rewards_by_id = rewards_by_group(groups)
    return {
        group_id
        for group_id, rewards in rewards_by_id.items()
        if not spreads(list(rewards.values()))
    }


def _drop_reason(sample: Scored) -> str | None:
    if sample.status is Status.ERROR:
        return "sample_error"
    if sample.status is Status.ABORTED:
        return "sample_aborted"
    if sample.num_response_tokens == 0:
        return "sample_no_response"
    return None
