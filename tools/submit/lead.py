"""How long before its end a job is told to stop: long enough to commit, by what that has taken
so far, and no longer than a partition leaves to a job that it preempts.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from jobs.cluster_env import preemption_grace_s
from nanoslime.config import RunConfig
from nanoslime.config.cluster import ClusterConfig
from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import read_json_lines
from nanoslime.types import RunError

# A save may take so many times what the longest one has taken.
_SAVE_FACTOR = 1.5
# SLURM looks at the time limits of its jobs twice a minute.
_LATE_S = 30


def with_measured_lead(config: RunConfig, run: RunDir) -> RunConfig:
    """The configuration with which a run is resumed: with a signal lead of 1.5 times its longest
    save, and of one drain, the longest training and weight sync, which a stop waits for.

    They are those of the last attempt that has saved; without one the lead stays.
    """
    for attempt in reversed(run.all_attempts()):
        longest = longest_phases(read_json_lines(attempt.phases))
        if "checkpoint" in longest:
            drain_s = longest.get("train", 0.0) + longest.get("weight_sync", 0.0)
            lead_s = math.ceil(_SAVE_FACTOR * longest["checkpoint"] + drain_s) + _LATE_S
            return replace(config, cluster=replace(config.cluster, signal_lead_s=lead_s))
    return config


def longest_phases(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of the lines of an attempt's phases: the most seconds that each phase has taken.

    A checkpoint is made before and after the weight sync of a step: both parts count together.
    """
    longest: dict[str, float] = {}
    saved_s = 0.0
    for line, following in pairwise(lines):
        phase = line["phase"]
        took_s = following["time"] - line["time"]
        if phase == "checkpoint":
            saved_s += took_s
            took_s = saved_s
        elif phase == "generate":
            saved_s = 0.0
        longest[phase] = max(took_s, longest.get(phase, 0.0))
    return longest


def check_grace(cluster: ClusterConfig) -> None:
    """Refuses a lead that a preempted job would not be left."""
    grace_s = preemption_grace_s(cluster.partition) or cluster.preemption_grace_s or 0
    lead_s = cluster.signal_lead_s
    if 0 < grace_s < lead_s:
        partition = cluster.partition or "by default"
        raise RunError(
            f"cluster.signal_lead_s={lead_s}: a job that is preempted has {grace_s} s to commit "
            f"(GraceTime of the partition {partition}, else cluster.preemption_grace_s), which is "
            "too short for that; save more often, so that it loses little, by "
            f"--checkpoint.every-min {math.ceil(lead_s / 60)} --cluster.signal-lead-s {grace_s}, "
            "or choose a partition that leaves more"
        )
