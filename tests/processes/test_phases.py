"""A process tells others of its machine what it does, also while it is stopped."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from nanoslime.processes import phases
from nanoslime.processes.phases import IDLE, Task, dump_stacks, frames_of, read_tasks
from tests import process_table

PROGRAM = """
import os, sys, threading, time
from nanoslime.processes.phases import IDLE, own_report, report_anew

def works():
    own_report().enter("a thread", "work")
    time.sleep(600)

def waits():
    for _ in range(3):
        own_report().enter("main", "short")
        own_report().enter("main", "long")
        time.sleep(0.05)
    own_report().enter("main", "long")
    if os.fork() == 0:
        time.sleep(600)
    if os.fork() == 0:
        report_anew()
        own_report().enter("a copy", "work")
        time.sleep(600)
    print("ready", flush=True)
    time.sleep(600)

threading.Thread(target=works, daemon=True).start()
waits()
"""


@pytest.fixture
def reporting(no_leftovers: None) -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert process_table.wait_for(lambda: len(read_tasks(process.pid)) == 2, 10)
    yield process.pid
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def by_name(pid: int) -> dict[str, Task]:
    return {task.name: task for task in read_tasks(pid)}


def test_tasks_and_stacks_of_another_process_are_seen(reporting: int) -> None:
    tasks = by_name(reporting)
    assert tasks["main"].phase == "long"
    assert [round(duration_s, 1) >= 0.0 for duration_s in tasks["main"].durations] == [True] * 3
    assert min(tasks["main"].durations) > 0.04
    assert tasks["a thread"].phase == "work"
    for _ in range(2):
        stacks = dump_stacks(reporting)
        for name, function in (("main", "waits"), ("a thread", "works")):
            frames = frames_of(stacks, tasks[name].thread)
            assert frames[0].endswith(f"in {function}")
            assert len([frame for frame in frames if frame.endswith(f"in {function}")]) == 1


def test_a_stopped_process_still_tells_what_it_does(reporting: int) -> None:
    os.kill(reporting, signal.SIGSTOP)
    assert by_name(reporting)["main"].phase == "long"
    assert dump_stacks(reporting) == ""


def test_a_fork_does_not_tell_what_its_parent_does(reporting: int) -> None:
    """One that begins a report of its own shows its own stacks."""
    children = process_table.descendants(reporting, process_table.all_processes())
    silent, anew = sorted(child.pid for child in children)
    assert read_tasks(silent) == []
    assert process_table.wait_for(lambda: list(by_name(anew)) == ["a copy"], 60)
    assert sorted(by_name(reporting)) == ["a thread", "main"]
    assert "in works" in dump_stacks(reporting)
    stacks = dump_stacks(anew)
    assert "in waits" in stacks
    assert "in works" not in stacks


def test_who_does_not_report_has_no_tasks_and_is_not_signalled(no_leftovers: None) -> None:
    process = subprocess.Popen(["sleep", "600"])
    assert read_tasks(process.pid) == []
    assert dump_stacks(process.pid) == ""
    assert process.poll() is None
    process.kill()
    process.wait(10)
    assert read_tasks(process.pid) == []


def test_many_tasks_and_durations_fit_into_a_report() -> None:
    report = phases.OwnReport()
    for number in range(8):
        for _ in range(40):
            report.enter(f"a task with a long name that has the number {number}", "a phase")
    [*_] = read_tasks(os.getpid())
    report.enter("a task", IDLE)
