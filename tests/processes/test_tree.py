"""Descendants are found through generations and ended, apart from those that are spared."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nanoslime.processes import tree
from nanoslime.processes.tree import descendants
from tests import process_table

ROOT = Path(__file__).parents[2]

ENDS_ITS_DESCENDANTS = """
import subprocess, sys
from nanoslime.processes.tree import adopt_orphans, descendants, end_descendants
adopt_orphans()
spared = subprocess.Popen(["sleep", "60"])
stubborn = "trap '' TERM; echo ready; while true; do sleep 60; done"
daemon = subprocess.Popen(["setsid", "--fork", "sh", "-c", stubborn], stdout=subprocess.PIPE)
assert daemon.stdout.readline() == b"ready\\n"
end_descendants(spare=[spared.pid], grace_s=0.2)
print(spared.poll())
end_descendants()
print(spared.wait())
"""


SHARES_MEMORY = """
import mmap, multiprocessing, sys
from multiprocessing.shared_memory import SharedMemory
lock = multiprocessing.get_context("spawn").Lock()
memory = SharedMemory(create=True, size=8)
file = open(sys.argv[1], "r+b")
model = mmap.mmap(file.fileno(), 0)
print("sem." + lock._semlock.name[1:], memory.name, flush=True)
sys.stdin.read()
"""


def test_the_names_of_memory_that_killed_processes_shared_go_with_them(no_leftovers: None) -> None:
    """Python's resource tracker, which is there to remove them, is killed too. What else they have
    mapped there, as a model, is somebody's file."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as model:
        model.write(b"model")
        model.flush()
        command = [sys.executable, "-c", SHARES_MEMORY, model.name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, start_new_session=True, **pipes) as child:
            names = [Path("/dev/shm", name) for name in child.stdout.readline().split()]
            assert len(names) == 2 and all(name.exists() for name in names)
            assert tree.kill_all(lambda process: os.getpgid(process.pid) == child.pid) == ""
        assert not any(name.exists() for name in names) and Path(model.name).exists()


def test_descendants_are_found_through_generations() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 60 & wait"]) as shell:
        assert process_table.wait_for(lambda: len(descendants(shell.pid)) == 1, 5)
        (grandchild,) = descendants(shell.pid)
        assert {shell.pid, grandchild} <= descendants(os.getpid())
        assert grandchild not in descendants(os.getpid(), spare=[shell.pid])
        os.kill(grandchild, signal.SIGTERM)


def test_a_stubborn_daemon_is_ended_and_what_is_spared_stays(no_leftovers: None) -> None:
    command = [sys.executable, "-c", ENDS_ITS_DESCENDANTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["None", str(-signal.SIGTERM)], done.stderr


def test_what_outlives_sigkill_is_named_and_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, no_leftovers: None
) -> None:
    """A process that waits for a dead file server takes no signal: here none is sent."""
    others = descendants(os.getpid())
    monkeypatch.setattr(tree, "_KILL_DEADLINE_S", 0.2)
    with subprocess.Popen(["sleep", "60"]) as child:
        with monkeypatch.context() as context:
            context.setattr(os, "kill", lambda *_: None)
            tree.end_descendants(others, grace_s=0.1)
        [error] = caplog.messages
        assert error.startswith("alive 0.2 s after SIGKILL, and left: ")
        assert f"{child.pid} (sleep, sleeping)" in error
        child.kill()
