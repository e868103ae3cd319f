"""Climbs the ladder: submits a rung's run, waits for its end, looks at it, goes on to the next."""

import argparse
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs import sbatch
from jobs.checkout import module_command
from jobs.cluster_env import job_facts, slurm_says
from nanoslime.config import RunConfig
from nanoslime.layout import Layout
from nanoslime.plugins import resolve
from nanoslime.processes.command import ask
from nanoslime.run_dir import RunDir
from nanoslime.types import RunError
from tools.acceptance import checks, names, rungs
from tools.acceptance.report import Outcome, Report
from tools.acceptance.rungs import Rung
from tools.provenance import write_provenance
from tools.submit import batch_script, inputs, local
from tools.submit import grpo as submit_grpo
from tools.watch.status import facts

# SLURM's job goes through states in which others end while it is requeued.
_NUM_ALIKE = 3
_LOOK_S = 2.0
_ANSWER_S = 30.0
# What is no state of SLURM's: it does not know the job any more, or it does not answer.
_FORGOTTEN = "forgotten"
_UNKNOWN = "unknown"
_OVER = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"),
    *("BOOT_FAIL", "PREEMPTED", _FORGOTTEN),
)
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Site:
    """Where the ladder stands."""

    command: argparse.Namespace
    # The flags that were given, for all rungs.
    flags: Sequence[str]
    submits: bool
    max_nodes: int | None
    # So long a rung's job may wait in SLURM's queue.
    patience_s: float
    # The name of the last rung; empty: all.
    up_to: str = ""


def climb(site: Site, say: Say, keep: Callable[[Report], None]) -> Report:
    """Runs rung after rung until one fails, or needs more nodes than there are.

    keep: what is done with the report after each rung.
    """
    cluster = submit_grpo.configure(site.command, list(site.flags)).cluster
    report = Report(hidden=names.of_site(cluster, has_slurm=site.submits))
    report.rest = list(_asked(rungs.ladder(cluster), site.up_to))
    ends = ""
    while report.rest:
        rung = report.rest[0]
        if not ends and site.max_nodes is not None and rung.num_nodes > site.max_nodes:
            ends = f"it takes {rung.num_nodes} nodes, and there are {site.max_nodes}"
        impossible = ends or rung.impossible
        if report.outcomes and not report.is_good:
            outcome = Outcome(rung, "not reached")
        elif impossible:
            say(f"{rung.title}: left out, {impossible}")
            outcome = Outcome(rung, "impossible", impossible)
        else:
            say(f"{rung.title}: begins")
            outcome = _try(site, rung, report, say)
            say(f"{rung.title}: {outcome.state} after {outcome.seconds:.0f} s {outcome.reason}")
        report.outcomes.append(outcome)
        report.rest.pop(0)
        keep(report)
    return report


def _asked(ladder: Sequence[Rung], up_to: str) -> Sequence[Rung]:
    """The rungs up to the one of this name. RunError where there is none."""
    names = [rung.name for rung in ladder]
    if up_to and up_to not in names:
        raise RunError(f"--up-to {up_to}: there is no such rung; choose one of {', '.join(names)}")
    return ladder[: names.index(up_to) + 1] if up_to else ladder


def _try(site: Site, rung: Rung, report: Report, say: Say) -> Outcome:
    begin = time.monotonic()
    try:
        run = _run(site, rung, say)
    except (RunError, OSError) as error:
        return Outcome(rung, "failed", str(error), time.monotonic() - begin)
    _learn(run, report)
    found = checks.of_run(run)
    state = "passed" if checks.passed(found) else "failed"
    reason = "; ".join(f"{c.name}: {c.text}" for c in found if c.outcome == checks.FAILED_CHECK)
    return Outcome(rung, state, reason, time.monotonic() - begin, found)


def _run(site: Site, rung: Rung, say: Say) -> RunDir:
    """The rung's run, which has ended."""
    words = [*rungs.flags(rung, site.flags), f"--name=acceptance-{rung.name}"]
    config = submit_grpo.configure(site.command, words)
    submit_grpo.check_target(config, site.submits)
    sources = submit_grpo.sources_of(site.command, words)
    config, layout, _ = submit_grpo.plan(config, sources, site.command.cluster, download=True)
    driver = driver_command(config, site.submits)
    if not site.submits:
        run = RunDir.create(Path(config.cluster.run_root), config.name, config.cluster.share)
        run.write_config(config, layout)
        write_provenance(run, sys.argv)
        local.run_local(config, layout, run, driver)
        return run
    inputs.check_environment(config)
    run = _submit(config, layout, driver)
    _wait(run, site.patience_s, lambda text: say(f"{rung.title}: {text}"))
    return run


def driver_command(config: RunConfig, submits: bool) -> str:
    """What node agents start as the driver, with the Python that they have themselves."""
    python = sbatch.python_of(config) if submits else sys.executable
    return shlex.join(module_command(python, "tools.acceptance.driver"))


def _submit(config: RunConfig, layout: Layout, driver: str) -> RunDir:
    name = "submitit" if batch_script.by_submitit(config) else "sbatch"
    submitter = resolve(name, submit_grpo.SUBMITTERS, "cluster.submit")
    with submit_grpo.prepared(config, layout, None) as run:
        submitter(config, layout, run, driver)
    return run


def _wait(run: RunDir, patience_s: float, say: Say) -> None:
    """Until the run's job is over. RunError where it waits too long, at first or between two
    attempts; it is cancelled then, and where the ladder is interrupted.
    """
    told = ""
    alike = 0
    job_id = ""
    ran_at = time.monotonic()
    try:
        while alike < _NUM_ALIKE:
            job_id = str(facts(run.job).get("job_id", job_id))
            state, reason = _state_of(job_id, run)
            alike = alike + 1 if state in _OVER else 0
            text = f"job {job_id} is {state}" + (f" ({reason})" if reason else "")
            if text != told and state not in _OVER:
                say(text)
            told = text
            if state not in ("PENDING", _UNKNOWN):
                ran_at = time.monotonic()
            elif time.monotonic() - ran_at > patience_s:
                raise RunError(
                    f"its job waited for {patience_s / 60:.0f} min ({reason}); try again when the "
                    "cluster has room, or be more patient with --patience-min"
                )
            time.sleep(_LOOK_S)
    except BaseException:
        if job_id:
            ask(["scancel", job_id], _ANSWER_S)
        raise


def _state_of(job_id: str, run: RunDir) -> tuple[str, str]:
    """The state of the run's job, and SLURM's reason for it, if any."""
    found = job_facts(job_id) if job_id else {}
    if "JobState" in found:
        return found["JobState"], found.get("Reason", "None").removesuffix("None")
    attempt = run.latest_attempt()
    has_ended = attempt is not None and attempt.ended() is not None and not attempt.can_go_on()
    if has_ended or (job_id and _is_forgotten(job_id)):
        return _FORGOTTEN, ""
    return _UNKNOWN, "SLURM does not answer"


def _is_forgotten(job_id: str) -> bool:
    """Whether SLURM answers, and knows no such job: it forgets one some minutes after its end."""
    try:
        done = ask(["squeue", "-h", "-j", job_id], _ANSWER_S, env={**os.environ, "LC_ALL": "C"})
    except (RunError, OSError):
        return False
    if done.returncode == 0:
        return not done.stdout.strip()
    return "Invalid job id" in done.stderr


def _learn(run: RunDir, report: Report) -> None:
    """The names of the run's nodes, and from which code it was made."""
    for attempt in run.all_attempts():
        for file in (attempt.path / "nodes").glob("*.json"):
            report.hidden.hosts.add(str(facts(file).get("name", "")))
        report.hidden.hosts.add(str(attempt.record["host"]))
    of_code = facts(run.provenance)
    versions = of_code.get("versions", {})
    report.code = {
        # A whole one looks like a secret.
        "commit": str(of_code.get("git_commit", ""))[:12],
        "changed": bool(of_code.get("git_diff")),
        "python": of_code.get("python"),
        "versions": versions,
    }


def nodes_of(partition: str) -> int | None:
    """How many nodes a partition has, or the largest one; None where SLURM does not say."""
    numbers = []
    for line in slurm_says("scontrol", "show", "partition", "--oneliner").splitlines():
        found = dict(re.findall(r"(\S+?)=(\S*)", line))
        if partition in ("", found.get("PartitionName")):
            most = [found.get(key, "") for key in ("TotalNodes", "MaxNodes")]
            numbers.append(min((int(number) for number in most if number.isdigit()), default=0))
    return max(numbers, default=0) or None


def interrupt_by_signals() -> None:
    """SIGTERM and a lost terminal end the ladder as Ctrl-C does, so that its job is cancelled; with
    nohup it outlives its terminal.
    """

    def interrupt(*_: object) -> None:
        # A shell starts what a script puts into the background deaf to SIGINT.
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
