"""Finds what hangs in a run: phases past their deadline, and processes that are stopped.

    each process -> its report (nanoslime/processes/phases.py) -> the agent of its node
                 -> findings in the node's heartbeat -> the agent of node 0 -> the end

The deadline of a phase is `cluster.hang_factor` times the median of its earlier times, and
`cluster.hang_floor_s` at least. A process that does not know three of them goes by what the driver
has written down in this attempt and the earlier ones (phases.jsonl): by the longest time among
the run's first and last three, as phases take longer in the beginning. All that wait for what
hangs are late with it, so node 0 waits a little for the findings of all nodes, and then names
the likeliest cause. A run without agents has a thread of its driver for it
(nanoslime/orchestration/report.py).
"""

import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, NoReturn

from nanoslime.config.cluster import ClusterConfig
from nanoslime.processes.child import ChildProcess
from nanoslime.processes.nccl_ras import ras_report
from nanoslime.processes.phases import IDLE, Task, dump_stacks, frames_of, read_tasks
from nanoslime.processes.tree import descendants
from nanoslime.run_dir import FAILED, LAST_PHASES, Attempt, RunDir
from nanoslime.storage.shared_files import read_json_lines
from nanoslime.types import MachineFailure

# A phase's own median counts from so many times on.
_MIN_KNOWN = 3
# What is late hangs where it stays so for such a part of its deadline: the findings of other nodes
# may come later, and all is late for a moment in a job that was suspended.
_SETTLING_SHARE = 0.25
_PY_SPY_DEADLINE_S = 10.0
# A process in one of these states of /proc is stopped, by a signal or by a debugger.
_STOPPED = ("T", "t")
# A thread with its innermost frame in one of these files waits for another process or thread.
_WAITS = re.compile(r"/(distributed|pipeline_parallel|ray)/|/(threading|selectors)\.py:")
# Frames of Python itself and of packages are neither ours nor the user's.
_FOREIGN = re.compile(rf"{os.path.dirname(os.__file__)}/|<|.*/site-packages/")


class Finding(NamedTuple):
    """What a node's agent has found; the likeliest cause of a hang is the smallest one."""

    # 0: a stopped process of ours, 1: of Ray's, 2: a late task that works, 3: one that waits.
    order: int
    # 0 where no task is late.
    deadline_s: float
    # It says who, on which node, and in which phase and frame.
    what: str


def learned_s(config: ClusterConfig, durations: Sequence[float]) -> float:
    """So many times the median of what something has taken; the configured deadline at first."""
    if len(durations) < _MIN_KNOWN:
        return config.hang_deadline_s
    return config.hang_factor * statistics.median_high(durations)


@lru_cache(maxsize=1)
def known_durations(run: RunDir, period: float) -> dict[str, list[float]]:
    """What each phase of the driver has taken in all attempts. One in which an attempt ended does
    not count.

    The files are read once in each `period`, a number that rises.
    """
    files = run.attempts.glob("[0-9]*/phases.jsonl")
    found: dict[str, list[float]] = defaultdict(list)
    for file in sorted(files, key=lambda file: int(file.parent.name)):
        for row, following in pairwise(read_json_lines(file)):
            if following["phase"] not in LAST_PHASES:
                found[row["phase"]].append(following["time"] - row["time"])
    return found


class Doctor:
    """One node's part: `examine` finds what hangs here, `judge` on node 0 what hangs anywhere."""

    def __init__(self, config: ClusterConfig, node: str, attempt: Attempt) -> None:
        # The directory for the stacks of all nodes, made when something hangs.
        self.stacks = attempt.path / "stacks"
        self._run = attempt.run
        self._config = config
        self._node = node
        # What began before is of an earlier run in the same process.
        self._begin = time.monotonic()
        # Since when something is late.
        self._late_since = float("inf")

    def examine(self, pids: Collection[int]) -> list[Finding]:
        """Of these processes of this node: tasks that are late, and processes that are stopped."""
        now = time.monotonic()
        found = []
        for pid in pids:
            if _state(pid) in _STOPPED:
                found.append(self._stopped(pid))
            for task in read_tasks(pid):
                for_s = now - task.since
                if task.phase != IDLE and self._config.hang_floor_s < for_s <= now - self._begin:
                    limit_s = self._learned_s(task)
                    if for_s > limit_s:
                        found.append(self._late(pid, task, for_s, limit_s))
        return found

    def judge(self, found: Sequence[Finding]) -> None:
        """Raises MachineFailure where a task is late among the findings of all nodes: it says who,
        where, in which phase, and where all stacks are.
        """
        late = [finding for finding in found if finding.deadline_s]
        now = time.monotonic()
        self._late_since = min(self._late_since, now) if late else float("inf")
        if late and now - self._late_since > _SETTLING_SHARE * late[0].deadline_s:
            told = dict.fromkeys((min(found).what, min(late).what))
            self.end(f"a hang: {'; '.join(told)}")

    def end(self, what: str) -> NoReturn:
        """Raises MachineFailure that says `what`; each node writes its stacks then."""
        with suppress(OSError):
            self.stacks.mkdir(exist_ok=True)
        raise MachineFailure(f"{what}; the stacks of all processes: {self.stacks}")

    def write_stacks(self, pids: Collection[int], file_name: str) -> None:
        """Writes what these processes are doing into a file of the directory of stacks.

        py-spy looks at them too, where it is installed and may. Those of this node's ranks on GPUs
        write what NCCL has done into files beside their logs, and NCCL's RAS is asked.
        """
        for pipe in self.stacks.with_name("logs").glob("nccl-*.pipe"):
            # Those of other nodes have no reader here.
            with suppress(OSError):
                os.write(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), b"1")
        py_spy = [str(Path(sys.executable).with_name("py-spy")), "dump", "--nonblocking", "--pid"]
        with suppress(OSError), (self.stacks / file_name).open("w") as file:
            for pid in sorted(pids):
                file.write(f"\n=== {pid} {_read(pid, 'cmdline')}: {_state(pid)} in ")
                file.write(f"{_read(pid, 'wchan')}\n{_read(pid, 'stack')}\n{dump_stacks(pid)}")
                file.flush()
                with suppress(OSError, subprocess.TimeoutExpired):
                    command = [*py_spy, str(pid)]
                    subprocess.run(command, stdout=file, stderr=file, timeout=_PY_SPY_DEADLINE_S)
        with suppress(OSError):
            if report := ras_report(pids, os.environ):
                file_of_ras = self.stacks / f"{Path(file_name).stem}-nccl-ras.txt"
                file_of_ras.write_text(report)

    def _learned_s(self, task: Task) -> float:
        durations = task.durations
        if len(durations) < _MIN_KNOWN:
            period = time.monotonic() // self._config.hang_floor_s
            # A last line may be half written, and there may be none.
            with suppress(OSError, ValueError):
                known = known_durations(self._run, period)[task.phase]
                longest = max(known[:_MIN_KNOWN] + known[-_MIN_KNOWN:])
                durations = [longest] * len(known)
        return max(self._config.hang_floor_s, learned_s(self._config, durations))

    def _stopped(self, pid: int) -> Finding:
        log = Path(os.path.realpath(f"/proc/{pid}/fd/1"))
        is_ours = log.parent == self.stacks.with_name("logs").resolve()
        # What torchrun's ranks say goes where torchrun's own output goes.
        tasks = [] if is_ours else [task.name for task in read_tasks(pid)]
        name = tasks[0] if tasks else log.stem
        what = f"{name} on {self._node} (pid {pid}, {_read(pid, 'comm')}) is stopped (T)"
        return Finding(1 - is_ours, 0.0, what)

    def _late(self, pid: int, task: Task, for_s: float, limit_s: float) -> Finding:
        frames = frames_of(dump_stacks(pid), task.thread) or [f"state {_state(pid)}"]
        own = next((frame for frame in frames if not _FOREIGN.match(frame)), frames[0])
        order = 3 if _WAITS.search(frames[0]) else 2
        phase = f"phase {task.phase} for {for_s:.0f} s, and may be for {limit_s:.0f} s"
        return Finding(order, limit_s, f"{task.name} on {self._node} is in {phase}, at {own}")


def end_if_hung(agent: ChildProcess, doctor: Doctor, attempt: Attempt) -> None:
    """For who started an agent: ends the attempt and the agent where the agent hangs."""
    try:
        doctor.judge(doctor.examine([agent.pid]))
    except MachineFailure as failure:
        doctor.write_stacks(descendants(agent.pid), f"{agent.log.stem}.txt")
        with suppress(OSError):
            attempt.end(FAILED, str(failure), can_go_on=True)
        agent.kill()


def _state(pid: int) -> str:
    """The letter by which /proc names the state of a process; empty where it has ended."""
    _, _, after_name = _read(pid, "stat").rpartition(")")
    return after_name[1:2]


def _read(pid: int, name: str) -> str:
    """A file of a process in /proc, as one line; empty where it cannot be read."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace").replace("\0", " ").strip()
    except OSError:
        return ""
