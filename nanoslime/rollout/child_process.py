"""A server that this process owns: in a session of its own, with a log, and gone when its owner is gone."""

import fcntl
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from nanoslime.types import RunError

_F_SETSIG = 10  # Linux; missing in fcntl


class ChildProcess:
    """Runs `command` with stdout and stderr appended to `log`; `close()` ends everything it started.

    The kernel ends it too when this process dies in any way, SIGKILL included: the child holds the read end
    of a pipe whose only write end is here, set up (O_ASYNC, F_SETSIG) to send SIGKILL to the child's process
    group when that end closes. PR_SET_PDEATHSIG would not do: it fires when the *thread* that started the
    child ends.
    """

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path
    ) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        read_end, self._lifeline = os.pipe()
        try:
            with log.open("ab") as out:
                self._process = subprocess.Popen(
                    command,
                    env=dict(env),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[read_end],
                )
            fcntl.fcntl(read_end, fcntl.F_SETOWN, -self.pid)
            fcntl.fcntl(read_end, _F_SETSIG, signal.SIGKILL)
            fcntl.fcntl(read_end, fcntl.F_SETFL, os.O_ASYNC)
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(read_end)

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_until(self, ready: Callable[[], bool], what: str, deadline_s: float) -> None:
        """Poll `ready` until it holds. RunError, after ending the child, when that exits or is too slow."""
        end = time.monotonic() + deadline_s
        while not ready():
            failure = None
            if not self.alive():
                failure = f"exited with status {self._process.returncode} before {what}"
            elif time.monotonic() > end:
                failure = f"was not up after {deadline_s:g} s (awaited: {what})"
            if failure:
                self.close()
                raise RunError(
                    f"{self.name} {failure}; log: {self.log}; last line: {last_line(self.log)}"
                )
            time.sleep(0.5)

    def close(self) -> None:
        """SIGKILL to the process group (a server holds nothing to save); returns when that is empty."""
        if self._lifeline < 0:
            return
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # nothing of the group is left
        self._process.wait()
        end = time.monotonic() + 10
        while (left := _group_members(self.pid)) and time.monotonic() < end:
            time.sleep(0.05)
        os.close(self._lifeline)
        self._lifeline = -1
        if left:
            raise RunError(
                f"{self.name}: processes {left} still live 10 s after SIGKILL; log: {self.log}"
            )


def _group_members(group: int) -> list[int]:
    """Live processes of a process group, zombies left out."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return members


def last_line(log: Path) -> str:
    """The last line of a log that is not empty, at most 300 characters."""
    try:
        with log.open("rb") as f:
            f.seek(max(0, log.stat().st_size - 4096))
            lines = f.read().decode(errors="replace").split("\n")
    except OSError as e:
        return f"(no log: {e})"
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "(empty)")


def require_free_port(host: str, port: int, who: str) -> None:
    """Raises RunError in one line when `port` cannot be bound on `host`."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as e:
            problem = f"{who}: port {port} on {host} cannot be used ({e.strerror})"
            raise RunError(
                f"{problem}; give it another port or end the process that holds this one"
            ) from e
