"""The program of a reward process: it calls one reward for the RewardProcess that started it.

Through its socket it reads pickled calls, (number, arguments, named arguments, since), of which the
first one, (number, name, timeout_s), names the reward; `since` is when the first of the last calls
began that were all late. It writes lines of JSON, each with the number of a call, in any order:
first what the reward asks for by name and whether it is async, then values. In place of one there
may be a cause, with a kind that failures at one place have in common and a traceback.
"""

import asyncio
import inspect
import json
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

from nanoslime.failures import summary
from nanoslime.processes.phases import IDLE, own_report
from nanoslime.processes.signals import hold_back_from_this_process
from nanoslime.rollout.rewards import Reward, asked_names, make, number

# A longer traceback is cut at its beginning, a longer line at its end.
_MAX_TRACEBACK = 4000
_MAX_LINE = 500

Outcome = dict[str, Any]
Answer = Callable[[int, Outcome], None]


def main(descriptor: int) -> None:
    hold_back_from_this_process()
    connection = socket.socket(fileno=descriptor)
    # A process that a reward forks must not keep the socket open, nor answer.
    os.register_at_fork(after_in_child=lambda: os.close(connection.detach()))
    calls = connection.makefile("rb")
    answer = partial(_answer, connection)
    call, name, timeout_s = pickle.load(calls)
    try:
        reward = make(name)
    except BaseException as error:
        answer(call, _failure(error))
        return
    is_async = inspect.iscoroutinefunction(reward)
    answer(call, {"asked": sorted(asked_names(reward)), "is_async": is_async})
    try:
        enter = partial(own_report().enter, f"reward {name}")
        if is_async:
            asyncio.run(_serve_many(reward, calls, answer, timeout_s, enter))
        _serve(reward, calls, answer, enter)
    except EOFError:
        # Nobody has any more calls. Threads that the reward has left must not hold this up.
        os._exit(0)


def late(timeout_s: float) -> Outcome:
    return {"cause": f"it took longer than {timeout_s:g} s", "kind": "late", "traceback": ""}


def _answer(connection: socket.socket, call: int, outcome: Outcome) -> None:
    connection.sendall(json.dumps({"number": call, **outcome}).encode() + b"\n")


def _serve(reward: Reward, calls: BinaryIO, answer: Answer, enter: Callable[..., None]) -> None:
    """Raises EOFError at the end of the input."""
    while True:
        call, arguments, named, since = pickle.load(calls)
        enter("generate", since)
        try:
            value = reward(*arguments, **named)
            if inspect.iscoroutine(value):
                value = asyncio.run(value)
            outcome: Outcome = {"value": number(value)}
        except BaseException as error:
            outcome = _failure(error)
        enter(IDLE)
        answer(call, outcome)


async def _serve_many(
    reward: Reward, calls: BinaryIO, answer: Answer, timeout_s: float, enter: Callable[..., None]
) -> None:
    """Runs all calls at the same time. Raises EOFError at the end of the input."""
    tasks = set()

    async def serve(call: int, arguments: tuple, named: dict[str, Any]) -> None:
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                outcome: Outcome = {"value": number(await reward(*arguments, **named))}
        except BaseException as error:
            outcome = late(timeout_s) if limit.expired() else _failure(error)
        enter(IDLE)
        answer(call, outcome)

    while True:
        *call, since = await asyncio.to_thread(pickle.load, calls)
        enter("generate", since)
        task = asyncio.create_task(serve(*call))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def _failure(error: BaseException) -> Outcome:
    frames = traceback.extract_tb(error.__traceback__)
    kind = f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}"
    told = "".join(traceback.format_exception(error))[-_MAX_TRACEBACK:]
    return {"cause": summary(error)[:_MAX_LINE], "kind": kind[:_MAX_LINE], "traceback": told}
