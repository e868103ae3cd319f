"""Which processes descend from this test session, read from /proc. Ends them by pid, never by name."""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Process:
    """A live process, told from a later one with the same pid by `started` (clock ticks since boot)."""

    pid: int
    started: int
    parent: int = field(compare=False)  # changes when the parent ends

    @property
    def command(self) -> str:
        return _read(self.pid, "cmdline").replace("\0", " ").strip()

    def has_env(self, name: str, value: str) -> bool:
        """Whether the process was started with this variable. Programs that rewrite their title hide it."""
        return f"{name}={value}" in _read(self.pid, "environ").split("\0")


def adopt_orphans() -> None:
    """Make this process the parent of daemons that its descendants leave behind, so that none is lost."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def all_processes() -> dict[int, Process]:
    """Every process that is not a zombie, by pid."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        # the command name, in parentheses, may itself hold spaces and parentheses
        fields = _read(int(entry), "stat").rpartition(")")[2].split()
        if fields and fields[0] not in "ZX":
            found[int(entry)] = Process(int(entry), started=int(fields[19]), parent=int(fields[1]))
    return found


def descendants(
    root: int, processes: dict[int, Process], stop_at: Iterable[int] = ()
) -> set[Process]:
    """Processes below `root`; those in `stop_at` and all that is below them are left out."""
    children: dict[int, list[Process]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process)
    barred, found, todo = set(stop_at), set(), [root]
    while todo:
        below = [child for child in children.get(todo.pop(), []) if child.pid not in barred]
        found.update(below)
        todo.extend(child.pid for child in below)
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
    """SIGTERM, then SIGKILL after `grace_s` (at once where it is 0); a reused pid is left alone."""

    def alive(candidates: set[Process]) -> set[Process]:
        return candidates & set(all_processes().values())

    waiting = set(processes)
    for sig, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        if not patience_s:
            continue
        waiting = alive(waiting)
        for process in waiting:
            try:
                os.kill(process.pid, sig)
            except ProcessLookupError:
                continue
        if wait_for(lambda waiting=waiting: not alive(waiting), patience_s):
            return
    raise TimeoutError(f"still alive 5 s after SIGKILL: {[(p.pid, p.command) for p in waiting]}")


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
    except OSError:  # gone, or not ours
        return ""
