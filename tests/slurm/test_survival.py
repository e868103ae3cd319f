"""Whatever happens to a run on a real SLURM, it goes on by itself, and no committed step is lost or
made twice.

`pytest -m matrix tests/slurm/test_survival.py`; -k "guard_at_sync" picks the run with that fault.

One run meets three faults, one after the other, each in an attempt of its own: what an attempt
before it has left is there, as in a long run. The first four runs have each fault once, at various
points; all runs have each fault at each point. Checkpoints are committed
after every second step, and a fault comes where the step before it is not committed. The driver
stands still while the fault comes, so that it comes exactly there. Nobody touches the run. All that
is checked is read from its files, from SLURM and from the table of processes. Each fault prints a
row of the table in tests/RESULTS.md. Seconds lost are those of work that is made again; the seconds
to the next step end where a step is complete that no attempt had completed before. Where a run does
not go on after a fault, the rest of the plan is tried on a new one.
"""

import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.checkout import ROOT
from nanoslime.run_dir import DONE, Attempt
from tests import process_table
from tests.jobs.made_run import scratches
from tests.process_table import Process
from tests.slurm.cluster import SlurmCluster
from tests.slurm.faults import (
    END_DEADLINE_S,
    FAULTS,
    OF_ENGINES,
    POINTS,
    Strike,
    completed_steps,
    strike,
)
from tests.slurm.submitted import Phase, Submitted

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.slurm,
    pytest.mark.ray,
    pytest.mark.megatron,
    pytest.mark.timeout(900),
]
NUM_STEPS = 20
SAVE_INTERVAL = 2
COMMON = f"""--num-rollout {NUM_STEPS} --save-interval {SAVE_INTERVAL} --rollout-batch-size 16
    --eval.max-prompts 8 --cluster.slots-per-node 1 --tp-size 1 --pp-size 1""".split()
# One trainer rank; the engine is in the driver.
EMBEDDED = [*COMMON, "--nodes", "1", "--engine", "embedded"]
# One trainer rank on the first node, an SGLang engine on each other one.
SGLANG = [*COMMON, "--nodes", "2"]
TWO_ENGINES = [*COMMON, "--nodes", "3", "--cluster.rollout-nodes", "2"]
# What an interrupted group has cost, and how long everything took, may differ.
OF_THE_ATTEMPT = re.compile(r"time/|router/|tracking/|rollout/generated_tokens")
# What compares the engine's logprobs with the trainer's. On a busy machine a request may come too
# late for the batch of the others, and its logprobs then differ in their last digits.
OF_THE_BATCH = re.compile(r"train/(importance_weight|ess_ratio|rollout_kl|logprob_gap)")
SAME_WITHIN = 1e-5
LEAVE_DEADLINE_S = 10.0
OF_ONE_NODE = [name for name in FAULTS if name not in (*OF_ENGINES, "rollout worker")]
NUM_A_RUN = 3


def plans() -> list[list[tuple[str, str]]]:
    """Every fault at every point; a plan has different faults and different points, in the order
    of the points.
    """
    found = []
    for shift in range(len(POINTS)):
        for first in range(0, len(OF_ONE_NODE), NUM_A_RUN):
            faults = OF_ONE_NODE[first : first + NUM_A_RUN]
            places = [(shift + first + i) % len(POINTS) for i in range(len(faults))]
            rows = sorted(zip(places, faults, strict=True))
            found.append([(fault, POINTS[place]) for place, fault in rows])
    return found


@pytest.fixture(scope="module")
def patient() -> Iterator[SlurmCluster]:
    """Four nodes on which a job has SLURM's usual time from SIGTERM to SIGKILL.

    A node that is set down stays so while its slurmd still answers: SLURM would else find the step
    of a job there that it has requeued, and kill it without a warning.
    """
    with SlurmCluster(kill_wait_s=30, settings={"ReturnToService": "1"}) as cluster:
        yield cluster


@pytest.fixture
def slurm(patient: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """Its nodes are idle before and after a test."""
    monkeypatch.setenv("SLURM_CONF", str(patient.config_file))
    monkeypatch.chdir(ROOT)
    yield patient
    patient.reset()


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


@dataclass(frozen=True, slots=True)
class Tally:
    """What a fault has cost, by the run's files; NaN for what did not come to pass."""

    detect_s: float = math.nan
    # Work that was made again, and how many complete steps were among it.
    lost_s: float = 0.0
    made_again: int = 0
    next_step_s: float = math.nan
    # Groups of the first step after the fault that were sampled before it.
    reused: int = 0
    # The number of steps after which the run went on.
    resumed: int = 0
    # The number of attempts that it took.
    attempts: int = 0
    cause: str = ""


def tally(job: Submitted, done: Strike) -> Tally:
    phases = job.phases()
    attempts = job.attempts()
    own = [phase for phase in phases if phase.attempt == done.attempt]
    later = [phase for phase in phases if phase.attempt > done.attempt]
    number = done.attempt
    _, cause = attempts[number - 1].ended() or (DONE, "")
    if len(attempts) == number:
        # The run went on where it was.
        next_step = _first_after(own, done.completed)
        return Tally(next_step_s=next_step - done.at, resumed=done.completed)
    told = [json_time(attempts[number - 1].path / name) for name in ("stop.json", "end.json")]
    told.append(attempts[number].record["started"])
    completed = completed_steps([phase for phase in phases if phase.attempt <= number])
    resumed = next((phase.step for phase in later if phase.name == "generate"), completed)
    began = [p.time for p in own if p.name == "generate" and p.step == resumed]
    return Tally(
        detect_s=min(told) - done.at,
        lost_s=max(0.0, done.at - began[0]) if began else 0.0,
        made_again=completed - resumed,
        next_step_s=_first_after(later, completed) - done.at,
        reused=_reused(job, resumed),
        resumed=resumed,
        attempts=len(attempts) - number,
        cause=cause,
    )


def seconds(value: float) -> str:
    return f"{value:.1f} s" if math.isfinite(value) else "-"


def json_time(path: Path) -> float:
    """When a file of an attempt was written; infinity where it is not there."""
    return path.stat().st_mtime if path.exists() else math.inf


def _first_after(phases: Sequence[Phase], step: int) -> float:
    return next((phase.time for phase in phases if phase.step > step), math.nan)


def _reused(job: Submitted, step: int) -> int:
    """Groups of a step all of whose tokens older weights than its own have sampled."""
    samples = job.recorded().get(step, [])
    fresh = {s["group"] for s in samples if any(version == step for _, version in s["versions"])}
    return len({sample["group"] for sample in samples} - fresh)


def problems_of(job: Submitted, done: Strike, found: Tally) -> Iterator[str]:
    """What a user would not have expected of one fault, in short sentences."""
    if math.isnan(found.next_step_s):
        yield "no attempt made a further step"
    if not found.attempts:
        return
    attempt = job.run.attempt(done.attempt)
    if found.attempts > 1:
        causes = [later.ended() for later in job.attempts()[done.attempt - 1 :]]
        yield f"it took {found.attempts} attempts: {causes}"
    committed = job.attempts()[done.attempt].record["rollouts"]
    if found.resumed != committed:
        yield f"{committed} steps were committed, and it went on after {found.resumed}"
    at_most = 0 if done.fault.warns else SAVE_INTERVAL
    if found.made_again > at_most:
        yield f"{found.made_again} complete steps were made again, at most {at_most} should be"
    yield from _cause_not_told(job, done, found)
    if not process_table.wait_for(lambda: not _alive(done.family), LEAVE_DEADLINE_S):
        yield f"processes are left: {[process.command[:80] for process in _alive(done.family)]}"
    if left_dirs := scratches(attempt.path):
        yield f"scratch is left: {left_dirs}"
    # Those of other jobs on this machine are none of ours.
    if names := done.shared & set(os.listdir("/dev/shm")):
        yield f"left in /dev/shm: {sorted(names)}"


def _alive(processes: frozenset[Process]) -> set[Process]:
    return processes & set(process_table.all_processes().values())


def _cause_not_told(job: Submitted, done: Strike, found: Tally) -> Iterator[str]:
    if "\n" in found.cause or not re.search(done.fault.cause, found.cause):
        yield f"the cause is not told: {found.cause!r}"
    own = [phase for phase in job.phases() if phase.attempt == done.attempt]
    ends = [phase for phase in own if phase.name in ("failed", "stopped")]
    # An attempt that another has taken over leaves the status to that one.
    if not ends and not re.match(r"attempt \d+ of", found.cause):
        yield f"the last status of the attempt is {own[-1].name if own else 'none'}"
    for phase in ends:
        if phase.error and phase.error not in found.cause and found.cause not in phase.error:
            yield f"the status has another cause: {phase.error!r}"


def problems_of_run(job: Submitted, state: str) -> Iterator[str]:
    """What a user would not have expected of a run that has ended."""
    if state != "COMPLETED":
        yield f"the job is {state}"
    last = job.attempts()[-1]
    if last.ended() != (DONE, ""):
        yield f"attempt {last.number} ended with {last.ended()}"
    steps = [row["step"] for row in job.rows()]
    if steps != list(range(NUM_STEPS)):
        yield f"the steps are {steps}"
    recorded = job.recorded()
    if sorted(recorded) != list(range(NUM_STEPS)):
        yield f"recorded steps are {sorted(recorded)}"
    for key in ("group", "prompt"):
        step_of: dict[int, int] = {}
        for step, samples in recorded.items():
            for value in {sample[key] for sample in samples}:
                if step_of.setdefault(value, step) != step:
                    yield f"{key} {value} is in steps {step_of[value]} and {step}"
    if not process_table.wait_for(lambda: not job.processes(), LEAVE_DEADLINE_S):
        yield f"processes are left: {[process.command[:80] for process in job.processes()]}"
    if left_dirs := [path for path in scratches(job.run.path) if not _is_of_lost_node(last, path)]:
        yield f"scratch is left: {left_dirs}"


def _is_of_lost_node(attempt: Attempt, scratch: Path) -> bool:
    """Whether SLURM has killed all that could have removed it, and the run went on without."""
    node = scratch.name.split("-")[1]
    is_lost = attempt.layout.can_lose_nodes and "left" not in attempt.heartbeats()[node]
    if is_lost:
        shutil.rmtree(scratch)
    return is_lost


def different_steps(job: Submitted, undisturbed: Submitted) -> Iterator[str]:
    """Metrics that are not those of the undisturbed run, bit for bit."""

    def are_same(key: str, own: Any, right: Any) -> bool:
        if OF_THE_BATCH.match(key) and None not in (own, right):
            return math.isclose(own, right, rel_tol=0.0, abs_tol=SAME_WITHIN)
        return bool(own == right)

    for own, right in zip(job.rows(), undisturbed.rows(), strict=False):
        keys = sorted(key for key in own.keys() | right.keys() if not OF_THE_ATTEMPT.match(key))
        wrong = [
            f"{key} {own.get(key)} for {right.get(key)}"
            for key in keys
            if not are_same(key, own.get(key), right.get(key))
        ]
        if wrong:
            yield f"step {right['step']} has {len(wrong)} other metrics: {'; '.join(wrong[:3])}"


@dataclass(frozen=True, slots=True)
class Trial:
    """Runs of these flags meet the faults of a plan."""

    slurm: SlurmCluster
    root: Path
    undisturbed: Submitted
    tell: Callable[..., None]
    flags: Sequence[str]
    # It stands beside the point in the table.
    remark: str = ""

    def run(self, plan: Sequence[tuple[str, str]]) -> list[Tally]:
        """Lives through the plan of (fault, point); fails with all that was not as it should be."""
        found: list[Tally] = []
        wrong: list[str] = []
        while len(found) < len(plan):
            root = self.root / f"from-{len(found)}"
            job = Submitted.begin(self.slurm, root, self.flags, self.undisturbed.run.model)
            for name, point in plan[len(found) :]:
                try:
                    one, wrong_here = self._meet(job, name, point)
                except AssertionError as error:
                    one, wrong_here = Tally(), [f"{name} at {point}: {error}"]
                found.append(one)
                wrong += wrong_here
                self.slurm.start_dead_nodes()
                if math.isnan(one.next_step_s):
                    break
            wrong += self._end(job)
        assert not wrong, "\n".join(wrong)
        return found

    def _meet(self, job: Submitted, name: str, point: str) -> tuple[Tally, list[str]]:
        [whole] = self.undisturbed.attempts()
        begun = next(p.time for p in self.undisturbed.phases() if p.name == "generate")
        try:
            done = strike(job, name, point, start_s=begun - whole.record["started"])
        except AssertionError as error:
            self.tell(point + self.remark, name, f"FELL: {str(error).splitlines()[0]}")
            raise
        found = tally(job, done)
        wrong = list(problems_of(job, done, found))
        outcome = f"goes on in attempt {done.attempt + found.attempts}" if found.attempts else ""
        outcome = f"FELL: {'; '.join(wrong)}" if wrong else outcome or "goes on where it was"
        lost = f"{seconds(found.lost_s)}, {found.made_again} steps"
        cells = (seconds(found.detect_s), lost, seconds(found.next_step_s), found.cause[:160])
        self.tell(point + self.remark, name, outcome, *cells)
        return found, [f"{name} at {point}: {line}" for line in wrong]

    def _end(self, job: Submitted) -> list[str]:
        """What was wrong with a run as a whole, once it has ended."""
        wrong = list(problems_of_run(job, job.wait_for_end(END_DEADLINE_S)))
        if "embedded" in self.flags and "--max-staleness" not in self.flags:
            wrong += different_steps(job, self.undisturbed)
        self.slurm.run("scancel", str(job.job_id), check=False)
        if wrong:
            self.tell(f"the whole run{self.remark}", "-", f"FELL: {'; '.join(wrong)}")
            wrong.append(job.log_ends())
        return wrong


@pytest.fixture
def trial(
    slurm: SlurmCluster, tmp_path: Path, undisturbed: Submitted, tell: Callable[..., None]
) -> Callable[..., Trial]:
    def make(flags: Sequence[str], remark: str = "") -> Trial:
        return Trial(slurm, tmp_path, undisturbed, tell, flags, remark)

    return make


def name_of(plan: Sequence[tuple[str, str]]) -> str:
    return "-".join(f"{fault}_at_{point}".replace(" ", "_") for fault, point in plan)


@pytest.mark.parametrize("plan", plans(), ids=name_of)
def test_a_run_of_one_node_goes_on_as_if_nothing_had_been(
    trial: Callable[..., Trial], plan: list[tuple[str, str]]
):
    trial(EMBEDDED).run(plan)


def test_rollouts_that_were_finished_ahead_are_trained_after_a_fault(trial: Callable[..., Trial]):
    """The engine samples a rollout ahead; what a commit holds of it need not be sampled again."""
    flags = [*EMBEDDED, "--max-staleness", "1"]
    plan = [("preempt", "train"), ("driver", "generate")]
    for found in trial(flags, ", one rollout ahead").run(plan):
        assert found.reused > 0


@pytest.mark.sglang
def test_an_engine_that_dies_is_started_anew_in_the_same_attempt(trial: Callable[..., Trial]):
    plan = [("sglang", "generate"), ("scheduler", "generate"), ("detokenizer", "generate")]
    found = trial(SGLANG, ", SGLang").run(plan)
    assert [one.attempts for one in found] == [0] * len(plan)


@pytest.mark.sglang
@pytest.mark.parametrize(
    "plan",
    [
        [("trainer", "train"), ("preempt", "generate"), ("gcs", "sync")],
        [("rollout worker", "generate"), ("sglang", "sync")],
    ],
    ids=name_of,
)
def test_a_run_with_all_its_parts_goes_on(trial: Callable[..., Trial], plan: list[tuple[str, str]]):
    trial(SGLANG, ", SGLang").run(plan)


@pytest.mark.sglang
@pytest.mark.parametrize("fault", ["node down", "slurmd lost"])
def test_a_run_that_loses_a_node_of_engines_goes_on_with_the_others(
    trial: Callable[..., Trial], fault: str
):
    """The last node of the job holds the second of two engines; the trainer's node lives."""
    [found] = trial(TWO_ENGINES, ", two engines").run([(fault, "generate")])
    assert not found.attempts
