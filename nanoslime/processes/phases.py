"""What a process is doing, for others of the same user on its machine to read, and its stacks.

A process that reports holds an anonymous file, which others find among its open files in
/proc. It needs no directory, costs no filesystem anything, ends with its process, and can be
read while the process is stopped. The first bytes hold the tasks of the process as JSON. Behind
them faulthandler writes the stacks of all threads whenever the process gets DUMP_SIGNAL.
"""

import faulthandler
import json
import os
import re
import signal
import threading
import time
from collections import deque
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

# A process that reports writes its stacks when it gets it; it ends any other. SLURM's warnings are
# SIGUSR1 and SIGUSR2, which children of an agent ignore.
DUMP_SIGNAL = signal.SIGRTMIN + 7
# The task of the process that drives the run.
DRIVER = "the driver"
# The phase of a task that waits to be asked for something: it may last.
IDLE = ""
_NAME = "nanoslime-phases"
_TASKS_BYTES = 8192
# So many durations of a phase are kept.
_NUM_REMEMBERED = 15
# faulthandler writes all stacks within milliseconds, once the kernel lets the process run.
_DUMP_S = 0.3
_lock = threading.Lock()
_CHECKOUT = f"{Path(__file__).parents[2]}/"


class Task(NamedTuple):
    """One of the things that a process does side by side, as it says itself."""

    name: str
    phase: str
    # On the clock of its machine.
    since: float
    # As faulthandler calls the thread.
    thread: str
    # What the phase took the last times, where it has a time of its own.
    durations: list[float]


class OwnReport:
    """The report of this process. All may be called in any thread."""

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}
        self._durations: dict[tuple[str, str], deque[float]] = {}
        self._file = os.memfd_create(_NAME)
        os.write(self._file, b" " * _TASKS_BYTES)
        faulthandler.register(DUMP_SIGNAL, file=self._file, all_threads=True)

    def enter(self, name: str, phase: str, since: float | None = None) -> None:
        """The task `name`, which this thread does, begins a phase; it lasts until the next one.

        `since` is when a phase that is entered again and again has begun, on the clock of
        time.monotonic(): how long it may last is to be learned from the run.
        """
        now = time.monotonic()
        thread = f"0x{threading.get_ident():016x}"
        with _lock:
            before = self._tasks.get(name)
            if before is not None and since is None:
                self._durations[name, before.phase].append(now - before.since)
            known = self._durations.setdefault((name, phase), deque(maxlen=_NUM_REMEMBERED))
            durations = list(known) if since is None else []
            self._tasks[name] = Task(name, phase, since or now, thread, durations)
            report = json.dumps([os.getpid(), list(self._tasks.values())]).encode()
            os.pwrite(self._file, report.ljust(_TASKS_BYTES), 0)

    def close(self) -> None:
        os.close(self._file)


_made = cache(OwnReport)


def own_report() -> OwnReport:
    """That of this process, which begins to report when this is called first."""
    with _lock:
        return _made()


def report_anew() -> None:
    """Begins the report of a process that was forked just now from one that reports."""
    own_report().close()
    _made.cache_clear()
    own_report()


def read_tasks(pid: int) -> list[Task]:
    """What a process says that it does; nothing where it does not, or cannot be read."""
    with suppress(OSError, ValueError), open(_file_of(pid), "rb") as file:
        owner, tasks = json.loads(file.read(_TASKS_BYTES))
        # A process that was forked has its parent's file.
        if owner == pid:
            return [Task(*task) for task in tasks]
    return []


def dump_stacks(pid: int) -> str:
    """The stacks of all threads of a process that reports; empty where it shows none.

    One that is stopped writes them only when it goes on.
    """
    with suppress(OSError), open(_file_of(pid), "rb") as file:
        file.seek(0, os.SEEK_END)
        os.kill(pid, DUMP_SIGNAL)
        time.sleep(_DUMP_S)
        return file.read().decode(errors="replace")
    return ""


def frames_of(stacks: str, thread: str) -> list[str]:
    """The frames of one thread in faulthandler's text, the innermost first, as "file:line in
    function"; code of the project has paths below its root.
    """
    for of_thread in stacks.split("hread "):
        if of_thread.startswith(thread):
            found = re.findall(r'File "(.*)", line (\d+) in (.*)', of_thread)
            return [f"{f.removeprefix(_CHECKOUT)}:{line} in {name}" for f, line, name in found]
    return []


def _file_of(pid: int) -> str:
    """The file in which a process reports. Raises OSError where there is none."""
    folder = f"/proc/{pid}/fd"
    for number in os.listdir(folder):
        with suppress(OSError):
            if os.readlink(f"{folder}/{number}").startswith(f"/memfd:{_NAME} "):
                return f"{folder}/{number}"
    raise FileNotFoundError(f"process {pid} does not report")


def rest_of_training_s(driver: int) -> float:
    """How much longer the driver trains in this step if that takes as long as the shortest training
    so far; 0 where it does something else, or has not trained yet.
    """
    for task in read_tasks(driver):
        if task.name == DRIVER and task.phase == "train" and task.durations:
            return min(task.durations) - (time.monotonic() - task.since)
    return 0.0
