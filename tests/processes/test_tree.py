"""Descendants are found through generations and ended, apart from those that are spared."""

import os
import signal
import subprocess
import sys
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
