"""The CPU job runs for hours on a real SLURM that keeps disturbing it; what grows is told.

    python -m tests.slurm.soak --hours 2
    python -m tests.slurm.soak --hours 0.1 --time-limit-min 2 -- --nodes 1 --engine embedded

The job has a time limit of 10 minutes, so SLURM ends and requeues it again and again. Meanwhile
other jobs preempt it at random times, and once in each hour one of its nodes loses power. Nobody
touches the run. At the end it is stopped, and has to have

    every step once, with finite losses, and no fall of the reward from one attempt to the next
    gone on by itself: one job, and as many requeues as there are attempts less one
    memory, open files and threads of every process flat within 5%
    the same of each role from attempt to attempt

A process lives for one attempt, which is 8 of the 10 minutes. Within it, the median of the first
quarter of its samples is compared with that of the last, from the moment at which its attempt has
made a few steps. The report has the medians of all four quarters too: what only warms up grows ever
less, and a leak goes on. Across attempts, the last quarters of the first attempts are compared with
those of the last ones, so that what a longer history costs is seen. Ctrl-C ends the run and shows
what there is. What follows `--` goes to jobs/submit_grpo.py, in place of JOB's flags of that name.

The limits of SLURM count in minutes, and slurmctld looks at them every 30 s: a job is told up to
30 s late that its time is nearly up. The signal lead is 120 s for that reason.
"""

import argparse
import csv
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import psutil

from jobs.checkout import ROOT
from nanoslime.run_dir import STOPPED
from tests import process_table
from tests.jobs.made_run import scratches
from tests.slurm.cluster import SlurmCluster
from tests.slurm.submitted import OVER, Submitted
from tools.watch import commands

# The smallest job with all parts: a trainer rank and an SGLang engine, each on a node of its own;
# two nodes of the four are spare.
JOB = {
    "--nodes": "2",
    "--cluster.slots-per-node": "1",
    "--tp-size": "1",
    "--pp-size": "1",
    "--num-rollout": "1000000",
    "--save-interval": "10",
    "--checkpoint.every-min": "1",
    "--eval.max-prompts": "50",
    "--rollout.record-keep": "5",
    "--lr": "1e-5",
}
SIGNAL_LEAD_S = 120
# As many clusters have it.
KILL_WAIT_S = 30
# A job that is requeued passes through states in which others end: it is over after so many looks.
NUM_OVER = 4
# A node that has lost power comes back after so long; slurmctld misses it after 30 s.
NODE_AWAY_S = 60.0
# So long a run may take to commit and end, when the time of the soak is over.
STOP_WAIT_S = 120
# An attempt is warm when it has made so many steps.
WARM_STEPS = 5
# A quarter holds at least so many samples of a process; one that lives shorter is not judged.
MIN_QUARTER = 5
FLAT_WITHIN = 0.05
QUANTITIES = ("rss_mib", "files", "threads")
# One open file or thread more is no growth.
SLACK = {"rss_mib": 0.0, "files": 1.0, "threads": 1.0}
# The reward of so many steps before an attempt's begin is compared with that of as many after it.
NUM_AROUND = 10
LARGEST_FALL = 0.15


class Sample(NamedTuple):
    """A process at one moment; `steps`: that its attempt has made."""

    time: float
    attempt: int
    role: str
    pid: int
    steps: int
    rss_mib: float
    files: int
    threads: int


class Event(NamedTuple):
    """`what` happens so many seconds after the begin."""

    after_s: float
    what: str


class Growth(NamedTuple):
    """Of a quantity of a process: medians of the four quarters of its samples."""

    attempt: int
    role: str
    quantity: str
    quarters: tuple[float, ...]

    @property
    def first(self) -> float:
        return self.quarters[0]

    @property
    def last(self) -> float:
        return self.quarters[-1]

    @property
    def share(self) -> float:
        """0.01: 1% more."""
        return self.last / self.first - 1 if self.first else 0.0

    @property
    def is_flat(self) -> bool:
        return self.last <= self.first * (1 + FLAT_WITHIN) + SLACK[self.quantity]


def plan_events(asked: argparse.Namespace) -> list[Event]:
    """Preemptions at random times, and the loss of a node in each hour, the last one begun
    included."""
    rng = random.Random(asked.seed)
    total_s = asked.hours * 3600
    num_preemptions = max(1, round(asked.hours * asked.preemptions_per_hour))
    events = [Event(rng.uniform(0.05, 0.9) * total_s, "preempt") for _ in range(num_preemptions)]
    for hour in range(math.ceil(asked.hours)):
        begin_s = 3600.0 * hour
        length_s = min(3600.0, total_s - begin_s)
        events.append(Event(begin_s + rng.uniform(0.05, 0.9) * length_s, "lose a node"))
    return sorted(events)


class Soak:
    """A run on its SLURM: what is done to it, and what was seen of it."""

    def __init__(self, asked: argparse.Namespace, cluster: SlurmCluster) -> None:
        self.asked = asked
        self.cluster = cluster
        self.samples: list[Sample] = []
        self.done: list[str] = []
        self._events = plan_events(asked)
        self._rng = random.Random(asked.seed + 1)
        self._node_back_at = math.inf
        lead_s = min(SIGNAL_LEAD_S, 20 * asked.time_limit_min)
        limits = ["--cluster.time-limit-min", str(asked.time_limit_min)]
        limits += ["--cluster.signal-lead-s", str(lead_s)]
        kept = {option: value for option, value in JOB.items() if option not in asked.flags}
        flags = [word for pair in kept.items() for word in pair]
        self.job = Submitted.begin(cluster, asked.out, [*flags, *limits, *asked.flags])
        self.begin = time.monotonic()

    def live(self) -> None:
        """Until the hours are over, or the job is."""
        end = self.begin + self.asked.hours * 3600
        with (self.asked.out / "samples.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(Sample._fields)
            num_over = 0
            while time.monotonic() < end and num_over < NUM_OVER:
                num_over = num_over + 1 if self.job.state() in OVER else 0
                self._disturb()
                found = list(self._look())
                table.writerows(found)
                file.flush()
                self.samples += found
                time.sleep(self.asked.sample_every_s)

    def _disturb(self) -> None:
        now_s = time.monotonic() - self.begin
        if now_s > self._node_back_at:
            self.cluster.start_dead_nodes()
            self._node_back_at = math.inf
        if not self._events or now_s < self._events[0].after_s or self.job.state() != "RUNNING":
            return
        what = self._events.pop(0).what
        if what == "preempt":
            everything = [f"--nodes={self.cluster.num_nodes}", "--exclusive", "--output=/dev/null"]
            self.cluster.sbatch("--partition=urgent", *everything, "--wrap=sleep 5")
        else:
            node = self._rng.choice(self.job.nodes())
            what = f"{node} loses power"
            self.cluster.kill_node(node)
            self._node_back_at = now_s + NODE_AWAY_S
        phase, step = self.job.status()
        self.done.append(f"{now_s:6.0f} s  {what}, in {phase} after {step} steps")
        print(self.done[-1], flush=True)

    def _look(self) -> Iterator[Sample]:
        """All processes of the run now."""
        attempts = self.job.attempts()
        if not attempts:
            return
        number = attempts[-1].number
        _, step = self.job.status()
        steps = step - attempts[-1].record["rollouts"]
        for process, role in self.job.processes().items():
            with suppress(psutil.Error):
                seen = psutil.Process(process.pid)
                with seen.oneshot():
                    rss_mib = seen.memory_info().rss / 2**20
                    counts = (seen.num_fds(), seen.num_threads())
                yield Sample(time.time(), number, role, process.pid, steps, rss_mib, *counts)

    def stop(self) -> None:
        """Ends the run as a person would. What it leaves is for the report."""
        if self.job.state() not in OVER:
            commands.main(["stop", "--wait", str(STOP_WAIT_S), str(self.job.run.path)])
            self.cluster.run("scancel", str(self.job.job_id), check=False)
            self.job.wait_for_end(2.0 * KILL_WAIT_S)


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """Of each process that was seen for long enough while its attempt was warm."""
    of_process: dict[tuple[int, str, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.steps >= WARM_STEPS and sample.role not in ("other", "srun"):
            of_process[sample.attempt, sample.role, sample.pid].append(sample)
    found = []
    for (attempt, role, _), own in of_process.items():
        if len(own) < 4 * MIN_QUARTER:
            continue
        ends = [len(own) * i // 4 for i in range(5)]
        for quantity in QUANTITIES:
            values = [getattr(sample, quantity) for sample in own]
            quarters = tuple(median(values[i:j]) for i, j in pairwise(ends))
            found.append(Growth(attempt, role, quantity, quarters))
    return found


def growths_across(grown: Sequence[Growth]) -> list[Growth]:
    """From attempt to attempt: the last quarters of a role's processes, in their attempts' order,
    and of these again the medians of four quarters. `attempt` is the last one.
    """
    of_role: dict[tuple[str, str], list[Growth]] = defaultdict(list)
    for one in grown:
        of_role[one.role, one.quantity].append(one)
    found = []
    for (role, quantity), own in of_role.items():
        if len(own) < 4:
            continue
        ends = [len(own) * i // 4 for i in range(5)]
        quarters = tuple(median(one.last for one in own[i:j]) for i, j in pairwise(ends))
        found.append(Growth(own[-1].attempt, role, quantity, quarters))
    return found


def problems(soak: Soak, grown: Sequence[Growth]) -> Iterator[str]:
    """What a user would not have expected, in short sentences."""
    job = soak.job
    rows = job.rows()
    steps = [row["step"] for row in rows]
    if not steps or steps != list(range(len(steps))):
        twice = sorted({step for step in steps if steps.count(step) > 1})
        yield f"{len(steps)} steps are not each there once: {twice[:5]} come twice"
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    if not all(map(math.isfinite, losses)):
        yield "a loss is not finite"
    yield from _falls(soak)
    attempts = job.attempts()
    if not attempts:
        yield "no attempt has begun"
        return
    restarts = int(soak.cluster.job(job.job_id)["Restarts"])
    if restarts != len(attempts) - 1:
        yield f"{len(attempts)} attempts, and SLURM counts {restarts} restarts"
    code, reason = attempts[-1].ended() or (None, "it has not told its end")
    if code != STOPPED:
        yield f"the last attempt was not stopped by us, code {code}: {reason}"
    if not grown:
        yield "no process was seen for long enough to say whether it grows"
    for one in grown:
        if not one.is_flat:
            values = " to ".join(f"{value:.0f}" for value in one.quarters)
            yield f"attempt {one.attempt}: {one.quantity} of {one.role} grows from {values}"
    for one in growths_across(grown):
        if not one.is_flat:
            values = " to ".join(f"{value:.0f}" for value in one.quarters)
            yield f"from attempt to attempt {one.quantity} of {one.role} grows from {values}"
    if not process_table.wait_for(lambda: not job.processes(), timeout_s=10.0):
        yield f"processes are left: {[process.command[:80] for process in job.processes()]}"


def _falls(soak: Soak) -> Iterator[str]:
    """Where the reward falls as an attempt begins."""
    rewards = {row["step"]: row["rollout/reward_mean"] for row in soak.job.rows()}
    for attempt in soak.job.attempts()[1:]:
        start = attempt.record["rollouts"]
        before = [rewards[s] for s in range(start - NUM_AROUND, start) if s in rewards]
        later = [rewards[s] for s in range(start, start + NUM_AROUND) if s in rewards]
        if len(before) == len(later) == NUM_AROUND and fmean(later) < fmean(before) - LARGEST_FALL:
            values = f"{fmean(before):.2f} to {fmean(later):.2f}"
            yield f"the reward falls from {values} where attempt {attempt.number} begins"


def report(soak: Soak, grown: Sequence[Growth]) -> Iterator[str]:
    """The tables of tests/RESULTS.md."""
    job = soak.job
    phases = job.phases()
    yield "| attempt | seconds | steps | how it ended |\n|---|---|---|---|"
    for attempt in job.attempts():
        own = [phase for phase in phases if phase.attempt == attempt.number]
        told = f"{attempt.record['rollouts']} to {max(p.step for p in own)}" if own else "-"
        seconds = f"{own[-1].time - attempt.record['started']:.0f}" if own else "-"
        _, reason = attempt.ended() or (None, "not told")
        yield f"| {attempt.number} | {seconds} | {told} | {reason[:160]} |"
    rows = job.rows()
    for name in ("rollout/reward_mean", "train/loss"):
        values = [row[name] for row in rows if name in row]
        tenth = max(1, len(values) // 10)
        means = [fmean(values[i : i + tenth]) for i in range(0, len(values) - tenth + 1, tenth)]
        yield f"\n{name} of {len(values)} steps by tenths: {' '.join(f'{m:.4f}' for m in means)}"
    yield f"\n| role | processes | {' | '.join(QUANTITIES)} |\n|{'---|' * (2 + len(QUANTITIES))}"
    across = growths_across(grown)
    for role in sorted({one.role for one in grown}):
        cells = []
        for quantity in QUANTITIES:
            own_growths = [g for g in grown if (g.role, g.quantity) == (role, quantity)]
            worst = max(own_growths, key=lambda growth: growth.share)
            cell = f"{_quarters(worst)}, attempt {worst.attempt}"
            later = [g for g in across if (g.role, g.quantity) == (role, quantity)]
            cells.append("; across: ".join([cell, *map(_quarters, later)]))
        yield f"| {role} | {len(own_growths)} | {' | '.join(cells)} |"
    yield "(medians of quarters, of the process that grew most and from attempt to attempt)\n"
    yield from soak.done


def _quarters(grown: Growth) -> str:
    return f"{' '.join(f'{value:.0f}' for value in grown.quarters)} ({grown.share:+.1%})"


def main(argv: list[str]) -> int:
    asked = _parse(argv)
    asked.out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    process_table.adopt_orphans()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    code = 0
    with SlurmCluster(kill_wait_s=KILL_WAIT_S) as cluster:
        os.environ["SLURM_CONF"] = str(cluster.config_file)
        soak = Soak(asked, cluster)
        print(f"{soak.job.run.path}: job {soak.job.job_id}, samples in {asked.out}", flush=True)
        try:
            soak.live()
        except KeyboardInterrupt:
            code = 130
        soak.stop()
        grown = growths(soak.samples)
        wrong = list(problems(soak, grown))
        print("\n".join(report(soak, grown)))
    for left in scratches(asked.out):
        # A node that has lost power cannot clean up.
        print(f"left on a lost node, and removed: {left}")
        shutil.rmtree(left)
    print("\n".join(f"FELL: {line}" for line in wrong) or "all held")
    return code or bool(wrong)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.slurm.soak", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--hours", type=float, required=True)
    parser.add_argument("--time-limit-min", type=int, default=10, help="of the job")
    parser.add_argument("--preemptions-per-hour", type=float, default=3.0)
    parser.add_argument("--sample-every-s", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0, help="of when it is disturbed")
    parser.add_argument("--out", type=Path, help="an empty directory; default: a new one in /tmp")
    parser.add_argument("flags", nargs="*", help="after --: flags of jobs/submit_grpo.py")
    asked = parser.parse_args(argv)
    asked.out = (asked.out or Path(tempfile.mkdtemp(prefix="soak-"))).absolute()
    return asked


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
