"""A job's signals: SIGUSR1 and SIGUSR2 ahead of its end, SIGTERM and SIGINT at its end.

Without cgroups (proctrack/linuxproc) SLURM sends each of them to every process of a job. Guards
and agents act on it; all that they start never gets it, and is ended by SIGKILL.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# SLURM sends one of these before the time limit or a preemption; the job commits and asks
# for a requeue.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
_OF_A_JOB = (*WARNINGS, signal.SIGTERM, signal.SIGINT)


@contextmanager
def handled(action: Callable[[signal.Signals], object]) -> Iterator[None]:
    """The signals of a job call `action`, also one that came while they were held back.

    At the end the earlier handlers come back.
    """

    def handler(number: int, _: FrameType | None) -> None:
        action(signal.Signals(number))

    before = {}
    for number in _OF_A_JOB:
        before[number] = signal.signal(number, handler)
    held_back = signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_A_JOB)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def held_back_from_children() -> Iterator[None]:
    """Programs that this thread starts meanwhile, and all that they start, do not get the signals
    of a job. A handler that one of them installs, as Ray does, changes nothing.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_A_JOB)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hold_back_from_this_process() -> None:
    """This process takes no notice of the signals of a job; programs that it starts do.

    It is for processes in which users' code runs, whose programs may be ended by SIGTERM, as
    `timeout` does. Call it in the main thread, before there are others.
    """
    for number in _OF_A_JOB:
        # Programs would inherit SIG_IGN.
        signal.signal(number, _take_no_notice)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_A_JOB)


def _take_no_notice(number: int, frame: FrameType | None) -> None:
    pass
