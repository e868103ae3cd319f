"""Whatever hangs in a run is named, with node, phase and frame, and ends its attempt."""

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from nanoslime import doctor as doctor_module
from nanoslime.config.cluster import ClusterConfig
from nanoslime.doctor import Doctor, Finding, end_if_hung
from nanoslime.processes.child import ChildProcess
from nanoslime.processes.phases import IDLE, own_report, read_tasks
from nanoslime.processes.tree import descendants
from nanoslime.rollout.rewards.pool import RewardFailed, RewardPool
from nanoslime.run_dir import FAILED, RunDir
from nanoslime.storage.shared_files import json_line
from nanoslime.types import MachineFailure
from tests import process_table
from tests.jobs import test_node
from tests.jobs.made_run import MadeRun, make_run
from tests.jobs.test_node import Rehearsal

clean = test_node.clean  # the fixture
python_with_fake_ray = test_node.python_with_fake_ray  # the fixture
FLOOR_S = 3.0
# What is learned of a task stays with this process, so each test has one of its own.
NUMBERS = count()
QUICK = ClusterConfig(hang_floor_s=FLOOR_S, hang_factor=8.0)


PULSES = """
import time
from nanoslime.processes.phases import own_report

while True:
    own_report().enter("the agent of n0", "watch")
    time.sleep(0.05)
"""


def begun(tmp_path: Path, python: str, mode: str, num_nodes: int = 1) -> Rehearsal:
    """A rehearsal whose driver has been through its phases some times."""
    made = make_run(tmp_path, num_nodes, hang_floor_s=FLOOR_S, hang_factor=2.0)
    rehearsal = Rehearsal(made, mode, python)
    rehearsal.wait_for_driver()
    time.sleep(1.5)
    return rehearsal


def pid_of(rehearsal: Rehearsal, *words: str) -> int:
    family = process_table.descendants(rehearsal.process.pid, process_table.all_processes())
    [pid] = [p.pid for p in family if all(word in p.command for word in words)]
    return pid


def stacks_of(made: MadeRun) -> str:
    folder = made.run.attempts / "1" / "stacks"
    return "\n".join(file.read_text() for file in folder.iterdir())


def test_a_stopped_driver_ends_its_attempt_with_its_name(
    tmp_path: Path, python_with_fake_ray: str
) -> None:
    rehearsal = begun(tmp_path, python_with_fake_ray, "steps")
    pid = pid_of(rehearsal, "driver_program", "--run")
    begin = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    code, _, err = rehearsal.finish()
    print(f"\nnamed after {time.monotonic() - begin:.1f} s; {err}", end="")
    assert code == FAILED
    assert f"driver-0 on node0 (pid {pid}, python) is stopped (T); the driver on node0 is in" in err
    assert f"=== {pid} " in stacks_of(rehearsal.made)


def test_a_driver_that_hangs_is_named_with_its_frame(
    tmp_path: Path, python_with_fake_ray: str
) -> None:
    rehearsal = begun(tmp_path, python_with_fake_ray, "hang")
    code, _, err = rehearsal.finish()
    print(f"\n{err}", end="")
    assert code == FAILED
    place = r"the driver on node0 is in phase generate for \d+ s, and may be for 3 s, at "
    assert re.search(place + r"tests/jobs/driver_program.py:\d+ in hang_here; ", err)
    assert err.count("\n") == 1
    assert "in hang_here" in stacks_of(rehearsal.made)


class Patient:
    """A doctor that looks at a task of this process, whose clock the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: RunDir) -> None:
        self.task = f"task {next(NUMBERS)}"
        self.now_s = time.monotonic()
        monkeypatch.setattr(doctor_module.time, "monotonic", lambda: self.now_s)
        self.run = run
        self.doctor = Doctor(QUICK, "n0", run.new_attempt())

    def look(self, after_s: float) -> list[Finding]:
        self.now_s += after_s
        found = self.doctor.examine([os.getpid()])
        return [finding for finding in found if finding.what.startswith(f"{self.task} on ")]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Patient]:
    made = Patient(monkeypatch, RunDir.create(tmp_path, "run"))
    yield made
    own_report().enter(made.task, IDLE)


def do_phases(patient: Patient, *durations_s: float) -> None:
    """The task goes through its phase for so long each time, and begins it once more."""
    for duration_s in durations_s:
        own_report().enter(patient.task, "work")
        patient.now_s += duration_s
    own_report().enter(patient.task, "work")


@pytest.mark.parametrize(
    ("durations_s", "deadline_s"),
    [
        ((1.0, 2.0), QUICK.hang_deadline_s),
        ((1.0, 2.0, 100.0), 16.0),
        ((0.1, 0.1, 0.1, 0.1), FLOOR_S),
        ((1.0,) * 30, 8.0),
        ((9.0,) * 30 + (1.0,) * 15, 8.0),
    ],
)
def test_a_deadline_is_learned_from_the_median(
    patient: Patient, durations_s: tuple[float, ...], deadline_s: float
) -> None:
    do_phases(patient, *durations_s)
    patient.look(0.0)
    left_s = deadline_s
    while left_s > 10:
        assert patient.look(10.0) == []
        left_s -= 10
    assert patient.look(left_s) == []
    [finding] = patient.look(0.25)
    assert finding.deadline_s == pytest.approx(deadline_s)
    place = f"{patient.task} on n0 is in phase work for {deadline_s:.0f} s, and may be for "
    assert finding.what.startswith(place)
    own_report().enter(patient.task, "other work")
    assert patient.look(1.0) == []


def test_what_an_earlier_run_of_the_process_has_left_is_not_late(patient: Patient) -> None:
    """Its task may have ended in a phase; looking at its stacks could end the process."""
    do_phases(patient, 0.1, 0.1, 0.1)
    patient.now_s += 1.0
    patient.doctor = Doctor(QUICK, "n0", patient.run.attempt(1))
    assert patient.look(1000.0) == []
    own_report().enter(patient.task, "work")
    assert patient.look(1000.0) != []


def write_phases(run: RunDir, *durations_s: float, phase: str = "work", last: str = "") -> None:
    """An attempt that has been through the phase for so long each time."""
    attempt = run.new_attempt()
    now = 1000.0
    rows = []
    for duration_s in durations_s:
        rows.append({"time": now, "phase": phase})
        rows.append({"time": now + duration_s, "phase": "other work"})
        now += 2 * duration_s
    rows.append({"time": now, "phase": phase})
    if last:
        rows.append({"time": now + 5000.0, "phase": last})
    attempt.phases.write_bytes(b"".join(map(json_line, rows)))


def late_after(patient: Patient, deadline_s: float) -> bool:
    """Whether the task is late when its phase has lasted so long, and was not before."""
    was_late = patient.look(0.99 * deadline_s) != []
    return not was_late and patient.look(0.02 * deadline_s) != []


@pytest.mark.parametrize("known_s", [(), (0.1, 0.1)])
@pytest.mark.parametrize(
    ("attempts_s", "deadline_s"),
    [
        ([(5.0, 1.0, 1.0)], 40.0),
        ([(5.0, 1.0, 1.0, 9.0, 2.0, 1.0, 1.0)], 40.0),
        ([(1.0, 1.0, 1.0, 9.0), (1.0, 6.0, 1.0, 1.0)], 48.0),
        ([(2.0,) * 3] * 12, 16.0),
        ([(1.0, 1.0), (2.0,)], 16.0),
        ([(0.1, 0.1, 0.1)], FLOOR_S),
        ([(1.0, 1.0)], QUICK.hang_deadline_s),
        ([], QUICK.hang_deadline_s),
    ],
)
def test_who_knows_too_little_goes_by_the_first_and_last_times_of_all_attempts(
    patient: Patient,
    attempts_s: list[tuple[float, ...]],
    deadline_s: float,
    known_s: tuple[float, ...],
) -> None:
    for durations_s in attempts_s:
        write_phases(patient.run, *durations_s, last="failed")
    do_phases(patient, *known_s)
    assert late_after(patient, deadline_s)


def test_what_a_task_knows_itself_comes_before_what_attempts_tell(patient: Patient) -> None:
    write_phases(patient.run, 5.0, 5.0, 5.0, last="failed")
    do_phases(patient, 1.0, 1.0, 1.0)
    assert late_after(patient, 8.0)


def test_a_phase_that_is_entered_again_and_again_lasts_since_it_began(patient: Patient) -> None:
    write_phases(patient.run, 2.0, 2.0, 2.0, last="failed")
    began = patient.now_s
    for _ in range(15):
        patient.now_s += 1.0
        own_report().enter(patient.task, "work", began)
        assert patient.look(0.0) == []
    assert patient.look(0.9) == []
    assert len(patient.look(0.2)) == 1


def test_half_a_line_of_the_driver_is_no_knowledge(patient: Patient) -> None:
    write_phases(patient.run, 1.0, 1.0, 1.0)
    file = patient.run.attempts / "2" / "phases.jsonl"
    file.write_bytes(file.read_bytes() + b'{"time": 12')
    do_phases(patient)
    assert patient.look(100.0) == []


@pytest.mark.parametrize(
    ("name", "is_resumed"), [("endless", False), ("endless", True), ("endless_async", True)]
)
def test_a_reward_that_answers_nothing_is_named_however_often_its_process_is_replaced(
    tmp_path: Path, name: str, is_resumed: bool
) -> None:
    """It has a deadline of its own, after which its process is replaced."""
    run = RunDir.create(tmp_path, "run")
    write_phases(run, 0.1, 0.1, 0.1, phase="generate", last="failed" if is_resumed else "")
    config = ClusterConfig(hang_floor_s=2.0, hang_factor=2.0)
    doctor = Doctor(config, "n0", run.new_attempt() if is_resumed else run.attempt(1))

    async def found() -> str:
        pool = RewardPool(f"tests.rollout.odd_rewards:{name}", 1, timeout_s=0.5)

        async def ask_again_and_again() -> None:
            while True:
                with suppress(RewardFailed):
                    await pool.call(("never", None, {}), {})

        assert await pool.call(("one", None, {}), {}) == 1.0
        asking = asyncio.create_task(ask_again_and_again())
        begin = time.monotonic()
        while not (findings := doctor.examine(descendants(os.getpid()))):
            assert time.monotonic() < begin + 10
            await asyncio.sleep(0.1)
        assert 2.0 < time.monotonic() - begin < 4.0
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await pool.close()
        [finding] = findings
        assert finding.deadline_s == 2.0
        return finding.what

    what = asyncio.run(found())
    phase = r"is in phase generate for \d s, and may be for 2 s"
    assert re.match(rf"reward tests.rollout.odd_rewards:{name} on n0 {phase}", what)
    if name == "endless":
        assert re.search(r"at tests/rollout/odd_rewards.py:\d+ in endless$", what)


def test_who_is_idle_is_never_late(patient: Patient) -> None:
    for _ in range(5):
        own_report().enter(patient.task, IDLE)
        own_report().enter(patient.task, "work")
    own_report().enter(patient.task, IDLE)
    for _ in range(100):
        assert patient.look(10.0) == []


def test_a_job_that_was_suspended_is_late_for_a_moment_and_goes_on(patient: Patient) -> None:
    do_phases(patient, 0.1, 0.1, 0.1)
    assert patient.look(1.0) == []
    found = patient.look(3600.0)
    assert len(found) == 1
    patient.doctor.judge(found)
    own_report().enter(patient.task, "other work")
    found = patient.look(2.0)
    assert found == []
    patient.doctor.judge(found)


def judged(patient: Patient, *findings: Finding) -> str:
    """What is said of these findings of a hang; it is not said at once."""
    patient.look(1.0)
    patient.doctor.judge(findings)
    patient.look(2.0)
    patient.doctor.judge(findings)
    patient.look(1.0)
    with pytest.raises(MachineFailure) as caught:
        patient.doctor.judge(findings)
    return str(caught.value)


def test_the_likeliest_cause_is_named_before_who_waits_for_it(patient: Patient) -> None:
    waits = Finding(3, 10.0, "the driver waits")
    works = Finding(2, 10.0, "rank 1 works")
    stopped = Finding(0, 0.0, "engine 0 is stopped (T)")
    raylet = Finding(1, 0.0, "a raylet is stopped (T)")
    stacks = patient.doctor.stacks
    line = judged(patient, waits, works)
    assert line == f"a hang: rank 1 works; the stacks of all processes: {stacks}"
    patient.doctor.judge([])
    line = judged(patient, raylet, waits, stopped)
    assert line.startswith("a hang: engine 0 is stopped (T); the driver waits; the stacks")


def test_what_is_late_no_more_and_who_is_stopped_alone_end_nothing(patient: Patient) -> None:
    late = Finding(3, 10.0, "the driver waits")
    for _ in range(3):
        for findings in ([late], [late], [Finding(1, 0.0, "a raylet is stopped (T)")]):
            patient.look(2.0)
            patient.doctor.judge(findings)
    assert not patient.doctor.stacks.exists()


def test_ranks_on_gpus_are_asked_for_what_nccl_has_done(tmp_path: Path) -> None:
    attempt = RunDir.create(tmp_path, "run").new_attempt()
    doctor = Doctor(QUICK, "n0", attempt)
    doctor.stacks.mkdir()
    for rank in range(2):
        os.mkfifo(attempt.log("nccl", rank).with_suffix(".pipe"))
    # As ProcessGroupNCCL opens it; the other one is of another node.
    reader = os.open(attempt.path / "logs" / "nccl-1.pipe", os.O_RDONLY | os.O_NONBLOCK)
    doctor.write_stacks([], "node-0.txt")
    assert os.read(reader, 128) == b"1"
    os.close(reader)


def test_a_stopped_child_is_named_with_its_log_and_node(tmp_path: Path) -> None:
    attempt = RunDir.create(tmp_path, "run").new_attempt()
    doctor = Doctor(QUICK, "n3", attempt)
    child = ChildProcess("it", ["sleep", "600"], os.environ, attempt.log("sglang", 0))
    os.kill(child.pid, signal.SIGSTOP)
    assert process_table.wait_for(lambda: bool(doctor.examine([child.pid])), 10)
    what = f"sglang-0 on n3 (pid {child.pid}, sleep) is stopped (T)"
    assert doctor.examine([child.pid]) == [Finding(0, 0.0, what)]
    os.kill(child.pid, signal.SIGCONT)
    assert process_table.wait_for(lambda: not doctor.examine([child.pid]), 10)
    child.close()


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL, None])
def test_a_guard_ends_an_agent_that_hangs_and_no_other(
    tmp_path: Path, fault: signal.Signals | None
) -> None:
    made = make_run(tmp_path, 1)
    attempt = made.run.new_attempt("l1-0")
    command = [sys.executable, "-c", PULSES]
    agent = ChildProcess("the agent of n0", command, os.environ, attempt.log("agent", 0))
    config = ClusterConfig(hang_floor_s=1.0, hang_factor=2.0)
    doctor = Doctor(config, "n0", attempt)

    def is_known() -> bool:
        return any(len(task.durations) > 3 for task in read_tasks(agent.pid))

    assert process_table.wait_for(is_known, 20)
    if fault is not None:
        os.kill(agent.pid, fault)
    end = time.monotonic() + (30 if fault else 3)
    while agent.poll() is None and time.monotonic() < end:
        end_if_hung(agent, doctor, attempt)
        time.sleep(0.1)
    if fault is None:
        assert agent.poll() is None
        agent.close()
    else:
        assert agent.poll() == -signal.SIGKILL
    if fault is not signal.SIGSTOP:
        assert attempt.ended() is None
        return
    code, reason = attempt.ended() or (0, "")
    assert code == FAILED
    assert attempt.can_go_on()
    assert reason.startswith(f"a hang: agent-0 on n0 (pid {agent.pid}, python) is stopped (T); the")
    assert doctor.stacks.exists()
