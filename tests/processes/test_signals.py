"""A job's signals reach who acts on them, and nobody else."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nanoslime.processes.child import ChildProcess
from nanoslime.processes.signals import handled, held_back_from_children
from tests import process_table

ALL = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)

# Each line that it writes is a process id: its own, and that of a program which it has started.
FAMILY = """
import os, signal, subprocess, sys
for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: sys.exit(1))  # as Ray does
{more}
print(os.getpid(), flush=True)
program = subprocess.Popen(["sleep", "600"])
print(program.pid, flush=True)
print("ended:", program.wait(), flush=True)
program = subprocess.Popen(["sleep", "600"])
program.wait()
"""
HELD_BACK_HERE = """
from nanoslime.processes.signals import hold_back_from_this_process
hold_back_from_this_process()
"""


def start(log: Path, more: str = "") -> tuple[ChildProcess, list[int]]:
    command = [sys.executable, "-c", FAMILY.format(more=more)]
    child = ChildProcess("family", command, os.environ, log)
    assert process_table.wait_for(lambda: log.read_text().count("\n") == 2, timeout_s=20)
    return child, [int(line) for line in log.read_text().split()]


def test_a_child_and_its_programs_take_no_notice_of_a_jobs_signals(tmp_path: Path) -> None:
    child, pids = start(tmp_path / "log")
    for number in ALL:
        for pid in pids:
            os.kill(pid, number)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.3)
    assert len(process_table.descendants(child.pid, process_table.all_processes())) == 1
    assert "ended" not in (tmp_path / "log").read_text()
    child.close()


@pytest.mark.parametrize("number", ALL)
def test_where_users_code_runs_only_the_programs_that_it_starts_end_by_a_signal(
    tmp_path: Path, number: signal.Signals
) -> None:
    log = tmp_path / "log"
    child, (own, program) = start(log, HELD_BACK_HERE)
    os.kill(own, number)
    os.kill(program, number)
    assert process_table.wait_for(lambda: f"ended: {-number}\n" in log.read_text(), timeout_s=5)
    assert child.alive()
    child.close()


def test_a_signal_that_was_held_back_is_handled(tmp_path: Path) -> None:
    found: list[signal.Signals] = []
    # Ray may have been in this process, and handle it.
    handler = signal.getsignal(signal.SIGTERM)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with held_back_from_children():
        # Another thread of this process would be ended by one for the process.
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        with handled(found.append):
            assert found == [signal.SIGTERM]
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.getsignal(signal.SIGTERM) == handler
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
