"""The last command of a run's batch script: whether the job goes on in a new attempt, and its
exit code.

    python -m jobs.requeue RUN_DIR CODE DRIVER [AFTER]
        CODE is that of the job's step, DRIVER what jobs.node is told to start, or empty, and AFTER
        the attempt that the step was to follow

It runs when every task of the step has ended, however it did, and decides by what the attempt has
left in its directory and by what SLURM says of the job now. It asks for a requeue, or with
`cluster.resume_by=chain` submits the next job, to start when this one has ended,

    after a stop ahead of the time limit or of a preemption, which has committed
    after a failure of a machine: a dead process or node, a hang, a lost filesystem

but not when the job was cancelled, when somebody asked the run to end, and when it was requeued
`cluster.max_requeues` times in a row without a new commit. An attempt that has lost nodes, or has
found some unfit, is followed by another one on those that are left, as long as they are enough;
else the job goes on without the unfit ones in its ExcNodeList. A run that has not
reached its end and does not go on makes the job fail, so that no other job takes its place by
`afterok`.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs import submission
from jobs.cluster_env import job_facts, own_job_id, slurm_says
from jobs.sbatch import (
    OUTLIVES_STEP,
    agent_command,
    requeue_line,
    sbatch_options,
    step_command,
)
from nanoslime.config.load import read
from nanoslime.layout import Layout
from nanoslime.processes.command import ask
from nanoslime.processes.signals import handled, held_back_from_children
from nanoslime.run_dir import DONE, FAILED, STOPPED, Attempt, RunDir
from nanoslime.storage.shared_files import publish_once, read_json, seen
from nanoslime.types import RunError

_REQUEUE_DEADLINE_S = 60.0
_SILENT = (FAILED, "its agents ended without saying why")
# scontrol shows a job that is cancelled or requeued as COMPLETING until its processes have ended.
_OVER = ("CANCELLED", "COMPLETING", "PENDING", "REQUEUED")
# What somebody may have changed since the job was submitted, and scontrol's word for it.
_OPTION_OF_FACT = {
    "partition": "Partition",
    "account": "Account",
    "qos": "QOS",
    "time": "TimeLimit",
    "constraint": "Features",
    "reservation": "Reservation",
}
_UNSAID = ("(null)", "N/A", "", "Partition_Limit")
# slurm_errno.c: what another choice of nodes would not mend.
_LACK = re.compile(
    "node configuration is not available|node count specification invalid|nodes? .*not available",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class JobNow:
    """What SLURM says of the job; it is taken to run where scontrol does not answer."""

    # Somebody has cancelled it, or SLURM requeues it by itself.
    is_over: bool = False
    # Its time is up, or it makes room for another job within the grace time of its partition.
    must_leave: bool = False
    nodes: tuple[str, ...] = ()

    @classmethod
    def of(cls, job_id: str) -> "JobNow":
        facts = job_facts(job_id)
        limit = facts.get("TimeLimit", "")
        if ":" in limit and _size(facts["RunTime"]) >= _size(limit):
            return cls(must_leave=True)
        is_over = facts.get("JobState") in _OVER
        must_leave = facts.get("PreemptTime", "None") != "None"
        listed = facts.get("NodeList", "")
        names = slurm_says("scontrol", "show", "hostnames", listed) if listed else ""
        return cls(is_over, must_leave, tuple(names.split()))


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


def nodes_left(attempt: Attempt, listed: Sequence[str]) -> list[str]:
    """The nodes on which an attempt that has lost some can be followed by another one in the same
    job; none where it has lost none, or too many.

    listed: those that SLURM still counts to the job. It may notice later than we do.
    """
    lost = {read_json(mark)["name"] for mark in attempt.lost(0).parent.glob("*.json")}
    lost |= set(excluded(attempt.run, attempt.key))
    left = [name for name in listed if name not in lost]
    is_enough = attempt.layout.min_nodes <= len(left) < attempt.layout.num_nodes
    # The batch script runs on the first one.
    return left if is_enough and not seen(attempt.lost(0)) else []


def num_vain_requeues(run: RunDir, job_id: str) -> int:
    """How often in a row the job, or the chain of jobs that it ends, has gone on since an attempt
    of it committed a new step.
    """
    jobs = submission.chain(run, job_id)
    own = [one for one in run.all_attempts() if one.key.rpartition("-")[0] in jobs]
    num_committed = run.num_committed()
    vain = [attempt for attempt in own if attempt.record["rollouts"] == num_committed]
    # The first attempt of a job is no requeue.
    return len(vain) - (len(vain) == len(own))


def main(argv: list[str]) -> int:
    path, code_of_step, driver, *after = argv
    run = RunDir.open(Path(path))
    job_id = own_job_id(os.environ)
    attempt = run.find_attempt(f"{job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}")
    if attempt is None or str(attempt.number) in after:
        raise RunError(f"the step ended with exit code {code_of_step} before it began an attempt")
    code, reason = attempt.ended() or _SILENT
    if code == DONE:
        return DONE
    config = read(run.config)
    max_requeues = config.cluster.max_requeues
    num_vain = num_vain_requeues(run, job_id)
    job = JobNow.of(job_id)
    why_not = obstacle(attempt, job, num_vain, max_requeues)
    is_lost = code == FAILED and not (why_not or job.must_leave)
    nodes = nodes_left(attempt, job.nodes) if is_lost else []
    how = f"goes on without the lost nodes, on {', '.join(nodes)}"
    if not (why_not or nodes):
        try:
            how = _go_on(attempt, job_id, config.cluster.goes_on_by)
        except RunError as error:
            why_not = str(error)
    count = f"{how} ({num_vain + 1} of {max_requeues} in a row without a new commit)"
    outcome = f"not requeued: {why_not}" if why_not else count
    print(f"attempt {attempt.number} ended: {reason}; {outcome}", flush=True)
    if nodes:
        attempt.end(code, reason, can_go_on=True)
        layout = attempt.layout.on(len(nodes))
        # SLURM 22.05 keeps the cores of a step for busy that has lost a node.
        options = ["--overlap", f"--nodelist={','.join(nodes)}"]
        task = agent_command(config, run.path, driver)
        step = step_command(config, layout, run.path, task, *options)
        following = f"{requeue_line(config, run.path, driver)} {attempt.number}"
        os.execlp("sh", "sh", "-c", "\n".join([OUTLIVES_STEP, shlex.join(step), following]))
    return code if why_not else DONE


def follow_head(attempt: Attempt, code: int) -> None:
    """Does the part of the batch script where that is lost with its node: SLURM may notice that
    minutes later. Called on each of the other nodes.
    """
    is_first = publish_once(attempt.path / "followed.json", b"{}")
    if is_first and main([str(attempt.run.path), str(code), ""]) != DONE:
        ask(["scancel", own_job_id(os.environ)], _REQUEUE_DEADLINE_S)


def excluded(run: RunDir, key: str) -> list[str]:
    """The nodes that the attempts of one life of a job have found unfit."""
    found = [attempt.preflight for attempt in run.all_attempts() if attempt.key == key]
    return [name for file in found if seen(file) for name in read_json(file)["excluded"]]


def _go_on(attempt: Attempt, job_id: str, by: str) -> str:
    """Has the job start anew, or another one after it, on other nodes than the unfit ones.

    RunError where SLURM refuses, or has too few others for a run that needs all.
    """
    run = attempt.run
    facts = job_facts(job_id)
    unfit = excluded(run, attempt.key)
    before = facts.get("ExcNodeList", "(null)")
    excluding = ",".join([*unfit, *([] if before == "(null)" else [before])])
    complaint = _lack_of_others(run, facts, excluding) if unfit else ""
    if complaint:
        plan = Layout.from_json(run.plan.read_text())
        if plan.num_nodes - len(unfit) < plan.min_nodes:
            raise RunError(
                f"without {excluding} SLURM has no nodes for the job ({complaint}); "
                "ask for fewer nodes, or resume the run when they are repaired"
            )
        # The next attempt leaves them out again.
        unfit = []
    without = f" without {', '.join(unfit)}" if unfit else ""
    if by == "chain":
        script = run.batch_script.read_text()
        kept_out = excluding if unfit else before.replace("(null)", "")
        options = [f"--exclude={kept_out}"] if kept_out else []
        following = submission.submit("sbatch", script, f"--dependency=afterany:{job_id}", *options)
        submission.record_job(run, following, after=job_id)
        return f"goes on in job {following}{without}"
    # SLURM ends this process and its commands too, by SIGTERM at first.
    with handled(lambda _: None), held_back_from_children():
        done = ask(["scontrol", "requeue", job_id], _REQUEUE_DEADLINE_S)
        if done.returncode:
            raise RunError(" ".join(done.stderr.split()))
        if unfit:
            # It takes this of a pending job only.
            update = ["scontrol", "update", f"JobId={job_id}", f"ExcNodeList={excluding}"]
            done = ask(update, _REQUEUE_DEADLINE_S)
            if done.returncode:
                without = f", and SLURM may choose {', '.join(unfit)} again: {done.stderr.strip()}"
    return f"requeued{without}"


def _lack_of_others(run: RunDir, job: Mapping[str, str], excluding: str) -> str:
    """What SLURM says where it has too few nodes for a job beside those: it would wait for ever.

    Empty where it says anything else, or does not answer.
    """
    options = sbatch_options(read(run.config), Layout.from_json(run.plan.read_text()))
    now = {option: job.get(word, "") for option, word in _OPTION_OF_FACT.items()}
    options |= {option: said for option, said in now.items() if said not in _UNSAID}
    options |= {"nodes": job.get("NumNodes", "1").partition("-")[0], "exclude": excluding}
    words = [
        f"--{option}" if value is True else f"--{option}={value}"
        for option, value in options.items()
    ]
    command = ["sbatch", "--test-only", *words, "--wrap=true"]
    try:
        done = ask(command, _REQUEUE_DEADLINE_S, env=submission.submitter_environment())
    except (OSError, RunError):
        return ""
    is_lack = done.returncode and _LACK.search(done.stderr)
    return submission.complaint(done.stderr) if is_lack else ""


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (RunError, OSError) as error:
        print(f"not requeued: {error}")
        sys.exit(FAILED)
