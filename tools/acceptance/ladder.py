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

from jobs import inputs, local, sbatch, submit_grpo
from jobs.cluster_env import job_facts, slurm_says
from nanoslime.config import RunConfig
from nanoslime.layout import Layout
from nanoslime.plugins import resolve
from nanoslime.processes.command import ask
from nanoslime.run_dir import RunDir
from nanoslime.types import RunError
from tools.acceptance import checks, rungs
from tools.acceptance.report import Outcome, Report
from tools.acceptance.rungs import Rung
from tools.watch.status import facts

# SLURM's job goes through states in which others end while it is requeued.
_NUM_ALIKE = 3
_LOOK_S = 2.0
_SCANCEL_S = 30.0
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")
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


def climb(site: Site, say: Say) -> Report:
    """Runs rung after rung until one fails, or needs more nodes than there are."""
    report = Report()
    cluster = submit_grpo.configure(site.command, list(site.flags)).cluster
    ends = ""
    for rung in _asked(rungs.ladder(cluster), site.up_to):
        if not ends and site.max_nodes is not None and rung.num_nodes > site.max_nodes:
            ends = f"it takes {rung.num_nodes} nodes, and there are {site.max_nodes}"
        impossible = ends or rung.impossible
        if report.outcomes and not report.is_good:
            report.outcomes.append(Outcome(rung, "not reached"))
        elif impossible:
            say(f"{rung.title}: left out, {impossible}")
            report.outcomes.append(Outcome(rung, "impossible", impossible))
        else:
            say(f"{rung.title}: begins")
            outcome = _try(site, rung, report, say)
            report.outcomes.append(outcome)
            say(f"{rung.title}: {outcome.state} after {outcome.seconds:.0f} s {outcome.reason}")
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
    _learn_names(run, report)
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
    driver = shlex.join([sys.executable, "-m", "tools.acceptance.driver"])
    if not site.submits:
        run = RunDir.create(Path(config.cluster.run_root), config.name, config.cluster.share)
        run.write_config(config, layout)
        run.write_provenance(sys.argv)
        local.run_local(config, layout, run, driver)
        return run
    inputs.check_environment(config)
    run = _submit(config, layout, driver)
    _wait(run, site.patience_s, lambda text: say(f"{rung.title}: {text}"))
    return run


def _submit(config: RunConfig, layout: Layout, driver: str) -> RunDir:
    name = "submitit" if sbatch.by_submitit(config) else "sbatch"
    submitter = resolve(name, submit_grpo.SUBMITTERS, "cluster.submit")
    with submit_grpo.prepared(config, layout, None) as run:
        submitter(config, layout, run, driver)
    return run


def _wait(run: RunDir, patience_s: float, say: Say) -> None:
    """Until the run's job is over. RunError where it waits too long; it is cancelled then, and
    where the ladder is interrupted.
    """
    told = ""
    alike = 0
    begin = time.monotonic()
    try:
        while alike < _NUM_ALIKE:
            job_id = str(facts(run.job).get("job_id", ""))
            found = job_facts(job_id)
            # SLURM forgets a job some minutes after its end.
            state = found.get("JobState", "COMPLETED")
            alike = alike + 1 if state in _OVER else 0
            reason = found.get("Reason", "None")
            text = f"job {job_id} is {state}" + ("" if reason == "None" else f" ({reason})")
            if text != told and state not in _OVER:
                say(text)
            told = text
            never_ran = run.latest_attempt() is None
            if never_ran and state == "PENDING" and time.monotonic() - begin > patience_s:
                raise RunError(
                    f"its job waited for {patience_s / 60:.0f} min ({reason}); try again when the "
                    "cluster has room, or be more patient with --patience-min"
                )
            time.sleep(_LOOK_S)
    except BaseException:
        ask(["scancel", str(facts(run.job).get("job_id", ""))], _SCANCEL_S)
        raise


def _learn_names(run: RunDir, report: Report) -> None:
    """What a report must not say, and from which code the run was made."""
    for attempt in run.all_attempts():
        for file in (attempt.path / "nodes").glob("*.json"):
            report.names.add(str(facts(file).get("name", "")))
        report.names.add(str(attempt.record["host"]))
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


def interrupt_by_sigterm() -> None:
    """SIGTERM ends the ladder as Ctrl-C does, so that its job is cancelled."""

    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGTERM, interrupt)
