"""All processes below this one, found and ended by their ids, never by name.

Linux keeps the tree together: PR_SET_CHILD_SUBREAPER makes a child's orphans our children.
"""

import ctypes
import logging
import os
import signal
import time
from collections.abc import Collection, Iterator
from contextlib import suppress

import psutil

logger = logging.getLogger(__name__)

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_CHILD_SUBREAPER = 36
_KILL_DEADLINE_S = 10.0
_POLL_S = 0.05
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
    if _signal_until_gone(signal.SIGTERM, grace_s, spare):
        return
    if _signal_until_gone(signal.SIGKILL, _KILL_DEADLINE_S, spare):
        return
    left = sorted(descendants(os.getpid(), spare))
    logger.error("alive %g s after SIGKILL, and left: %s", _KILL_DEADLINE_S, described(left))


def described(pids: Collection[int]) -> str:
    """Id, name and state of each process that still exists."""
    found = []
    for pid in pids:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            found.append(f"{pid} ({process.name()}, {process.status()})")
    return ", ".join(found)


def _signal_until_gone(number: signal.Signals, patience_s: float, spare: Collection[int]) -> bool:
    """Send the signal once to each descendant, also to new ones, until none is left.

    False when `patience_s` passed first.
    """
    deadline = time.monotonic() + patience_s
    signalled: set[int] = set()
    while True:
        alive = descendants(os.getpid(), spare)
        if not alive:
            return True
        if time.monotonic() > deadline:
            return False
        for pid in alive - signalled:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        signalled |= alive
        time.sleep(_POLL_S)
