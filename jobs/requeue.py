"""The last command of a run's batch script: whether the job goes on in a new attempt, and its
exit code.

    python -m jobs.requeue RUN_DIR CODE        CODE is that of the job's step

It runs when every task of the step has ended, however it did, and decides by what the attempt has
left in its directory and by what SLURM says of the job now. It asks for a requeue

    after a stop ahead of the time limit or of a preemption, which has committed
    after a failure of a machine: a dead process or node, a hang, a lost filesystem

but not when the job was cancelled, when somebody asked the run to end, and when it was requeued
`cluster.max_requeues` times in a row without a new commit. A run that has not reached its end and
is not requeued makes the job fail, so that no other job takes its place by `afterok`.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from jobs.cluster_env import slurm_says
from nanoslime.config.load import read
from nanoslime.processes.command import ask
from nanoslime.run_dir import DONE, FAILED, STOPPED, Attempt, RunDir
from nanoslime.types import RunError

_REQUEUE_DEADLINE_S = 60.0
_SILENT = (FAILED, "its agents ended without saying why")
# scontrol shows a job that is cancelled or requeued as COMPLETING until its processes have ended.
_OVER = ("CANCELLED", "COMPLETING", "PENDING", "REQUEUED")


@dataclass(frozen=True, slots=True)
class JobNow:
    """What SLURM says of the job; it is taken to run where scontrol does not answer."""

    # Somebody has cancelled it, or SLURM requeues it by itself.
    is_over: bool = False
    # Its time is up, or it makes room for another job within the grace time of its partition.
    must_leave: bool = False

    @classmethod
    def of(cls, job_id: str) -> "JobNow":
        text = slurm_says("scontrol", "show", "job", "--oneliner", job_id)
        facts = dict(re.findall(r"(\S+?)=(\S*)", text))
        limit = facts.get("TimeLimit", "")
        if ":" in limit and _size(facts["RunTime"]) >= _size(limit):
            return cls(must_leave=True)
        is_over = facts.get("JobState") in _OVER
        return cls(is_over, must_leave=facts.get("PreemptTime", "None") != "None")


def _size(duration: str) -> tuple[int, str]:
    """Puts SLURM's [days-]hh:mm:ss in their order."""
    return len(duration), duration


def obstacle(attempt: Attempt, job: JobNow, num_vain: int, max_requeues: int) -> str:
    """Why a job whose attempt has not reached the run's end is not requeued; empty where it is.

    num_vain: requeues in a row without a new commit.
    """
    code, _ = attempt.ended() or _SILENT
    final_stop = attempt.final_stop()
    if job.is_over:
        return "SLURM has cancelled or requeued the job itself"
    if not attempt.is_newest():
        return "a newer attempt has begun"
    if code == STOPPED and final_stop and not job.must_leave:
        return f"the run was asked to end: {final_stop}"
    if not attempt.can_go_on():
        return "another attempt would fail in the same way"
    if num_vain >= max_requeues:
        return f"cluster.max_requeues={max_requeues} in a row without a new commit are reached"
    return ""


def main(argv: list[str]) -> int:
    run = RunDir.open(Path(argv[0]))
    job_id = os.environ["SLURM_JOB_ID"]
    attempt = run.find_attempt(f"{job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}")
    if attempt is None:
        raise RunError(f"the step ended with exit code {argv[1]} before it began an attempt")
    code, reason = attempt.ended() or _SILENT
    if code == DONE:
        return DONE
    max_requeues = read(run.config).cluster.max_requeues
    num_vain = run.num_vain_requeues(job_id)
    why_not = obstacle(attempt, JobNow.of(job_id), num_vain, max_requeues)
    if not why_not:
        done = ask(["scontrol", "requeue", job_id], _REQUEUE_DEADLINE_S)
        why_not = " ".join(done.stderr.split()) if done.returncode else ""
    count = f"requeued ({num_vain + 1} of {max_requeues} in a row without a new commit)"
    outcome = f"not requeued: {why_not}" if why_not else count
    print(f"attempt {attempt.number} ended: {reason}; {outcome}")
    return code if why_not else DONE


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (RunError, OSError) as error:
        print(f"not requeued: {error}")
        sys.exit(FAILED)
