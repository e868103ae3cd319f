"""Processes that this process started: they die with it, and are ended with all that they started themselves.

Linux keeps the tree together: PR_SET_CHILD_SUBREAPER makes orphans of a child ours, PR_SET_PDEATHSIG ends a
child when we are killed. Nothing is ever ended by name.
"""

import ctypes
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from nanoslime.types import RunError

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True, slots=True)
class Child:
    name: str  # as errors call it
    log: Path
    process: subprocess.Popen[bytes]

    def obituary(self) -> str:
        """One line on how it ended, with the end of its log."""
        code = self.process.returncode
        how = (
            f"was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"ended with exit code {code}"
        )
        last = last_line(self.log)
        return f"{self.name} {how}; see {self.log}" + (f": {last}" if last else "")


def adopt_orphans() -> None:
    """From now on, descendants that lose their parent become children of this process."""
    if _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def start(
    name: str, command: Sequence[str], log: Path, env: Mapping[str, str], death_signal: int
) -> Child:
    """Start `command` in its own session, output appended to `log`; it gets `death_signal` when we die.

    SIGUSR1 and SIGUSR2 are ignored below it: proctrack/linuxproc delivers a job's signal to every process.
    """

    def before_exec() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=before_exec,
        )
    return Child(name, log, process)


def ask(
    command: Sequence[str], deadline_s: float, who: str = "", **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command for its output. RunError if it does not answer in time, OSError if it cannot be run."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=deadline_s, **options
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(
            f"{who or shlex.join(command)} did not answer within {deadline_s:g} s"
        ) from error


def end_descendants(spare: Collection[int] = (), grace_s: float = 3.0) -> None:
    """End all below this process, also what starts meanwhile: SIGTERM, then SIGKILL after `grace_s`.

    Processes in `spare` and what is below them stay.
    """
    for sig, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10.0)):
        deadline, told = time.monotonic() + patience_s, set[int]()
        while below := descendants(os.getpid(), spare):
            if time.monotonic() > deadline:
                break
            for pid in below - told:
                with suppress(ProcessLookupError):
                    os.kill(pid, sig)
            told |= below
            time.sleep(0.05)
        else:
            return
    raise TimeoutError(f"processes {sorted(below)} are alive 10 s after SIGKILL")


def descendants(root: int, spare: Collection[int] = ()) -> set[int]:
    """Pids of the live processes below `root`, without those in `spare` and what is below them."""
    below: dict[int, list[int]] = {}
    for pid in psutil.pids():
        below.setdefault(_parent(pid), []).append(pid)
    found, todo = set[int](), [root]
    while todo:
        children = [pid for pid in below.get(todo.pop(), []) if pid not in spare]
        found.update(children)
        todo.extend(children)
    return found


def last_line(log: Path, max_chars: int = 300) -> str:
    """The last line of a log that says something."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except FileNotFoundError:
        return ""
    return next((line[:max_chars] for line in reversed(lines) if line), "")


def _parent(pid: int) -> int:
    """Parent of a live process; 0 for one that is gone or a zombie."""
    try:
        process = psutil.Process(pid)
        return (
            process.ppid()
            if process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            else 0
        )
    except psutil.Error:
        return 0
