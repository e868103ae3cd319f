"""Rewards that do what users' rewards should not; the text of the sample says what."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path


class Unpicklable(BaseException):
    def __init__(self, first, second) -> None:
        super().__init__(lambda: first)

    def __reduce__(self):
        raise TypeError("cannot be pickled")


def endless(text, label, metadata):
    while text == "never":
        time.sleep(0.01)
    return 1.0


async def endless_async(text, label, metadata):
    while text == "never":
        await asyncio.sleep(0.01)
    return 1.0


def misbehave(text, label, metadata):
    match text:
        case "crash":
            return metadata["no such key"]
        case "hang":
            while True:
                pass
        case "hang asleep":
            time.sleep(1000)
        case "kill":
            os._exit(7)
        case "fork and kill":
            if os.fork():
                os._exit(7)
            time.sleep(1000)
        case "segfault":
            os.kill(os.getpid(), 11)
        case "exit":
            sys.exit("the grader has gone")
        case "unpicklable":
            raise Unpicklable(1, 2)
        case "close":
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            return 1.0
        case "print":
            print("x" * 1_000_000)
            return 1.0
        case "fork":
            # Both processes go on from here.
            os.fork()
            return 1.0
        case "child":
            subprocess.Popen(["sleep", "1000"])
            return 1.0
        case "read":
            return float(len(sys.stdin.read()) + 1)
        case "own loop":
            return asyncio.run(asyncio.sleep(0.01, result=1.0))
    values = {"nan": float("nan"), "inf": -float("inf"), "none": None, "text": "1" * 10_000_000}
    values |= {"list": [1.0] * 1_000_000, "huge": 10**400, "one": 1, "true": True}
    return values[text]


async def waits(text, label, metadata, *, sample, timeout_s):
    """Like most rewards that ask a server; `block` and `kill` hit all that wait beside them."""
    await asyncio.sleep(0.3)
    match text:
        case "hang":
            await asyncio.sleep(1000)
        case "block":
            time.sleep(1000)
        case "kill":
            os._exit(7)
        case "crash":
            return metadata["no such key"]
    return float(sample.token_ids.sum()) + timeout_s


def says(text, label, metadata):
    print("said:", text)
    return 1.0


def pid(text, label, metadata) -> float:
    return float(os.getpid())


def tells_pids_and_hangs(text, label, metadata) -> float:
    child = os.fork()
    if child == 0:
        time.sleep(1000)
    Path(text).write_text(f"{os.getpid()} {child}\n")
    while True:
        pass


def of_two(text, label):
    return 1.0
