"""A process with an owner: in its own session, with a log, gone when its owner is gone."""

import fcntl
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nanoslime.processes.logs import last_line
from nanoslime.processes.signals import held_back_from_children
from nanoslime.processes.tree import kill_all
from nanoslime.types import MachineFailure, RunError

logger = logging.getLogger(__name__)

# Linux has this command of fcntl(2), Python's module does not name it.
_F_SETSIG = 10
_READY_POLL_S = 0.5


class ChildProcess(subprocess.Popen[bytes]):
    """Runs `command` in a new session, with stdout and stderr appended to `log`.

    The kernel sends `death_signal` to the child's process group when this process dies in
    any way, SIGKILL included: the child holds the read end of a pipe whose only write end is
    here. PR_SET_PDEATHSIG would not do: it fires when the *thread* that started the child
    ends.

    Its session and its process group have the child's id. `send_signal` is to the child alone.

    The child and all that it starts do not get the signals of a job, unless it lets them through.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        read_end, self._lifeline = os.pipe()
        try:
            with log.open("ab") as output, held_back_from_children():
                super().__init__(
                    command,
                    env=dict(env),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[read_end],
                )
            signal_when_closed(read_end, self.pid, death_signal)
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(read_end)

    def alive(self) -> bool:
        return self.poll() is None

    def exit_summary(self) -> str:
        """One line that says how the child ended, and how its log ends.

        The log of one that a signal killed says nothing of it.
        """
        ended = f"{self.name} {how_it_ended(self.returncode)}; see {self.log}"
        if self.returncode < 0:
            return ended
        return f"{ended}, which ends with: {last_line(self.log)}"

    def wait_until(self, ready: Callable[[], bool], awaited: str, deadline_s: float) -> None:
        """Poll `ready` until it holds.

        Ends the child and raises RunError when it exits or takes over `deadline_s`.
        """
        deadline = time.monotonic() + deadline_s
        while not ready():
            if not self.alive():
                self.close()
                kind = MachineFailure if self.returncode < 0 else RunError
                raise kind(
                    f"{self.name} exited with status {self.returncode} before {awaited}; "
                    f"log: {self.log}; last line: {last_line(self.log)}"
                )
            if time.monotonic() > deadline:
                self.close()
                raise MachineFailure(
                    f"{self.name} was not up after {deadline_s:g} s (awaited: {awaited}); "
                    f"log: {self.log}; last line: {last_line(self.log)}"
                )
            time.sleep(_READY_POLL_S)

    def close(self) -> None:
        """End the process group by SIGKILL, for a child that has nothing to save.

        Returns when the group is empty; what is alive 10 s later is named in the log and left.
        """
        if self._lifeline < 0:
            return
        left = kill_all(lambda process: os.getpgid(process.pid) == self.pid)
        self.poll()
        os.close(self._lifeline)
        self._lifeline = -1
        if left:
            logger.error("%s: %s; log: %s", self.name, left, self.log)


def how_it_ended(code: int) -> str:
    """What a process's return code says, as "was killed by SIGKILL"."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def signal_when_closed(read_end: int, group: int, number: signal.Signals) -> None:
    """Have the kernel signal a process group when the write end of this pipe closes."""
    fcntl.fcntl(read_end, fcntl.F_SETOWN, -group)
    fcntl.fcntl(read_end, _F_SETSIG, number)
    fcntl.fcntl(read_end, fcntl.F_SETFL, os.O_ASYNC)
