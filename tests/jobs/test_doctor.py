"""Whatever hangs in a run is named, with node, phase and frame, and ends its attempt."""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from jobs import doctor as doctor_module
from jobs.doctor import Doctor, Finding, end_if_hung
from nanoslime.config.cluster import ClusterConfig
from nanoslime.processes.child import ChildProcess
from nanoslime.processes.phases import IDLE, own_report, read_tasks
from nanoslime.run_dir import FAILED
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

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stacks: Path) -> None:
        self.task = f"task {next(NUMBERS)}"
        self.now_s = time.monotonic()
        monkeypatch.setattr(doctor_module.time, "monotonic", lambda: self.now_s)
        self.doctor = Doctor(QUICK, "n0", stacks)

    def look(self, after_s: float) -> list[Finding]:
        self.now_s += after_s
        found = self.doctor.examine([os.getpid()])
        return [finding for finding in found if finding.what.startswith(f"{self.task} on ")]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Patient]:
    made = Patient(monkeypatch, tmp_path / "stacks")
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


def test_a_stopped_child_is_named_with_its_log_and_node(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    doctor = Doctor(QUICK, "n3", tmp_path / "stacks")
    child = ChildProcess("it", ["sleep", "600"], os.environ, tmp_path / "logs" / "sglang-0.log")
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
    doctor = Doctor(config, "n0", attempt.path / "stacks")

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
