"""Reward processes: a reward that crashes, hangs or ends its process harms one sample only.

A plain function has a process for each sample that it judges. An async function has one for up
to ASYNC_CALLS samples; where one of them ends or blocks it, all of them are judged again, each
in a process of its own.
"""

import asyncio
import json
import os
import pickle
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from nanoslime.processes.child import how_it_ended, signal_when_closed
from nanoslime.rollout.rewards.program import Outcome, late

ASYNC_CALLS = 128
START_DEADLINE_S = 120.0
# After a start that failed, calls fail at once for this long.
START_BACK_OFF_S = 10.0
# The process itself ends an async call that takes too long, unless something blocks it.
_GRACE_S = 2.0

_START = """
import sys
sys.path[:] = sys.argv[2:]
from nanoslime.rollout.rewards.program import main
main(int(sys.argv[1]))
"""


@dataclass(eq=False)
class RewardFailed(Exception):
    """A reward gave no finite number; failures of one `kind` are worth telling once."""

    cause: str
    kind: str
    traceback: str = ""


class ProcessLost(RewardFailed):
    """The process of a call has ended, or had to be ended, before the call was answered."""


class RewardProcess:
    """One process of program.py, which dies with this one, as all that it starts.

    Its session is its own, so Ctrl-C in a terminal does not reach it. What it prints goes to the
    standard error of this one.
    """

    def __init__(self, process: asyncio.subprocess.Process, lifeline: socket.socket) -> None:
        self.alive = True
        self.asked: list[str] = []
        self.max_calls = 1
        self._process = process
        self._lifeline = lifeline
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[Outcome]] = {}

    @classmethod
    async def start(cls, name: str, timeout_s: float, async_calls: int) -> "RewardProcess":
        """Raises RewardFailed where the reward of this name cannot be loaded there."""
        ours, theirs = socket.socketpair()
        held, lifeline = socket.socketpair()
        with theirs, held:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-u", "-P", "-c", _START, str(theirs.fileno()), *sys.path),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,
                start_new_session=True,
                pass_fds=[theirs.fileno(), held.fileno()],
            )
            signal_when_closed(held.fileno(), process.pid, signal.SIGKILL)
        made = cls(process, lifeline)
        try:
            answers, made._calls = await asyncio.open_connection(sock=ours)
            made._reader = asyncio.create_task(made._read(answers))
            greeting = await made._ask((name, timeout_s), START_DEADLINE_S)
        except BaseException:
            made.kill()
            raise
        made.asked = greeting["asked"]
        made.max_calls = async_calls if greeting["is_async"] else 1
        return made

    @property
    def has_room(self) -> bool:
        return self.alive and len(self._waiting) < self.max_calls

    async def call(
        self, arguments: tuple, named: dict[str, Any], timeout_s: float, since: float
    ) -> float:
        """The value of the reward; of `named` it gets what it asks for.

        `since` is since when no call was answered: the process reports it as its own.
        Raises RewardFailed where it has none; ProcessLost where the process has ended, which a
        late call brings about.
        """
        asked = {name: named[name] for name in self.asked}
        outcome = await self._ask((arguments, asked, since), timeout_s)
        return outcome["value"]

    async def _ask(self, message: tuple, timeout_s: float) -> Outcome:
        number = next(self._numbers)
        answer = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._calls.write(pickle.dumps((number, *message)))
            async with asyncio.timeout(timeout_s + _GRACE_S * (self.max_calls > 1)):
                outcome = await answer
        except TimeoutError:
            self.kill()
            raise ProcessLost(**late(timeout_s)) from None
        except asyncio.CancelledError:
            if self.max_calls == 1:
                self.kill()
            raise
        finally:
            del self._waiting[number]
        if "cause" in outcome:
            raise RewardFailed(**outcome)
        return outcome

    async def _read(self, answers: asyncio.StreamReader) -> None:
        """Hands out answers until the process has ended; then every call left fails."""
        with suppress(ConnectionError):
            while (line := await answers.readline()).endswith(b"\n"):
                outcome = json.loads(line)
                future = self._waiting.get(outcome.pop("number"))
                if future is not None and not future.done():
                    future.set_result(outcome)
        self.kill()
        self._calls.close()
        how = how_it_ended(await self._process.wait())
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ProcessLost(f"its process {how}", how))

    def kill(self) -> None:
        """Ends the process with all that it has started in its session."""
        if self.alive:
            self.alive = False
            self._lifeline.close()
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def close(self) -> None:
        self.kill()
        await self._reader


class RewardPool:
    """The processes of one reward, for one event loop: started when there is something to
    judge, replaced when they end.
    """

    def __init__(
        self, name: str, size: int, timeout_s: float, async_calls: int = ASYNC_CALLS
    ) -> None:
        self._name = name
        self._size = size
        self._timeout_s = timeout_s
        self._async_calls = async_calls
        self._processes: list[RewardProcess] = []
        # So many calls run at a time: a process each, until the reward proves to be async.
        self._turns = asyncio.Semaphore(size)
        self._max_calls = 1
        self._one_by_one: RewardPool | None = None
        self._start_failure: tuple[str, str, str] | None = None
        self._failed_at = 0.0
        # When a call was late the last time, and when the first one began of those that were late
        # one after the other.
        self._late_at = 0.0
        self._late_since = 0.0

    async def call(self, arguments: tuple, named: dict[str, Any]) -> float:
        """The value of the reward; raises RewardFailed where it has none."""
        async with self._turns:
            begin = time.monotonic()
            since = self._late_since if begin < self._late_at + _GRACE_S else begin
            process = self._with_room() or await self._start()
            try:
                return await process.call(arguments, named, self._timeout_s, since)
            except RewardFailed as failure:
                if failure.kind == "late":
                    self._late_since = since
                    self._late_at = time.monotonic()
                if process.max_calls == 1 or not isinstance(failure, ProcessLost):
                    raise
        if self._one_by_one is None:
            self._one_by_one = RewardPool(self._name, self._size, self._timeout_s, async_calls=1)
        return await self._one_by_one.call(arguments, named)

    def _with_room(self) -> RewardProcess | None:
        """A process that has room for a call, which has to follow at once."""
        self._processes = [process for process in self._processes if process.alive]
        return next((process for process in self._processes if process.has_room), None)

    async def _start(self) -> RewardProcess:
        if self._start_failure and time.monotonic() < self._failed_at + START_BACK_OFF_S:
            raise RewardFailed(*self._start_failure)
        try:
            process = await RewardProcess.start(self._name, self._timeout_s, self._async_calls)
        except RewardFailed as failure:
            self._start_failure = (failure.cause, failure.kind, failure.traceback)
            self._failed_at = time.monotonic()
            raise
        self._processes.append(process)
        for _ in range(process.max_calls - self._max_calls):
            self._turns.release()
        self._max_calls = process.max_calls
        return process

    async def close(self) -> None:
        for process in self._processes:
            await process.close()
        if self._one_by_one is not None:
            await self._one_by_one.close()
