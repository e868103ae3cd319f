"""A child process: it has a log, it outlives threads, and it does not outlive its owner."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nanoslime.processes import tree
from nanoslime.processes.child import ChildProcess
from tests import process_table
from tests.processes.programs import STUBBORN

ROOT = Path(__file__).parents[2]

OWNER_OF_A_CHILD = """
import os, signal, sys, time
from pathlib import Path
# A background job of a shell is started without this handler.
signal.signal(signal.SIGINT, signal.default_int_handler)
from nanoslime.processes.child import ChildProcess
death_signal = signal.Signals[sys.argv[3]]
command = [sys.executable, "-c", sys.argv[2]]
child = ChildProcess("server", command, os.environ, Path(sys.argv[1]), death_signal)
print(child.pid, flush=True)
time.sleep(600)
"""

CLEANS_UP_AT_SIGTERM = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: (print("cleaned up", flush=True), sys.exit(0)))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
print("ready", flush=True)
while True:
    signal.pause()
"""


def start(log: Path, program: str) -> ChildProcess:
    return ChildProcess("server", [sys.executable, "-c", program], os.environ, log)


def start_owner(log: Path, program: str, death_signal: str) -> subprocess.Popen[str]:
    """A process that owns a child running `program`; it prints the child's process id."""
    command = [sys.executable, "-c", OWNER_OF_A_CHILD, str(log), program, death_signal]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def group_size(child_pid: int) -> int:
    return len(process_table.process_group(child_pid))


def test_a_child_outlives_the_thread_that_started_it(tmp_path: Path, no_leftovers: None) -> None:
    children: list[ChildProcess] = []
    thread = threading.Thread(target=lambda: children.append(start(tmp_path / "log", STUBBORN)))
    thread.start()
    thread.join()
    (child,) = children
    assert process_table.wait_for(lambda: group_size(child.pid) == 2, timeout_s=20)
    assert child.alive()
    child.close()
    assert group_size(child.pid) == 0
    assert not child.alive()
    child.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_survives_the_owner(
    tmp_path: Path, no_leftovers: None, how: signal.Signals
) -> None:
    with start_owner(tmp_path / "log", STUBBORN, "SIGKILL") as owner:
        pid = int(owner.stdout.readline())
        assert process_table.wait_for(lambda: group_size(pid) == 2, timeout_s=20)
        owner.send_signal(how)
        owner.wait(10)
    assert process_table.wait_for(lambda: group_size(pid) == 0, timeout_s=5)


def test_a_child_may_clean_up_when_its_owner_dies(tmp_path: Path, no_leftovers: None) -> None:
    log = tmp_path / "log"
    with start_owner(log, CLEANS_UP_AT_SIGTERM, "SIGTERM") as owner:
        pid = int(owner.stdout.readline())
        assert process_table.wait_for(lambda: "ready" in log.read_text(), timeout_s=20)
        owner.kill()
        owner.wait(10)
    assert process_table.wait_for(lambda: group_size(pid) == 0, timeout_s=5)
    assert log.read_text() == "ready\ncleaned up\n"


@pytest.mark.parametrize(
    ("program", "how"),
    [
        (
            "print('no such option'); raise SystemExit(3)",
            "ended with exit code 3; see {log}, which ends with: no such option",
        ),
        (
            "import os; print('step 4/8', flush=True); os.kill(os.getpid(), 9)",
            "was killed by SIGKILL; see {log}",
        ),
    ],
    ids=["exit", "kill"],
)
def test_one_line_says_how_a_child_ended(tmp_path: Path, program: str, how: str) -> None:
    log = tmp_path / "log"
    child = start(log, program)
    assert process_table.wait_for(lambda: not child.alive(), timeout_s=20)
    assert child.exit_summary() == f"server {how.format(log=log)}"
    child.close()


def test_a_child_that_outlives_sigkill_is_named_and_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    no_leftovers: None,
) -> None:
    """A process that waits for a dead file server takes no signal: here none is sent."""
    monkeypatch.setattr(tree, "_KILL_DEADLINE_S", 0.2)
    child = ChildProcess("server", ["sleep", "60"], os.environ, tmp_path / "server.log")
    with monkeypatch.context() as context:
        context.setattr(os, "kill", lambda *_: None)
        child.close()
    [error] = caplog.messages
    assert error.startswith(f"server: alive 0.2 s after SIGKILL, and left: {child.pid} (sleep, ")
    process_table.wait_for(lambda: not child.alive(), timeout_s=5)
