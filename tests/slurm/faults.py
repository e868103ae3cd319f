"""What can happen to a run on a real SLURM, and how a test has it happen at a point of the run.

The driver stands still while a fault comes, so that it comes exactly there.
"""

import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tests import process_table
from tests.process_table import Process
from tests.slurm.submitted import Phase, Submitted, frozen, json_lines, shared_memory

# An attempt that meets its fault at the start makes no step, so that comes first.
POINTS = ("start", "generate", "train", "sync", "save", "between", "random")
PHASES = {"generate": "generate", "train": "train", "sync": "weight_sync", "save": "checkpoint"}
START_DEADLINE_S = 120.0
END_DEADLINE_S = 240.0
NOTICE_DEADLINE_S = 40.0
# A random fault comes so many seconds after the first step of its attempt, or sooner.
RANDOM_WITHIN_S = 1.5


@dataclass(frozen=True, slots=True)
class Fault:
    # What the one line of the attempt that it ends has to say.
    cause: str
    # SLURM tells the run before it ends it.
    warns: bool = False


FAULTS = {
    "time limit": Fault(r"^SIGUSR2 at n\d", warns=True),
    "preempt": Fault(r"^SIGTERM at n\d", warns=True),
    "requeue": Fault(r"^SIGTERM at n\d", warns=True),
    "node down": Fault(r"^SIGTERM at n\d", warns=True),
    "slurmd lost": Fault(r"^attempt \d+ of .* so attempt \d+ ends and commits nothing more"),
    "agent": Fault(r"^the agent of n\d was killed by SIGKILL"),
    "guard": Fault(r"^the guard of the agent of n\d was killed"),
    "driver": Fault(r"^the driver was killed by SIGKILL"),
    "gcs": Fault(r"^Ray on n\d"),
    "raylet": Fault(r"^Ray on n\d"),
    "ray start": Fault(r"^Ray on n\d was killed by SIGKILL"),
    "trainer": Fault(r"^trainer rank 0 on node 0 .*died"),
    "sglang": Fault(r"engine-0|no engine is left"),
    "scheduler": Fault(r"engine-0|no engine is left"),
    "detokenizer": Fault(r"engine-0|no engine is left"),
    "rollout worker": Fault(r"rollout worker 0"),
}
OF_SLURM = ("time limit", "preempt", "requeue", "node down", "slurmd lost")
# The run may outlive these without a new attempt.
OF_ENGINES = ("sglang", "scheduler", "detokenizer")


@dataclass(frozen=True, slots=True)
class Strike:
    """A fault that has come to a run."""

    name: str
    point: str
    # The attempt that it came to, and how many steps were complete then, over all attempts.
    attempt: int
    completed: int
    # When the fault came, in seconds since the epoch.
    at: float
    # The processes of the run at the fault.
    family: frozenset[Process]
    # The names in /dev/shm that they held.
    shared: frozenset[str]

    @property
    def fault(self) -> Fault:
        return FAULTS[self.name]


def completed_steps(phases: Sequence[Phase]) -> int:
    return max((phase.step for phase in phases), default=0)


@dataclass(frozen=True, slots=True)
class Target:
    """Where in its present attempt a run shall meet the next fault."""

    job: Submitted
    point: str
    attempt: int
    # How many steps are complete then: an odd number, so that the last one is not committed.
    steps: int

    @classmethod
    def next(cls, job: Submitted, point: str) -> "Target":
        job.wait_for(job.attempts, START_DEADLINE_S)
        completed = completed_steps(job.phases())
        return cls(job, point, len(job.attempts()), (completed + 1) // 2 * 2 + 1)

    def is_reached(self) -> bool:
        phase, step = self.job.status()
        if self.point == "between":
            return len(json_lines(self.job.run.metrics)) == self.steps and step == self.steps
        return phase == PHASES[self.point] and step >= self.steps

    @contextmanager
    def held(self) -> Iterator[None]:
        """The driver stands still meanwhile, at the target."""
        job = self.job
        job.wait_for(lambda: job.victims("driver"), START_DEADLINE_S)
        [driver] = job.victims("driver")
        job.wait_for(lambda: job.status()[1] >= self.steps - 1, START_DEADLINE_S)
        while True:
            job.wait_for(self.is_reached, START_DEADLINE_S, 0.003)
            with frozen(driver.pid):
                if self.is_reached():
                    yield
                    return

    @contextmanager
    def at_random(self, rng: random.Random, start_s: float) -> Iterator[None]:
        """Somewhere in the start of the first attempt, or after the first step that an attempt
        makes.

        start_s: how long a start took where nothing happened; this one may be faster.
        """
        if self.point == "start":
            at = self.job.attempts()[-1].record["started"] + rng.uniform(0.0, start_s)
            while time.time() < at and self.job.status()[0] not in PHASES.values():
                time.sleep(0.05)
        else:
            self.job.wait_for(lambda: self.job.status()[1] >= self.steps, START_DEADLINE_S)
            time.sleep(rng.uniform(0.0, RANDOM_WITHIN_S))
        yield


def inject(job: Submitted, name: str, number: int) -> float:
    """Has the fault happen to attempt `number`; returns when, in seconds since the epoch."""
    cluster = job.cluster
    node = job.nodes()[-1]
    if name not in OF_SLURM:
        job.wait_for(lambda: job.victims(name), START_DEADLINE_S)
        victim = job.victims(name)[0]
        at = time.time()
        os.kill(victim.pid, signal.SIGKILL)
        return at
    at = time.time()
    if name == "time limit":
        # SLURM sends it so many seconds before.
        cluster.run("scancel", "--signal=USR2", str(job.job_id))
    elif name == "preempt":
        everything = ["--nodes=4", "--exclusive", "--output=/dev/null"]
        cluster.sbatch("--partition=urgent", *everything, "--wrap=sleep 1")
    elif name == "requeue":
        cluster.run("scontrol", "requeue", str(job.job_id))
    else:
        if name == "slurmd lost":
            daemon = cluster.daemons.pop(f"slurmd-{node}")
            daemon.kill()
            daemon.wait()
        # slurmctld does so itself where a slurmd is silent for SlurmdTimeout.
        cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
        # A slurmd that still answers brings its node back at once, and with the short wait of
        # requeued jobs here the job would start beside its own old step: SLURM holds it then.
        cluster.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=lost")
    attempt = job.run.attempt(number)
    if attempt.layout.can_lose_nodes:
        return at
    place = attempt.path

    def is_noticed() -> bool:
        told = [place / "stop.json", place / "end.json"]
        return len(job.attempts()) > number or any(path.exists() for path in told)

    process_table.wait_for(is_noticed, NOTICE_DEADLINE_S)
    return at


def strike(job: Submitted, name: str, point: str, start_s: float) -> Strike:
    """Brings the run to a point, has the fault happen there, and waits until it goes on."""
    target = Target.next(job, point)
    rng = random.Random(f"{name} {point}")
    is_random = point in ("start", "random")
    with ExitStack() as stack:
        stack.enter_context(target.at_random(rng, start_s) if is_random else target.held())
        if (name, point) == ("slurmd lost", "random"):
            # SLURM takes seconds to notice, in which the run would come to its end.
            stack.enter_context(frozen(job.victims("driver")[0].pid))
        family = frozenset(job.processes())
        shared = frozenset(shared_memory(family))
        completed = completed_steps(job.phases())
        at = inject(job, name, target.attempt)
    done = Strike(name, point, target.attempt, completed, at, family, shared)

    outlives_nodes = job.run.attempt(target.attempt).layout.can_lose_nodes

    def goes_on() -> bool:
        """Whether a step is complete that was not at the fault, in a newer attempt where the
        fault has to end its own. A run with engines on other nodes outlives the loss of one.
        """
        later = [phase for phase in job.phases() if phase.attempt > done.attempt]
        before = completed_steps([p for p in job.phases() if p.attempt <= done.attempt])
        if (name in OF_ENGINES or outlives_nodes) and not later:
            # One step more: what a fault breaks may only be needed in the next.
            return before > completed + 1
        return completed_steps(later) > before

    job.wait_for(goes_on, END_DEADLINE_S)
    return done
