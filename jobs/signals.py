"""A job's signals: SIGUSR1 and SIGUSR2 ahead of its end, SIGTERM and SIGINT at its end."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# SLURM sends one of these before the time limit or a preemption; the job commits and asks
# for a requeue. Children of guard and agent ignore them: proctrack/linuxproc delivers a
# job's signal to every process.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
_HANDLED = (*WARNINGS, signal.SIGTERM, signal.SIGINT)


@contextmanager
def handled(action: Callable[[signal.Signals], object]) -> Iterator[None]:
    """The signals of a job call `action`; at the end the earlier handlers come back."""

    def handler(number: int, _: FrameType | None) -> None:
        action(signal.Signals(number))

    before = {}
    for number in _HANDLED:
        before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
