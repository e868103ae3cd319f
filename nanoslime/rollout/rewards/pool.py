"""Reward processes: a reward that crashes, hangs or kills its process harms one sample only.

A plain function has a process for each sample that it judges. An async function has a single
process for up to ASYNC_CALLS samples; where one of them ends or blocks it, each of the others
is judged again in a process of its own.
"""

import asyncio
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from itertools import count
from typing import Any

from nanoslime.processes.child import signal_when_closed

ASYNC_CALLS = 128
START_DEADLINE_S = 120.0
# After a start that failed, calls fail at once for this long.
START_BACK_OFF_S = 10.0
# The process itself ends an async call that takes too long, unless something blocks it.
_GRACE_S = 2.0

_START = """
import sys
sys.path[:] = sys.argv[1:]
from nanoslime.rollout.rewards.program import main
main()
"""

# The arguments of a call by name, of those that the reward asks for.
Named = Callable[[Collection[str]], dict[str, Any]]


class RewardFailed(Exception):
    """A reward gave no finite number; failures of the same `kind` are worth telling once."""

    def __init__(self, cause: str, kind: str, traceback: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.kind = kind
        self.traceback = traceback


class ProcessLost(RewardFailed):
    """The process of a call has ended, or was killed, before the call was answered."""


class RewardProcess:
    """One process of program.py, which dies with this one, as all that it starts.

    Its session is its own, so Ctrl-C in a terminal does not reach it.
    """

    def __init__(self, process: asyncio.subprocess.Process, lifeline: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._calls = process.stdin
        self._answers = process.stdout
        self._lifeline = lifeline
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.alive = True
        self.asked: Collection[str] = ()
        self.max_calls = 1

    @classmethod
    async def start(cls, setup: tuple[str, dict[str, Any], float]) -> "RewardProcess":
        """`setup` is what program.py reads first. Raises RewardFailed where it cannot start."""
        read_end, lifeline = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-c", _START, *sys.path),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
                pass_fds=[read_end],
            )
            signal_when_closed(read_end, process.pid, signal.SIGKILL)
        except BaseException:
            os.close(lifeline)
            raise
        finally:
            os.close(read_end)
        made = cls(process, lifeline)
        try:
            await made._begin(setup)
        except BaseException:
            made.kill()
            raise
        return made

    async def _begin(self, setup: tuple[str, dict[str, Any], float]) -> None:
        self._calls.write(pickle.dumps(setup))
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                line = await self._answers.readline()
        except TimeoutError:
            cause = f"its process was not ready after {START_DEADLINE_S:g} s"
            raise ProcessLost(cause, "start") from None
        if not line:
            self.kill()
            raise ProcessLost(f"its process {await self._ending()} while it started", "start")
        greeting = json.loads(line)
        if "cause" in greeting:
            raise RewardFailed(**greeting)
        self.asked = greeting["asked"]
        self.max_calls = ASYNC_CALLS if greeting["is_async"] else 1
        self._reader = asyncio.create_task(self._read())

    @property
    def has_room(self) -> bool:
        return self.alive and len(self._waiting) < self.max_calls

    async def call(self, arguments: tuple, named: dict[str, Any], timeout_s: float) -> float:
        """The value of the reward.

        Raises RewardFailed where it has none; ProcessLost where the process has ended. A call
        that is late, or that nobody waits for any longer, ends the process if it is its only
        one.
        """
        number = next(self._numbers)
        message = pickle.dumps((number, arguments, named))
        answer = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        is_async = self.max_calls > 1
        late = f"it took longer than data.reward_timeout_s={timeout_s:g}"
        try:
            self._calls.write(message)
            async with asyncio.timeout(timeout_s + _GRACE_S * is_async):
                outcome = await answer
        except TimeoutError:
            self.kill()
            raise ProcessLost(late, "late") from None
        except asyncio.CancelledError:
            if not is_async:
                self.kill()
            raise
        finally:
            del self._waiting[number]
        if "late" in outcome:
            raise RewardFailed(late, "late")
        if "value" not in outcome:
            raise RewardFailed(outcome["cause"], outcome["kind"], outcome["traceback"])
        return outcome["value"]

    async def _read(self) -> None:
        """Hands out answers until the process has ended; then every call left fails."""
        while (line := await self._answers.readline()).endswith(b"\n"):
            outcome = json.loads(line)
            future = self._waiting.get(outcome["number"])
            if future is not None and not future.done():
                future.set_result(outcome)
        self.kill()
        ending = await self._ending()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ProcessLost(f"its process {ending}", ending))

    async def _ending(self) -> str:
        code = await self._process.wait()
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def kill(self) -> None:
        """Ends the process with all that it has started in its session."""
        if not self.alive:
            return
        self.alive = False
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        os.close(self._lifeline)

    async def close(self) -> None:
        self.kill()
        await self._reader


class RewardPool:
    """The processes of one reward: started when there is something to judge, replaced when
    they end; for one event loop.
    """

    def __init__(self, name: str, options: dict[str, Any], size: int, timeout_s: float) -> None:
        self._setup = (name, options, timeout_s)
        self._size = size
        self._timeout_s = timeout_s
        self._processes: list[RewardProcess] = []
        self._starting = asyncio.Lock()
        self._alone = asyncio.Semaphore(size)
        # As many calls as may run at a time, once a first process has told.
        self._room: asyncio.Semaphore | None = None
        self._start_failure: RewardFailed | None = None
        self._failed_at = 0.0

    async def call(self, arguments: tuple, named: Named) -> float:
        """The value of the reward; raises RewardFailed where it has none."""
        if self._room is None:
            await self._with_room()
        assert self._room is not None
        async with self._room:
            process = await self._with_room()
            try:
                return await process.call(arguments, named(process.asked), self._timeout_s)
            except ProcessLost:
                if process.max_calls == 1:
                    raise
        async with self._alone:
            process = await RewardProcess.start(self._setup)
            try:
                return await process.call(arguments, named(process.asked), self._timeout_s)
            finally:
                await process.close()

    async def _with_room(self) -> RewardProcess:
        """A process that has room for a call; it is taken by the call that follows at once."""
        found = self._found()
        if found is not None:
            return found
        async with self._starting:
            found = self._found()
            if found is not None:
                return found
            if self._start_failure and time.monotonic() < self._failed_at + START_BACK_OFF_S:
                failure = self._start_failure
                raise RewardFailed(failure.cause, failure.kind, failure.traceback)
            try:
                process = await RewardProcess.start(self._setup)
            except RewardFailed as failure:
                self._start_failure = failure
                self._failed_at = time.monotonic()
                raise
            self._processes.append(process)
            if self._room is None:
                is_async = process.max_calls > 1
                self._room = asyncio.Semaphore(process.max_calls if is_async else self._size)
            return process

    def _found(self) -> RewardProcess | None:
        self._processes = [process for process in self._processes if process.alive]
        return next((process for process in self._processes if process.has_room), None)

    async def close(self) -> None:
        for process in self._processes:
            await process.close()
