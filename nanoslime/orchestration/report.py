"""What a run tells of itself: its phase while it runs, and a summary at its end."""

import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from nanoslime.config.load import read
from nanoslime.doctor import Doctor
from nanoslime.failures import append_traceback, is_of_machine, summary
from nanoslime.orchestration.session import Session
from nanoslime.processes.phases import DRIVER, own_report
from nanoslime.processes.tree import descendants, end_descendants
from nanoslime.run_dir import FAILED, LAST_PHASES, Attempt, RunDir
from nanoslime.storage.shared_files import publish_json, read_json_lines
from nanoslime.types import MachineFailure, RunError

logger = logging.getLogger(__name__)

# So often a run without agents is looked at.
_LOOK_S = 5.0


class Clock:
    """Counts the seconds of each phase, which lasts until the next one begins, and
    publishes the run's status.
    """

    def __init__(self, run: RunDir):
        self._run = run
        self.phase = ""
        self._start = time.monotonic()
        self.seconds: dict[str, float] = defaultdict(float)
        self.step = 0

    @property
    def in_phase_s(self) -> float:
        return time.monotonic() - self._start

    def __call__(self, phase: str) -> None:
        now = time.monotonic()
        if self.phase:
            self.seconds[self.phase] += now - self._start
        self.phase = phase
        self._start = now
        own_report().enter(DRIVER, phase)
        try:
            self._run.write_status(phase, self.step)
        except OSError as e:
            # The run itself says when it cannot write what it needs.
            logger.warning("the status of the run was not written: %s", e)


def report_failure(attempt: Attempt, clock: Clock, error: BaseException) -> None:
    """Tells how the run failed: in its status, with the traceback in the driver's log, and in
    one line to the user. The status of a run that has a newer attempt is that one's.
    """
    log = attempt.log("driver", 0)
    line = summary(error)
    if not isinstance(error, RunError):
        line += f" (in phase {clock.phase} after {clock.step} rollouts; traceback in {log})"
    clock.phase = "failed"
    try:
        if attempt.is_newest():
            can_go_on = is_of_machine(error)
            attempt.run.write_status("failed", clock.step, error=line, can_go_on=can_go_on)
    except OSError as e:
        logger.error("the status of the run cannot be written: %s", e)
    append_traceback(log, error)
    logger.error("%s", line)


def watch(attempt: Attempt, clock: Clock) -> None:
    """Ends this process and all below it where a run without agents hangs; for a thread."""
    doctor = Doctor(read(attempt.run.config).cluster, attempt.record["host"], attempt)
    # The ranks of torchrun are all children of its launcher.
    root = os.getppid() if "RANK" in os.environ else os.getpid()
    while clock.phase not in LAST_PHASES:
        pids = descendants(root) | {os.getpid()}
        try:
            doctor.judge(doctor.examine(pids))
        except MachineFailure as failure:
            doctor.write_stacks(pids, "node-0.txt")
            report_failure(attempt, clock, failure)
            end_descendants()
            os._exit(FAILED)
        time.sleep(_LOOK_S)


def write_summary(session: Session, clock: Clock, seconds: float) -> None:
    """Writes summary.json from what the run left in its files.

    The rewards of a resumed run cover all of its attempts; seconds and phase_s are of the last.
    """
    run = session.attempt.run
    rollouts = session.config.rollout.num_rollout
    evals = read_json_lines(run.evals)
    # The first set of the first evaluation is that of `RunConfig.eval_sets`.
    evals = [row for row in evals if row.get("set") == evals[0].get("set")]
    rows = read_json_lines(run.metrics)
    measured = [row.get("train/logprob_gap_max") for row in rows]
    gaps = [gap for gap in measured if gap is not None]
    hf = run.hf(rollouts)
    summary = {
        "reward_before": _reward_at(-1, evals),
        "reward_after": _reward_at(rollouts - 1, reversed(evals)),
        "steps": rollouts,
        "logprob_gap_max": max(gaps, default=None),
        "seconds": round(seconds, 1),
        "phase_s": {phase: round(s, 1) for phase, s in clock.seconds.items()},
        "checkpoint": str(run.checkpoint(rollouts)),
        "hf_export": str(hf) if hf.exists() else None,
        "tensorboard": str(run.tensorboard) if session.config.tracking.use_tensorboard else None,
    }
    publish_json(run.summary, summary)


def _reward_at(step: int, evals: Iterable[dict[str, Any]]) -> float | None:
    """The reward of the first of these evaluations that is of `step`."""
    return next((one["reward"] for one in evals if one["step"] == step), None)
