"""The program of a reward process: it calls one reward for the RewardProcess that started it.

Its input is pickled: first (name, options, timeout_s), then the calls (number, arguments, named
arguments). A line of its output is JSON: first what the reward asks for by name and whether it
is async, then answers as {"number": ..., "value": ...}, in any order. An answer without a value
has a cause, a "kind" that failures of one place have in common, and a traceback.

User code cannot reach these streams: what it prints goes to stderr, what it reads is empty.
"""

import asyncio
import inspect
import json
import os
import pickle
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

from nanoslime.failures import summary
from nanoslime.rollout.rewards import Reward, asked_names, make, number

# A longer traceback is cut at its beginning, a longer line at its end.
_MAX_TRACEBACK = 4000
_MAX_LINE = 500

Answer = Callable[[dict[str, Any]], None]


def main() -> None:
    calls, answer = _streams()
    name, options, timeout_s = pickle.load(calls)
    try:
        reward = make(name, options)
    except BaseException as error:
        answer(_failure(error))
        return
    is_async = inspect.iscoroutinefunction(reward)
    answer({"asked": sorted(asked_names(reward)), "is_async": is_async})
    try:
        if is_async:
            asyncio.run(_serve_many(reward, calls, answer, timeout_s))
        else:
            _serve(reward, calls, answer)
    except EOFError:
        # Whoever asked has no more calls. Threads of the reward's own must not hold this up.
        os._exit(0)


def _streams() -> tuple[BinaryIO, Answer]:
    """Takes over standard input and output."""
    calls = os.fdopen(os.dup(0), "rb")
    answers = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    # A process that a reward forks must not keep the answers open, nor give any.
    os.register_at_fork(after_in_child=partial(os.close, answers))
    own_pid = os.getpid()

    def answer(message: dict[str, Any]) -> None:
        if os.getpid() != own_pid:
            os._exit(0)
        os.write(answers, json.dumps(message).encode() + b"\n")

    return calls, answer


def _serve(reward: Reward, calls: BinaryIO, answer: Answer) -> None:
    """Raises EOFError at the end of the input."""
    while True:
        call, arguments, named = pickle.load(calls)
        try:
            value = reward(*arguments, **named)
            if inspect.iscoroutine(value):
                value = asyncio.run(value)
            outcome = {"value": number(value)}
        except BaseException as error:
            outcome = _failure(error)
        answer({"number": call, **outcome})


async def _serve_many(reward: Reward, calls: BinaryIO, answer: Answer, timeout_s: float) -> None:
    """Runs all calls at the same time. Raises EOFError at the end of the input."""
    tasks = set()

    async def serve(call: int, arguments: tuple, named: dict[str, Any]) -> None:
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                outcome = {"value": number(await reward(*arguments, **named))}
        except BaseException as error:
            outcome = {"late": True} if limit.expired() else _failure(error)
        answer({"number": call, **outcome})

    while True:
        call = await asyncio.to_thread(pickle.load, calls)
        task = asyncio.create_task(serve(*call))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def _failure(error: BaseException) -> dict[str, Any]:
    frames = traceback.extract_tb(error.__traceback__)
    kind = f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}"
    told = "".join(traceback.format_exception(error))[-_MAX_TRACEBACK:]
    return {"cause": summary(error)[:_MAX_LINE], "kind": kind[:_MAX_LINE], "traceback": told}
