"""The processes that descend from this test session, read from /proc and ended by their ids."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_KILL_DEADLINE_S = 5.0


@dataclass(frozen=True, slots=True)
class Process:
    """A live process.

    `started`, in clock ticks since boot, tells it from a later process with the same id.
    """

    pid: int
    started: int
    # It changes when the parent ends.
    parent: int = field(compare=False)

    @property
    def command(self) -> str:
        return _read(self.pid, "cmdline").replace("\0", " ").strip()

    def has_env(self, name: str, value: str) -> bool:
        """Whether the process was started with this variable.

        Programs that rewrite their title hide it.
        """
        return f"{name}={value}" in _read(self.pid, "environ").split("\0")


def adopt_orphans() -> None:
    """Make this process the parent of daemons that its descendants leave behind."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def all_processes() -> dict[int, Process]:
    """Every process that is not a zombie, by pid."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        pid = int(entry)
        # The command name, in parentheses, may itself hold spaces and parentheses.
        _, _, after_name = _read(pid, "stat").rpartition(")")
        fields = after_name.split()
        if fields and fields[0] not in "ZX":
            found[pid] = Process(pid, started=int(fields[19]), parent=int(fields[1]))
    return found


def descendants(
    root: int, processes: dict[int, Process], stop_at: Iterable[int] = ()
) -> set[Process]:
    """Processes below `root`; those in `stop_at` and all below them are left out."""
    children: dict[int, list[Process]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process)
    barred = set(stop_at)
    found = set()
    to_visit = [root]
    while to_visit:
        parent = to_visit.pop()
        for child in children.get(parent, []):
            if child.pid not in barred:
                found.add(child)
                to_visit.append(child.pid)
    return found


def process_group(group: int) -> list[str]:
    """Commands of the live processes in a process group."""
    found = []
    for process in all_processes().values():
        try:
            if os.getpgid(process.pid) == group:
                found.append(process.command)
        except ProcessLookupError:
            continue
    return found


def end(processes: Iterable[Process], grace_s: float = 2.0) -> None:
    """SIGTERM, then SIGKILL after `grace_s`, at once where that is 0; a reused id is left alone."""
    left = set(processes)
    if grace_s:
        left = _signal(left, signal.SIGTERM, grace_s)
    left = _signal(left, signal.SIGKILL, _KILL_DEADLINE_S)
    if left:
        commands = [(process.pid, process.command) for process in left]
        raise TimeoutError(f"still alive {_KILL_DEADLINE_S:g} s after SIGKILL: {commands}")


def _signal(processes: set[Process], number: signal.Signals, patience_s: float) -> set[Process]:
    """Signal the processes and wait until all have ended; returns those that have not in time."""

    def alive() -> set[Process]:
        return processes & set(all_processes().values())

    for process in alive():
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            continue
    wait_for(lambda: not alive(), patience_s)
    return alive()


def wait_for(condition: Callable[[], object], timeout_s: float, interval_s: float = 0.05) -> bool:
    """Poll until `condition()` holds; False when `timeout_s` passed first."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval_s)
    return True


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        # The process is gone, or not ours.
        return ""
