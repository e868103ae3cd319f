"""All processes below this one, found and ended by their ids, never by name.

Linux keeps the tree together: PR_SET_CHILD_SUBREAPER makes a child's orphans our children.
"""

import ctypes
import logging
import os
import re
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_CHILD_SUBREAPER = 36
_KILL_DEADLINE_S = 10.0
_POLL_S = 0.05
# The inodes of shared memory in what the kernel tells of a process's mappings. The name that it
# tells of a semaphore is an earlier one.
_MAPPED = re.compile(r" (\d+) +/dev/shm/")
# As Python, SGLang, NCCL and torch name what nobody needs but those who have it mapped.
_SHARED_NAMES = ("sem.mp-", "psm_", "sglang_", "nccl-", "torch_")
_ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def adopt_orphans() -> None:
    """From now on, descendants that lose their parent become children of this process."""
    if _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def live_processes(*attributes: str) -> Iterator[psutil.Process]:
    """All processes of this machine that have not ended, with these attributes in their `info`."""
    # It would leave out a process that has the id of one that it has seen before.
    psutil.process_iter.cache_clear()
    for process in psutil.process_iter(["status", *attributes]):
        if process.info["status"] not in _ENDED:
            yield process


def descendants(root: int, spare: Collection[int] = ()) -> set[int]:
    """Ids of the live processes below `root`.

    Processes in `spare`, and all below them, are left out.
    """
    children: dict[int, list[int]] = {}
    for process in live_processes("ppid"):
        children.setdefault(process.info["ppid"], []).append(process.pid)
    found: set[int] = set()
    to_visit = [root]
    while to_visit:
        parent = to_visit.pop()
        for pid in children.get(parent, []):
            if pid not in spare:
                found.add(pid)
                to_visit.append(pid)
    return found


def end_descendants(spare: Collection[int] = (), grace_s: float = 3.0) -> None:
    """End all processes below this one, also those that start meanwhile.

    They get SIGTERM, and SIGKILL after `grace_s`. Processes in `spare` and all below them
    stay. What is still alive 10 s after SIGKILL, as a process that waits for a dead file server
    may be, is named in the log and left.
    """
    find = partial(descendants, os.getpid(), spare)
    if _signal_until_gone(find, signal.SIGTERM, grace_s):
        left = _kill_until_gone(find)
        if left:
            logger.error(left)


def kill_all(belongs: Callable[[psutil.Process], bool]) -> str:
    """Kills the live processes that `belongs` holds for, also those that start meanwhile.

    It says what is alive 10 s after SIGKILL, and left; nothing where none is. A process of
    which `belongs` cannot be told, because it has ended or is another user's, is left alone.
    """

    def find() -> set[int]:
        found = set()
        for process in live_processes():
            with suppress(psutil.Error, ProcessLookupError):
                if belongs(process):
                    found.add(process.pid)
        return found

    return _kill_until_gone(find)


def _kill_until_gone(find: Callable[[], set[int]]) -> str:
    """Kills what `find` gives; says what is left, with id, name and state."""
    left = []
    for pid in sorted(_signal_until_gone(find, signal.SIGKILL, _KILL_DEADLINE_S)):
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            left.append(f"{pid} ({process.name()}, {process.status()})")
    names = ", ".join(left)
    return f"alive {_KILL_DEADLINE_S:g} s after SIGKILL, and left: {names}" if left else ""


def _signal_until_gone(
    find: Callable[[], set[int]], number: signal.Signals, patience_s: float
) -> set[int]:
    """Send the signal once to each process that `find` gives, also to new ones, until it gives
    none. The names of memory that they shared go, which they may have no time to remove.

    Returns what is alive when `patience_s` has passed.
    """
    deadline = time.monotonic() + patience_s
    signalled: set[int] = set()
    shared: set[str] = set()
    while True:
        alive = find()
        if not alive or time.monotonic() > deadline:
            if shared:
                _remove_names(shared)
            return alive
        for pid in alive - signalled:
            with suppress(OSError):  # it has ended, or is another user's
                shared.update(_MAPPED.findall(Path(f"/proc/{pid}/maps").read_text()))
            with suppress(OSError):
                os.kill(pid, number)
        signalled |= alive
        time.sleep(_POLL_S)


def _remove_names(inodes: Collection[str]) -> None:
    """Removes the names of shared memory that has these inodes."""
    for file in Path("/dev/shm").iterdir():
        if file.name.startswith(_SHARED_NAMES):
            with suppress(FileNotFoundError):
                if str(file.stat().st_ino) in inodes:
                    file.unlink()
