"""The driver of a rung: nanoslime.train, killed by SIGKILL once it has committed a step.

    python -m tools.acceptance.driver --run DIR --attempt N      as a node agent starts it

Only the first attempt is killed. A thread of every attempt measures how much memory the trainer
ranks of the first node take: what nvidia-smi says of their processes, or without GPUs what these
have in main memory.
"""

import os
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress

import psutil

from nanoslime import train
from nanoslime.orchestration.launch import parse
from nanoslime.processes.command import ask
from nanoslime.run_dir import Attempt
from nanoslime.storage.shared_files import publish_json
from nanoslime.types import RunError
from tools.acceptance.places import KILLED, MEMORY, folder

_LOOK_S = 0.2
_MEASURE_EVERY_S = 2.0
_ANSWER_S = 20.0
_MIB = 1 << 20
_TRAINER = "ray::RankActor"
# In these the driver waits for engines or trainers, in the middle of a step.
_PHASES = ("generate", "train")


def main(argv: list[str]) -> int:
    attempt = parse(argv).attempt
    folder(attempt.run).mkdir(exist_ok=True)
    threading.Thread(target=_measure, args=(attempt,), daemon=True).start()
    if attempt.number == 1:
        threading.Thread(target=_kill_when_committed, args=(attempt,), daemon=True).start()
    return train.main(argv)


def _kill_when_committed(attempt: Attempt) -> None:
    """Ends this process in the middle of the first step after a commit."""
    run = attempt.run
    while True:
        committed = run.num_committed()
        status = run.status()
        if committed and status.get("step") == committed and status.get("phase") in _PHASES:
            facts = {"committed": committed, "phase": status["phase"], "time": time.time()}
            publish_json(folder(run) / KILLED, facts)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(_LOOK_S)


def _measure(attempt: Attempt) -> None:
    """Keeps the most memory that a trainer has had."""
    peak = 0
    measure = _gpu_bytes if attempt.layout.device == "cuda" else _process_bytes
    while True:
        with suppress(OSError, RunError, psutil.Error, ValueError):
            found = measure()
            if found > peak:
                peak = found
                path = folder(attempt.run) / f"{MEMORY}-{attempt.number}.json"
                publish_json(path, {"peak_bytes": peak}, durable=False)
        time.sleep(_MEASURE_EVERY_S)


def _gpu_bytes() -> int:
    """The most GPU memory that a trainer process of this node's agent has, engines beside it not
    counted; 0 where nvidia-smi is missing or does not tell it.
    """
    if shutil.which("nvidia-smi") is None:
        return 0
    trainers = {process.pid for process in _trainers()}
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory"]
    answer = ask([*command, "--format=csv,noheader,nounits"], _ANSWER_S).stdout
    rows = re.findall(r"^\s*(\d+)\s*,\s*(\d+)\s*$", answer, re.MULTILINE)
    used = {int(pid): int(size) for pid, size in rows}
    return max((used.get(pid, 0) for pid in trainers), default=0) * _MIB


def _process_bytes() -> int:
    """The resident memory of the largest trainer process of this node's agent."""
    sizes = []
    for process in _trainers():
        with suppress(psutil.Error):
            sizes.append(process.memory_info().rss)
    return max(sizes, default=0)


def _trainers() -> list[psutil.Process]:
    """The trainer processes of this node's agent."""
    found = []
    for process in psutil.Process(os.getppid()).children(recursive=True):
        with suppress(psutil.Error):
            if "".join(process.cmdline()[:1]).startswith(_TRAINER):
                found.append(process)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
