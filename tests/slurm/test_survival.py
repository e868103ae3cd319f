"""Whatever happens to a run on a real SLURM, it goes on by itself, and no committed step is lost or
made twice.

`pytest -m matrix tests/slurm/test_survival.py`; -k "driver and train" picks cases.

A run of eight steps, committed after every second one, is brought to a point; its driver stands
still there while the fault comes, so that it comes exactly there. Then nobody touches it. All that
is checked is read from the run's files, from SLURM and from the table of processes. Each case
prints a row of the table in tests/RESULTS.md. Seconds lost are those of work that is made again;
the seconds to the next step end where a step is complete that no attempt had completed before.
"""

import math
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.checkout import ROOT
from nanoslime.run_dir import DONE
from tests import process_table
from tests.jobs.made_run import scratches
from tests.process_table import Process
from tests.slurm.cluster import SlurmCluster
from tests.slurm.submitted import Phase, Submitted, frozen, json_lines, shared_memory

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.slurm,
    pytest.mark.ray,
    pytest.mark.megatron,
    pytest.mark.timeout(600),
]
NUM_STEPS = 8
SAVE_INTERVAL = 2
# The fault comes in this step, or just before it: the one before is not committed.
STEP = 3
COMMON = f"""--num-rollout {NUM_STEPS} --save-interval {SAVE_INTERVAL} --rollout-batch-size 16
    --eval.max-prompts 8 --cluster.slots-per-node 1 --tp-size 1 --pp-size 1""".split()
# One trainer rank; the engine is in the driver.
EMBEDDED = [*COMMON, "--nodes", "1", "--engine", "embedded"]
# One trainer rank on the first node, an SGLang engine on each other one.
SGLANG = [*COMMON, "--nodes", "2"]
TWO_ENGINES = [*COMMON, "--nodes", "3", "--cluster.rollout-nodes", "2"]
POINTS = ("start", "generate", "train", "sync", "save", "between", "random")
PHASES = {"generate": "generate", "train": "train", "sync": "weight_sync", "save": "checkpoint"}
# What an interrupted group has cost, and how long everything took, may differ.
OF_THE_ATTEMPT = re.compile(r"time/|router/|tracking/|rollout/generated_tokens")
START_DEADLINE_S = 120.0
END_DEADLINE_S = 240.0
NOTICE_DEADLINE_S = 40.0


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
    "slurmd lost": Fault(r"^attempt 2 of .* so attempt 1 ends and commits nothing more"),
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
OF_ENGINES = ("sglang", "scheduler", "detokenizer", "rollout worker")
OF_ONE_NODE = [name for name in FAULTS if name not in OF_ENGINES]


@dataclass(frozen=True, slots=True)
class Struck:
    """A run that has met a fault and has ended."""

    job: Submitted
    fault: Fault
    # When the fault came, in seconds since the epoch.
    at: float
    # How SLURM left the job.
    state: str
    # The processes of the run at the fault.
    family: set[Process]
    # The names in /dev/shm that they held.
    shared: set[str]


@pytest.fixture(scope="module")
def patient() -> Iterator[SlurmCluster]:
    """Four nodes on which a job has SLURM's usual time from SIGTERM to SIGKILL."""
    with SlurmCluster(kill_wait_s=30) as cluster:
        yield cluster


@pytest.fixture
def idle_nodes(patient: SlurmCluster) -> Iterator[SlurmCluster]:
    yield patient
    patient.reset()


@pytest.fixture
def slurm(
    idle_nodes: SlurmCluster, no_leftovers: None, monkeypatch: pytest.MonkeyPatch
) -> SlurmCluster:
    """The daemons that `idle_nodes` starts again come after the look for leftovers."""
    monkeypatch.setenv("SLURM_CONF", str(idle_nodes.config_file))
    monkeypatch.chdir(ROOT)
    return idle_nodes


@pytest.fixture(scope="module")
def undisturbed(
    patient: SlurmCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Submitted]:
    """A run that nothing happens to: its steps are the right ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(patient.config_file))
        patch.chdir(ROOT)
        job = Submitted.begin(patient, tmp_path_factory.mktemp("undisturbed"), EMBEDDED)
        assert job.wait_for_end(END_DEADLINE_S) == "COMPLETED", job.log_ends()
    yield job


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    def tell(*cells: object) -> None:
        with capsys.disabled():
            print(f"\n| {' | '.join(map(str, cells))} |", flush=True)

    return tell


def is_at(job: Submitted, point: str, fault: str) -> bool:
    phase, step = job.status()
    if point == "start":
        has_victim = fault in OF_SLURM or bool(job.victims(fault))
        return phase == "start" and has_victim
    if point == "between":
        return len(json_lines(job.run.metrics)) == STEP
    return phase == PHASES[point] and step >= STEP


@contextmanager
def held_at(job: Submitted, point: str, fault: str) -> Iterator[None]:
    """The driver stands still meanwhile, at a point of the run where the fault can come."""
    job.wait_for(lambda: job.victims("driver"), START_DEADLINE_S)
    [driver] = job.victims("driver")
    while True:
        job.wait_for(lambda: is_at(job, point, fault), START_DEADLINE_S, 0.001)
        with frozen(driver.pid):
            if is_at(job, point, fault):
                yield
                return


@contextmanager
def after(job: Submitted, wait_s: float) -> Iterator[None]:
    """So long after the job's first attempt has begun, wherever the run is then."""
    job.wait_for(job.attempts, START_DEADLINE_S)
    begin = job.attempts()[0].record["started"]
    time.sleep(max(0.0, begin + wait_s - time.time()))
    yield


def inject(job: Submitted, fault: str) -> float:
    """Has the fault happen; returns when that was, in seconds since the epoch."""
    cluster = job.cluster
    node = job.nodes()[-1]
    if fault not in OF_SLURM:
        job.wait_for(lambda: job.victims(fault), START_DEADLINE_S)
        victim = job.victims(fault)[0]
        at = time.time()
        os.kill(victim.pid, signal.SIGKILL)
        return at
    at = time.time()
    if fault == "time limit":
        # SLURM sends it so many seconds before.
        cluster.run("scancel", "--signal=USR2", str(job.job_id))
    elif fault == "preempt":
        everything = ["--nodes=4", "--exclusive", "--output=/dev/null"]
        cluster.sbatch("--partition=urgent", *everything, "--wrap=sleep 1")
    elif fault == "requeue":
        cluster.run("scontrol", "requeue", str(job.job_id))
    else:
        if fault == "slurmd lost":
            daemon = cluster.daemons.pop(f"slurmd-{node}")
            daemon.kill()
            daemon.wait()
        # slurmctld does so itself where a slurmd is silent for SlurmdTimeout.
        cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
    first = job.attempts()[0]

    def is_noticed() -> bool:
        told = [first.path / "stop.json", first.path / "end.json"]
        return len(job.attempts()) > 1 or any(path.exists() for path in told)

    process_table.wait_for(is_noticed, NOTICE_DEADLINE_S)
    return at


def strike(
    job: Submitted, fault: str, place: Callable[[Submitted], AbstractContextManager[None]]
) -> Struck:
    """Brings the run to a place, has the fault happen there, and waits for the job's end."""
    with place(job):
        family = set(job.processes())
        shared = shared_memory(family)
        at = inject(job, fault)
    state = job.wait_for_end(END_DEADLINE_S)
    return Struck(job, FAULTS[fault], at, state, family, shared)


@dataclass(frozen=True, slots=True)
class Tally:
    """What a fault has cost, by the run's files; NaN for what did not come to pass."""

    detect_s: float
    # Work that was made again, and how many complete steps were among it.
    lost_s: float
    made_again: int
    next_step_s: float
    # Groups of the first step after the fault that were sampled before it.
    reused: int
    # The number of steps after which the run went on.
    resumed: int
    cause: str


def tally(struck: Struck) -> Tally:
    job = struck.job
    phases = job.phases()
    attempts = job.attempts()
    first = [phase for phase in phases if phase.attempt == 1]
    later = [phase for phase in phases if phase.attempt > 1]
    completed = max((phase.step for phase in first), default=0)
    told = [json_time(attempts[0].path / name) for name in ("stop.json", "end.json")]
    told += [attempt.record["started"] for attempt in attempts[1:2]]
    _, cause = attempts[0].ended() or (DONE, "")
    if len(attempts) == 1:
        # The run went on where it was.
        at_fault = max((phase.step for phase in first if phase.time < struck.at), default=0)
        next_step = _first_after(first, at_fault)
        return Tally(math.nan, 0.0, 0, next_step - struck.at, 0, at_fault, cause)
    resumed = next((phase.step for phase in later if phase.name == "generate"), completed)
    began = [p.time for p in first if p.name == "generate" and p.step == resumed]
    next_step = _first_after(later, max(completed, resumed))
    return Tally(
        detect_s=min(told) - struck.at,
        lost_s=max(0.0, struck.at - began[0]) if began else 0.0,
        made_again=completed - resumed,
        next_step_s=next_step - struck.at,
        reused=_reused(job, resumed),
        resumed=resumed,
        cause=cause,
    )


def seconds(value: float) -> str:
    return f"{value:.1f} s" if math.isfinite(value) else "-"


def json_time(path: Path) -> float:
    """When a file of an attempt was written; infinity where it is not there."""
    return path.stat().st_mtime if path.exists() else math.inf


def _first_after(phases: list[Phase], step: int) -> float:
    return next((phase.time for phase in phases if phase.step > step), math.nan)


def _reused(job: Submitted, step: int) -> int:
    """Groups of a step all of whose tokens older weights than its own have sampled."""
    samples = job.recorded().get(step, [])
    fresh = {s["group"] for s in samples if any(version == step for _, version in s["versions"])}
    return len({sample["group"] for sample in samples} - fresh)


def problems(struck: Struck, found: Tally) -> Iterator[str]:
    """What a user would not have expected, in short sentences."""
    job = struck.job
    if struck.state != "COMPLETED":
        yield f"the job is {struck.state}"
    attempts = job.attempts()
    if attempts[-1].ended() != (DONE, ""):
        yield f"attempt {attempts[-1].number} ended with {attempts[-1].ended()}"
    steps = [row["step"] for row in job.rows()]
    if steps != list(range(NUM_STEPS)):
        yield f"the steps are {steps}"
    yield from _samples_trained_twice(job)
    if len(attempts) > 1:
        yield from _steps_lost(struck, found)
        yield from _cause_not_told(struck, found)
    alive = struck.family | set(job.processes())
    if not process_table.wait_for(
        lambda: not alive & set(process_table.all_processes().values()), timeout_s=10.0
    ):
        left = alive & set(process_table.all_processes().values())
        yield f"processes are left: {[process.command[:80] for process in left]}"
    if left_dirs := scratches(job.run.path):
        yield f"scratch is left: {left_dirs}"
    # Those of other jobs on this machine are none of ours.
    if names := struck.shared & set(os.listdir("/dev/shm")):
        yield f"left in /dev/shm: {sorted(names)}"


def _samples_trained_twice(job: Submitted) -> Iterator[str]:
    recorded = job.recorded()
    if sorted(recorded) != list(range(NUM_STEPS)):
        yield f"recorded steps are {sorted(recorded)}"
    for key in ("group", "prompt"):
        step_of: dict[int, int] = {}
        for step, samples in recorded.items():
            for value in {sample[key] for sample in samples}:
                if step_of.setdefault(value, step) != step:
                    yield f"{key} {value} is in steps {step_of[value]} and {step}"


def _steps_lost(struck: Struck, found: Tally) -> Iterator[str]:
    attempts = struck.job.attempts()
    if len(attempts) > 2:
        causes = [attempt.ended() for attempt in attempts]
        yield f"it took {len(attempts)} attempts: {causes}"
    committed = attempts[1].record["rollouts"]
    if found.resumed != committed:
        yield f"{committed} steps were committed, and it went on after {found.resumed}"
    at_most = 0 if struck.fault.warns else SAVE_INTERVAL
    if found.made_again > at_most:
        yield f"{found.made_again} complete steps were made again, at most {at_most} should be"
    if math.isnan(found.next_step_s) and found.resumed < NUM_STEPS:
        yield "no attempt made a further step"


def _cause_not_told(struck: Struck, found: Tally) -> Iterator[str]:
    if "\n" in found.cause or not re.search(struck.fault.cause, found.cause):
        yield f"the cause is not told: {found.cause!r}"
    own = [phase for phase in struck.job.phases() if phase.attempt == 1]
    ends = [phase for phase in own if phase.name in ("failed", "stopped")]
    # An attempt that another has taken over leaves the status to that one.
    if not ends and not found.cause.startswith("attempt 2 of"):
        yield f"the last status of attempt 1 is {own[-1].name if own else 'none'}"
    for phase in ends:
        if phase.error and phase.error not in found.cause and found.cause not in phase.error:
            yield f"the status has another cause: {phase.error!r}"


def different_steps(job: Submitted, undisturbed: Submitted) -> Iterator[str]:
    """Metrics that are not those of the undisturbed run, bit for bit."""
    for own, right in zip(job.rows(), undisturbed.rows(), strict=False):
        keys = sorted(key for key in own.keys() | right.keys() if not OF_THE_ATTEMPT.match(key))
        wrong = [
            f"{key} {own.get(key)} for {right.get(key)}"
            for key in keys
            if own.get(key) != right.get(key)
        ]
        if wrong:
            yield f"step {right['step']} has {len(wrong)} other metrics: {'; '.join(wrong[:3])}"


def check(struck: Struck, names: tuple[str, str], tell: Callable[..., None], *more: str) -> Tally:
    """Prints the row of the table; fails with everything that was not as it should be."""
    found = tally(struck)
    wrong = [*problems(struck, found), *more]
    number = len(struck.job.attempts())
    outcome = "goes on" if number == 1 else f"goes on in attempt {number}"
    outcome = f"FELL: {'; '.join(wrong)}" if wrong else outcome
    lost = f"{seconds(found.lost_s)}, {found.made_again} steps"
    cells = (seconds(found.detect_s), lost, seconds(found.next_step_s), found.reused)
    tell(*names, outcome, *cells, found.cause[:160])
    assert not wrong, "\n".join([*wrong, struck.job.log_ends()])
    return found


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("fault", OF_ONE_NODE)
def test_a_run_of_one_node_goes_on_as_if_nothing_had_been(
    slurm: SlurmCluster,
    tmp_path: Path,
    undisturbed: Submitted,
    tell: Callable[..., None],
    point: str,
    fault: str,
) -> None:
    job = Submitted.begin(slurm, tmp_path, EMBEDDED, undisturbed.run.model)
    # Within the first four fifths of the undisturbed run, whose nodes may have been faster.
    [whole] = undisturbed.attempts()
    whole_s = json_time(whole.path / "end.json") - whole.record["started"]
    wait_s = random.Random(fault).uniform(0.0, 0.8 * whole_s)
    told = f"random: {wait_s:.1f} s" if point == "random" else point

    def place(job: Submitted) -> AbstractContextManager[None]:
        return after(job, wait_s) if point == "random" else held_at(job, point, fault)

    struck = strike(job, fault, place)
    check(struck, (told, fault), tell, *different_steps(job, undisturbed))


@pytest.mark.parametrize(("fault", "point"), [("preempt", "train"), ("driver", "generate")])
def test_rollouts_that_were_finished_ahead_are_trained_after_a_fault(
    slurm: SlurmCluster,
    tmp_path: Path,
    undisturbed: Submitted,
    tell: Callable[..., None],
    fault: str,
    point: str,
) -> None:
    """The engine samples a rollout ahead; what a commit holds of it need not be sampled again."""
    flags = [*EMBEDDED, "--max-staleness", "1"]
    job = Submitted.begin(slurm, tmp_path, flags, undisturbed.run.model)
    struck = strike(job, fault, lambda job: held_at(job, point, fault))
    found = check(struck, (f"{point}, one rollout ahead", fault), tell)
    assert found.reused > 0


@pytest.mark.sglang
@pytest.mark.parametrize(
    ("fault", "point", "num_attempts"),
    [
        ("sglang", "generate", (1,)),
        ("sglang", "sync", (1, 2)),
        ("scheduler", "generate", (1,)),
        ("detokenizer", "generate", (1,)),
        ("rollout worker", "generate", (2,)),
        ("trainer", "train", (2,)),
        ("preempt", "generate", (2,)),
        ("gcs", "sync", (2,)),
    ],
)
def test_a_run_with_all_its_parts_goes_on(
    slurm: SlurmCluster,
    tmp_path: Path,
    undisturbed: Submitted,
    tell: Callable[..., None],
    fault: str,
    point: str,
    num_attempts: tuple[int, ...],
) -> None:
    job = Submitted.begin(slurm, tmp_path, SGLANG, undisturbed.run.model)
    struck = strike(job, fault, lambda job: held_at(job, point, fault))
    number = len(job.attempts())
    more = [] if number in num_attempts else [f"{number} attempts, not one of {num_attempts}"]
    check(struck, (f"{point}, SGLang", fault), tell, *more)


@pytest.mark.sglang
@pytest.mark.parametrize("fault", ["node down", "slurmd lost"])
def test_a_run_that_loses_a_node_of_engines_goes_on_with_the_others(
    slurm: SlurmCluster,
    tmp_path: Path,
    undisturbed: Submitted,
    tell: Callable[..., None],
    fault: str,
) -> None:
    """The last node of the job holds the second of two engines; the trainer's node lives."""
    job = Submitted.begin(slurm, tmp_path, TWO_ENGINES, undisturbed.run.model)
    struck = strike(job, fault, lambda job: held_at(job, "generate", fault))
    number = len(job.attempts())
    more = [f"it began anew, in attempt {number}"] if number > 1 else []
    check(struck, ("generate, two engines", f"{fault} of an engine"), tell, *more)
