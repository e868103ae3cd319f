"""What a run does and has done, from its files and SLURM's queue.

    config.yaml plan.json job.json attempts/<n>/ metrics.jsonl evals.jsonl checkpoints/
    -> RunStatus -> a line of `ps`, the page of `status` and `top`, the report

It reads a run that lives, has ended or never started, and writes nothing. What is missing, or
half written, counts as not known.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil

from nanoslime.config import RunConfig
from nanoslime.config.load import read
from nanoslime.layout import Layout
from nanoslime.run_dir import DONE, LAST_PHASES, STEP_PHASES, STOPPED, Attempt, RunDir
from nanoslime.storage.commit import checkpoints
from nanoslime.storage.shared_files import read_json
from nanoslime.types import RunError
from tools.watch.slurm_queue import Job, find_job

# Without an end, a process and a job, an attempt lives that was heard of so lately.
_SILENCE_S = 90.0
# Medians are those of so many steps.
_NUM_RECENT = 50
# What comes before one of these is the start of an attempt.
_WORK = ("evaluate", "generate")
KINDS = ("start", "work", "lost", "waiting")


class Phase(NamedTuple):
    """What the driver did after `step` steps, from `begin` to `end` (seconds since the epoch)."""

    name: str
    step: int
    begin: float
    end: float


class Life(NamedTuple):
    """An attempt from its begin to its end, or to now."""

    number: int
    # running, done, stopped, failed, or vanished: nobody has told its end.
    outcome: str
    cause: str
    # At least one: the time before anything was told. Work begins with the one at `work_at`.
    phases: list[Phase]
    work_at: int
    first_step: int


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Says of which run it is, where its files hold something else than a run writes: RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RunError(
            f"{path}: one of its files is damaged ({type(error).__name__}: {error}); put it back, "
            "or move the run's directory out of the run root"
        ) from error


class RunStatus:
    """A run as it is now. RunError where `path` is no run directory, or a file in it is damaged."""

    def __init__(self, path: Path) -> None:
        with damage_named(path):
            self._read(path)

    def _read(self, path: Path) -> None:
        self.run = RunDir.open(path)
        self.now = time.time()
        self.config = RunConfig()
        with suppress(RunError, OSError):
            self.config = read(self.run.config)
        self.layout = None
        with suppress(ValueError, TypeError, KeyError, OSError):
            self.layout = Layout.from_json(self.run.plan.read_text())
        self.rows = rows(self.run.metrics)
        self.evals = rows(self.run.evals)
        numbers = sorted(int(name) for name in os.listdir(self.run.attempts) if name.isdigit())
        attempts = [Attempt(self.run, number) for number in numbers]
        self.job = _job(self.run, attempts)
        self.lives = []
        for attempt in attempts:
            alive = attempt is attempts[-1] and _lives(attempt, self.job, self.now)
            self.lives.append(_life(attempt, self.now if alive else None))
        self.runs = bool(self.lives) and self.lives[-1].outcome == "running"
        self.phase = self.lives[-1].phases[-1] if self.lives else Phase("", 0, self.now, self.now)
        # In a word; SLURM's is up to 30 s old, and a job may have begun without an attempt.
        self.state = self.lives[-1].outcome if self.lives else "never started"
        if self.job is not None and self.job.waits:
            self.state = f"{self.job.state} ({self.job.reason})"
        elif self.job is not None and self.job.runs and not self.runs:
            self.state = f"{self.state}, job {self.job.state}"

    def phase_s(self) -> dict[str, float]:
        """Median seconds of a step and of its phases."""
        found = {}
        for name in (*STEP_PHASES, "step"):
            seconds = [row.get(f"time/{name}_s") or 0.0 for row in self.rows[-_NUM_RECENT:]]
            if any(seconds):
                found[name] = median(seconds)
        return found

    def idle(self) -> dict[str, float]:
        """The shares of a step in which engines, trainers and all devices wait for others.

        Empty where engines and trainers share their devices. Engines that generate ahead, while
        the trainers work, count as never idle.
        """
        seconds = self.phase_s()
        layout = self.layout
        if layout is None or self.config.cluster.colocate or not seconds.get("step"):
            return {}
        num_slots = sum(len(engine.slots) for engine in layout.engines)
        num_ranks = len(layout.trainers)
        if not num_slots or not num_ranks:
            return {}
        trainers = min(1.0, seconds.get("generate", 0.0) / seconds["step"])
        engines = max(0.0, 1 - trainers - seconds.get("weight_sync", 0.0) / seconds["step"])
        if self.config.rollout.max_staleness:
            engines = 0.0
        total = (engines * num_slots + trainers * num_ranks) / (num_slots + num_ranks)
        return {"engines": engines, "trainers": trainers, "all devices": total}

    def eta_s(self) -> float | None:
        """Seconds to the last step at the pace of this attempt; None where there is none."""
        work = self.lives[-1].phases[self.lives[-1].work_at :] if self.runs else []
        if not work or work[-1].step == work[0].step:
            return None
        pace_s = (work[-1].begin - work[0].begin) / (work[-1].step - work[0].step)
        return pace_s * (self.config.rollout.num_rollout - work[-1].step)

    def hours(self) -> tuple[str, list[dict[str, float]]]:
        """The unit, and by attempt how many of them each of KINDS took."""
        num_gpus = self.config.cluster.gpus_per_node
        devices = (self.layout.num_nodes if self.layout else 1) * (num_gpus or 1)
        # The step from which the attempt after a life went on, or would go on.
        resumed_at = float("inf")
        if self.lives and self.lives[-1].outcome not in ("running", "done"):
            resumed_at = max((step for step, _ in checkpoints(self.run.checkpoints)), default=0)
        by_attempt: list[dict[str, float]] = []
        for life in reversed(self.lives):
            num_kept = max(life.work_at, _num_kept(life.phases, resumed_at))
            ends = [0, life.work_at, num_kept, len(life.phases)]
            start, work, lost = (
                sum(phase.end - phase.begin for phase in life.phases[first:end]) * devices / 3600
                for first, end in pairwise(ends)
            )
            waiting = work * self.idle().get("all devices", 0.0)
            spent = zip(KINDS, (start, work - waiting, lost, waiting), strict=True)
            by_attempt.insert(0, dict(spent))
            if life.work_at < len(life.phases):
                resumed_at = life.first_step
        return "GPU hours" if num_gpus else "node hours", by_attempt


def facts(path: Path) -> dict[str, Any]:
    """What a JSON file says; {} where it is missing, or cannot be read yet."""
    with suppress(OSError, RunError, TypeError, ValueError):
        return dict(read_json(path, deadline_s=0.0))
    return {}


def rows(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, without what is cut short."""
    found = []
    with suppress(OSError):
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, TypeError):
                found.append(dict(json.loads(line)))
    return found


def _job(run: RunDir, attempts: list[Attempt]) -> Job | None:
    """The job that was submitted for the run, else that in which its newest attempt began."""
    key = str(facts(attempts[-1].path / "attempt.json").get("key", "")) if attempts else ""
    job_id = str(facts(run.path / "job.json").get("job_id") or key.rpartition("-")[0])
    return find_job(job_id, run.path.stat().st_uid) if job_id[:1].isdigit() else None


def _lives(attempt: Attempt, job: Job | None, now: float) -> bool:
    """Whether an attempt without an end goes on."""
    if job is not None and (job.runs or job.waits):
        return job.runs
    record = facts(attempt.path / "attempt.json")
    if record.get("host") == socket.gethostname() and "pid" in record:
        with suppress(psutil.Error):
            # A process that is younger than the attempt has its number by chance.
            return bool(psutil.Process(record["pid"]).create_time() < record["started"] + 1)
        return False
    return now - max(_heard_of(attempt), default=0.0) < _SILENCE_S


def _heard_of(attempt: Attempt) -> list[float]:
    """When its nodes and its driver told anything."""
    told = [*attempt.heartbeats().values(), *rows(attempt.phases)]
    return [row["time"] for row in told if "time" in row]


def _life(attempt: Attempt, now: float | None) -> Life:
    """now: for an attempt that goes on unless it has told its end."""
    told = [row for row in rows(attempt.phases) if {"time", "phase", "step"} <= row.keys()]
    last = told[-1] if told else {}
    end = facts(attempt.path / "end.json")
    outcome = "vanished" if now is None else "running"
    if last.get("phase") in LAST_PHASES:
        outcome = told.pop()["phase"]
    if "code" in end:
        outcome = {DONE: "done", STOPPED: "stopped"}.get(end["code"], "failed")
    heard_of = _heard_of(attempt)
    begin = facts(attempt.path / "attempt.json").get("started", min(heard_of, default=0.0))
    ended = now if outcome == "running" else end.get("time", max(heard_of, default=begin))
    first = {"phase": "start", "step": told[0]["step"] if told else 0, "time": begin}
    phases = [
        Phase(row["phase"], row["step"], row["time"], max(row["time"], following["time"]))
        for row, following in pairwise([first, *told, {"time": ended}])
    ]
    asked = facts(attempt.path / "stop.json") if outcome == "stopped" else {}
    cause = last.get("error") or end.get("reason") or asked.get("reason", "")
    if outcome == "vanished":
        cause = f"not heard of after {clock(phases[-1].end)}, in phase {phases[-1].name}"
    work_at = next((i for i, phase in enumerate(phases) if phase.name in _WORK), len(phases))
    first_step = phases[min(work_at, len(phases) - 1)].step
    return Life(attempt.number, outcome, cause, phases, work_at, first_step)


def _num_kept(phases: list[Phase], resumed_at: float) -> int:
    """How many phases led to the state from which the run went on: those up to its commit.

    A checkpoint after "train" is only being saved; it is committed after the weight sync.
    """
    made_again = len(phases)
    for i, phase in reversed(list(enumerate(phases))):
        is_commit = phase.name == "checkpoint" and phases[i - 1].name != "train"
        if is_commit and phase.step == resumed_at:
            return i + 1
        if phase.name == "generate" and phase.step >= resumed_at:
            made_again = i
    return made_again


def clock(seconds: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(seconds))


def span(seconds: float) -> str:
    """12 s, 3.4 min or 5.6 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def subjects(status: RunStatus) -> Iterator[tuple[str, str]]:
    """What a person is told of a run: subject and text."""
    phase = status.phase
    doing = f", {phase.name} for {span(phase.end - phase.begin)}" if status.runs else ""
    yield "run", str(status.run.path)
    yield "state", status.state
    if status.job is not None:
        yield "job", "  ".join(filter(None, status.job))
    yield "step", f"{phase.step} of {status.config.rollout.num_rollout}{doing}"
    for label, found, key in (
        ("reward", status.rows, "rollout/reward_mean"),
        ("eval", status.evals, "reward"),
    ):
        values = [row[key] for row in found if row.get(key) is not None]
        if values:
            yield label, f"{values[-1]:.3f}, from {values[0]:.3f}"
    seconds = [f"{name} {value:.3g}" for name, value in status.phase_s().items()]
    yield "seconds", f"{'  '.join(seconds)} (medians of the last {_NUM_RECENT} steps)"
    idle = [f"{role} {share:.0%}" for role, share in status.idle().items()]
    yield "idle", ", ".join(idle) or "engines and trainers share their devices"
    if (eta_s := status.eta_s()) is not None:
        yield "ETA", f"{span(eta_s)}, {clock(status.now + eta_s)}"
    unit, hours = status.hours()
    sums = {kind: sum(spent[kind] for spent in hours) for kind in KINDS}
    parts = [f"{kind} {spent:.3g}" for kind, spent in sums.items()]
    yield "hours", f"{sum(sums.values()):.3g} {unit}: {', '.join(parts)}"
    for life in status.lives:
        first, last = life.phases[0], life.phases[-1]
        lived = f"{clock(first.begin)}, {span(last.end - first.begin)}"
        outcome = f"{life.outcome}: {life.cause}" if life.cause else life.outcome
        yield (
            f"attempt {life.number}",
            f"{lived}, steps {life.first_step} to {last.step}, {outcome}",
        )
