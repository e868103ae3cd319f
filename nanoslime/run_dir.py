"""The run directory: where everything of a run lies, and how its processes communicate.

    config.yaml plan.json provenance.json status.json summary.json
    config.accepted.yaml (until a driver has taken the one with which a run is resumed)
    metrics.jsonl evals.jsonl tensorboard/ rollouts/
    checkpoints/step_<k>/  hf/step_<k>/
    model/ (a rehearsal makes it)  weights/ (weight sync by disk)
    skipped/step_<k>/ (batches of steps left out)
    job.json (the SLURM job that holds the run, where there is one) job.sbatch (its batch script)
    code/<n>/ (what the jobs of its n-th submission run)
    attempts/<n>/ logs/<role>-<rank>.log nodes/ heartbeat/<node>.json lost/ stop.json end.json
                  preflight/<node>.json preflight.json preflight.txt (what the nodes are fit for)
                  staged/<node>.json (where the model lies on a node)
                  phases.jsonl (each phase, with the time at which it began)
                  stacks/node-<i>.txt (where something hung)
    attempts/latest

An attempt is one life of the job: every requeue is a new one. Only the newest one may go on and
commit: an older one ends as soon as it sees that there is another. Files are published by rename
and read with patience, since the directory usually is on a network filesystem.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from nanoslime.config import RunConfig
from nanoslime.config.load import dump, read
from nanoslime.layout import Layout
from nanoslime.storage import resume
from nanoslime.storage.commit import checkpoints
from nanoslime.storage.shared_files import (
    as_json,
    json_line,
    publish,
    publish_json,
    publish_once,
    read_json,
    seen,
)
from nanoslime.types import RunError

DONE = 0
FAILED = 1
STOPPED = 75
"""How an attempt may end.

STOPPED (EX_TEMPFAIL): told to stop, committed; another attempt can go on.
"""
LAST_PHASES = ("done", "stopped", "failed")
# What takes turns in a step; metrics time/<phase>_s hold the seconds of each.
STEP_PHASES = ("generate", "fetch", "logprobs", "train", "sleep", "weight_sync", "wake")
# An attempt holds so much room back, to say on a full disk how it ended.
_RESERVE_BYTES = 65_536
_SHARED_UMASK = 0o027
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# A run with a younger heartbeat is taken to be alive; heartbeats come every few seconds.
_ALIVE_S = 60
# A network filesystem may fail to read a file that it reads a moment later.
_READ_PAUSES_S = (0.1, 0.4)


def _at(name: str) -> property:
    """A path below that of a RunDir or an Attempt, as its attribute."""
    return property(lambda owner: owner.path / name)


@dataclass(frozen=True, slots=True)
class RunDir:
    path: Path

    config = _at("config.yaml")
    accepted_config = _at("config.accepted.yaml")
    plan = _at("plan.json")
    job = _at("job.json")
    batch_script = _at("job.sbatch")
    provenance = _at("provenance.json")
    summary = _at("summary.json")
    metrics = _at("metrics.jsonl")
    evals = _at("evals.jsonl")
    tensorboard = _at("tensorboard")
    rollouts = _at("rollouts")
    skipped = _at("skipped")
    checkpoints = _at("checkpoints")
    model = _at("model")
    weights = _at("weights")
    attempts = _at("attempts")

    @classmethod
    def create(cls, run_root: Path, name: str, share: str = "") -> RunDir:
        """A new directory: `name`, or `name`-2, `name`-3 and so on where that is taken.

        Its mode is 0700, or 2750 for the group `share`. Raises RunError for a group of which the
        user is no member.
        """
        run_root = run_root.expanduser().absolute()
        run_root.mkdir(parents=True, exist_ok=True)
        for candidate in candidate_names(name):
            try:
                (run_root / candidate).mkdir(mode=0o700)
            except FileExistsError:
                continue
            run = cls(run_root / candidate)
            if share:
                run._share(share)
            for folder in (run.attempts, run.checkpoints, run.rollouts):
                folder.mkdir()
            return run
        raise RunError(f"no free name like {name} in {run_root}")

    def _share(self, group: str) -> None:
        try:
            shutil.chown(self.path, group=group)
        except (LookupError, PermissionError) as error:
            self.path.rmdir()
            raise RunError(
                f"cluster.share={group!r}: {self.path} cannot be given to this group ({error}); "
                "name one of those that `id -Gn` lists, or leave it out"
            ) from error
        self.path.chmod(0o2750)
        os.umask(_SHARED_UMASK)

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run directory; RunError names a path that is none.

        Of one that a group may read, it may also read what this process and its children make.
        """
        run = cls(path.expanduser().absolute())
        if not run.attempts.is_dir():
            raise RunError(f"{path} is not a run directory: it has no attempts/ folder")
        if run.path.stat().st_mode & stat.S_ISGID:
            os.umask(_SHARED_UMASK)
        return run

    @property
    def name(self) -> str:
        return self.path.name

    def config_to_resume(self) -> Path:
        """The configuration with which the run's checkpoints are known to go on."""
        return self.accepted_config if self.accepted_config.exists() else self.config

    def write_config(self, config: RunConfig, layout: Layout | None = None) -> None:
        """What the run's processes read. `config_to_resume` stays what it was until a driver has
        loaded a checkpoint with the new configuration.
        """
        if self.config.exists():
            publish(self.accepted_config, self.config_to_resume().read_bytes())
        publish(self.config, dump(config).encode())
        if layout is not None:
            publish(self.plan, layout.to_json().encode())

    def check_resumed(self, config: RunConfig) -> None:
        """Raises RunError where `config` cannot go on with what the run has done."""
        before = read(self.config_to_resume())
        has_checkpoints = bool(checkpoints(self.checkpoints))
        resume.check_resumed(self.path, before, config, has_checkpoints=has_checkpoints)

    def refuse_if_alive(self) -> None:
        """RunError where the last attempt has not ended: the process that made it lives on this
        host, or, seen from another host, a node of it has lately given a sign of life.
        """
        attempt = self.latest_attempt()
        if attempt is None or attempt.ended() is not None:
            return
        maker = attempt.record
        pid = maker["pid"]
        if maker["host"] == socket.gethostname() and pid != os.getpid():
            if _lived_at(maker["started"], pid):
                raise RunError(
                    f"{self.path} is running: process {pid} on this host drives its attempt "
                    f"{attempt.number}; stop it first (kill {pid})"
                )
            return
        for node, beat in attempt.heartbeats().items():
            age_s = time.time() - float(beat["time"])
            has_left = "left" in beat
            if age_s < _ALIVE_S and not has_left:
                raise RunError(
                    f"{self.path} is running: node {node} of attempt {attempt.number} was alive "
                    f"{age_s:.0f} s ago; stop it first, or wait {_ALIVE_S} s if it was killed"
                )

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step}"

    def hf(self, step: int) -> Path:
        return self.path / "hf" / f"step_{step}"

    def new_attempt(self, key: str = "", num_nodes: int | None = None) -> Attempt:
        """The next attempt.

        key: job id and restart count; other nodes find the attempt by it. num_nodes: those that
        it has, where they are not all of the plan.
        """
        staged = self.attempts / f".new-{uuid.uuid4().hex}"
        for folder in ("logs", "heartbeat", "nodes", "lost"):
            (staged / folder).mkdir(parents=True)
        host = socket.gethostname()
        record = {"key": key, "started": time.time(), "host": host, "pid": os.getpid()}
        record |= {"rollouts": self.num_committed(), "num_nodes": num_nodes}
        publish_json(staged / "attempt.json", record)
        publish(staged / "reserve", b"r" * _RESERVE_BYTES)
        number = self._take_next_number(staged)
        link = self.attempts / f".latest-{uuid.uuid4().hex}"
        link.symlink_to(str(number))
        os.replace(link, self.attempts / "latest")
        return self.attempt(number)

    def _take_next_number(self, staged: Path) -> int:
        """Rename a prepared attempt to the first number that nobody else takes."""
        number = max(self._numbers(), default=0) + 1
        while True:
            target = self.attempts / str(number)
            try:
                os.rename(staged, target)
                return number
            except OSError:
                # A non-empty directory is never replaced.
                if not target.exists():
                    raise
                number += 1

    def attempt(self, number: int) -> Attempt:
        attempt = Attempt(self, number)
        if not attempt.path.is_dir():
            existing = self._numbers() or "none"
            raise RunError(f"{self.path} has no attempt {number}; it has {existing}")
        return attempt

    def find_attempt(self, key: str) -> Attempt | None:
        """The newest attempt made with `key`."""
        attempts = reversed(self.all_attempts())
        return next((attempt for attempt in attempts if attempt.key == key), None)

    def latest_attempt(self) -> Attempt | None:
        return next(reversed(self.all_attempts()), None)

    def all_attempts(self) -> list[Attempt]:
        return [Attempt(self, number) for number in self._numbers()]

    def write_status(self, phase: str, step: int, **facts: Any) -> None:
        """Publish what the run is doing.

        It has one writer: the driver, or node 0's agent before and after the driver.
        """
        attempt = self.latest_attempt()
        status = {
            "phase": phase,
            "step": step,
            "attempt": attempt.number if attempt else 0,
            "time": time.time(),
            "heartbeat": attempt.heartbeats() if attempt else {},
            **facts,
        }
        if attempt is not None and phase in LAST_PHASES:
            attempt.on_reserve(lambda: publish_json(self.path / "status.json", status))
        else:
            # A disk may take 5 ms to make a file durable, and a step has several phases.
            publish_json(self.path / "status.json", status, durable=False)
        if attempt is not None:
            line = {"time": status["time"], "phase": phase, "step": step, **facts}
            with attempt.phases.open("ab") as file:
                file.write(json_line(line))

    def status(self) -> dict[str, Any]:
        """The last published status; {} before the first, and where the machine lost power before
        it was on the disk.
        """
        try:
            return _read(self.path / "status.json")
        except RunError:
            return {}

    def num_committed(self) -> int:
        """The number of rollouts of the newest checkpoint; 0 without any."""
        return max((rollouts for rollouts, _ in checkpoints(self.checkpoints)), default=0)

    def _numbers(self) -> list[int]:
        return sorted(int(name) for name in os.listdir(self.attempts) if name.isdigit())


@dataclass(frozen=True, slots=True)
class Attempt:
    """One life of the job: logs, heartbeats, whether it must stop, how it ended."""

    run: RunDir
    number: int

    head = _at("head.json")
    """How to reach Ray: {ray_address, node_ip}."""
    phases = _at("phases.jsonl")
    """Every status in its order: {time, phase, step} and what else was told."""
    preflight = _at("preflight.json")
    """What was found out about the nodes before Ray started; preflight.txt is a table of it."""
    ray_token = _at("ray_token")

    @property
    def path(self) -> Path:
        return self.run.attempts / str(self.number)

    @property
    def key(self) -> str:
        """The key that `new_attempt` was given."""
        return str(self.record["key"])

    @property
    def record(self) -> dict[str, Any]:
        """By whom and when the attempt was made, and how many rollouts were committed then."""
        return dict(read_json(self.path / "attempt.json"))

    @property
    def layout(self) -> Layout:
        """The run's plan, on the nodes that the attempt has."""
        plan = Layout.from_json(self.run.plan.read_text())
        return plan.on(self.record.get("num_nodes") or plan.num_nodes)

    def make_ray_token(self) -> Path:
        """Ray's secret: without one, whoever reaches a port of it runs code as us."""
        publish(self.ray_token, secrets.token_hex(32).encode(), mode=0o600)
        return self.ray_token

    def log(self, role: str, rank: int) -> Path:
        return self.path / "logs" / f"{role}-{rank}.log"

    def beat(self, node: int, count: int, findings: Sequence[tuple] = ()) -> None:
        """A heartbeat of `node`: a rising count, since the clocks of nodes differ, and what hangs
        there.
        """
        self._publish(f"heartbeat/{node}", count=count, findings=findings)

    def leave(self, node: int) -> None:
        """In place of further heartbeats: nothing runs on `node` any more."""
        self.on_reserve(lambda: self._publish(f"heartbeat/{node}", left=True))

    def lost(self, node: int) -> Path:
        """The file that says that `node` is taken for lost."""
        return self.path / "lost" / f"{node}.json"

    def staged(self, node: int) -> Path:
        """The file that says where the readers of `node` find the model; see jobs/staging.py."""
        return self.path / "staged" / f"{node}.json"

    def heartbeats(self, nodes: Iterable[int] | None = None) -> dict[str, dict[str, Any]]:
        """By node: the last count, that node's clock, or that it has left.

        `nodes`: those to look at, by default all. A node is missing that has never beaten, and
        one whose file cannot be read this time.
        """
        folder = self.path / "heartbeat"
        if nodes is None:
            files = sorted(folder.glob("*.json"))
        else:
            files = [folder / f"{node}.json" for node in nodes]
        beats = {}
        for file in files:
            try:
                beats[file.stem] = read_json(file, deadline_s=0.0)
            except (OSError, RunError):
                continue
        return beats

    def request_stop(self, reason: str, *, requeue: bool = False) -> None:
        """Ask the driver to commit a checkpoint and end with STOPPED.

        requeue: the job shall go on in a new attempt (its time is up), rather than end
        (somebody asked). The first reason stays. A request to end takes an earlier or later one
        to go on back, as when a job is cancelled while it drains.
        """
        if not requeue:
            self._publish_once("final", reason=reason)
        self._publish_once("stop", reason=reason, requeue=requeue)

    def must_stop(self) -> str | None:
        """Why the attempt must stop, or None. Raises RunError where a newer one has begun."""
        with suppress(OSError):
            self.require_newest()
        return _read(self.path / "stop.json").get("reason")

    def final_stop(self) -> str | None:
        """Why the run was asked to end, rather than to go on in a new attempt, if it was."""
        return _read(self.path / "final.json").get("reason")

    def is_newest(self) -> bool:
        return max(self.run._numbers()) <= self.number

    def require_newest(self) -> None:
        """RunError where a newer attempt of the run has begun, as when SLURM has lost this one's
        node and started the job anew.
        """
        if not self.is_newest():
            raise RunError(
                f"attempt {max(self.run._numbers())} of {self.run.path} has begun, so attempt "
                f"{self.number} ends and commits nothing more; look at the newer one"
            )

    def end(self, code: int, reason: str, *, can_go_on: bool = False) -> bool:
        """Record how the attempt ended, DONE, STOPPED or FAILED. The first record stays.

        can_go_on: a machine failed, so that another attempt may do better. Returns whether this
        record is the one that stays.
        """
        facts = {"code": code, "reason": reason, "can_go_on": can_go_on or code == STOPPED}
        return self.on_reserve(lambda: self._publish_once("end", **facts))

    def can_go_on(self) -> bool:
        """Whether the attempt was stopped, failed by a fault of a machine, or could not say how
        it ended.
        """
        return bool(_read(self.path / "end.json").get("can_go_on", True))

    def ended(self) -> tuple[int, str] | None:
        """(code, reason) once the attempt has ended."""
        end = _read(self.path / "end.json")
        if not end:
            return None
        return end["code"], end["reason"]

    def write_final_status(self) -> None:
        """The status of a run whose driver could not say how it ended. That of a newer attempt
        stays.
        """
        code, reason = self.ended() or (FAILED, "unknown")
        if code == DONE or not self.is_newest():
            return
        status = self.run.status()
        if status.get("attempt") == self.number and status.get("error"):
            return
        phase = "stopped" if code == STOPPED else "failed"
        self.run.write_status(phase, int(status.get("step", 0)), error=reason)

    def on_reserve[T](self, write: Callable[[], T]) -> T:
        """Does `write`; on a full disk once more, in the room that the attempt held back."""
        try:
            return write()
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            (self.path / "reserve").unlink(missing_ok=True)
            return write()

    def _publish(self, name: str, **facts: Any) -> None:
        publish_json(self.path / f"{name}.json", {**facts, "time": time.time()})

    def _publish_once(self, name: str, **facts: Any) -> bool:
        return publish_once(self.path / f"{name}.json", as_json({**facts, "time": time.time()}))


def candidate_names(name: str) -> Iterator[str]:
    """The names that a new run takes the first free one of."""
    yield name
    for number in range(2, 10_000):
        yield f"{name}-{number}"


def _read(path: Path) -> dict[str, Any]:
    """The facts in a JSON file, {} where there is none yet, or none that can be read."""
    for pause_s in (*_READ_PAUSES_S, 0.0):
        try:
            return dict(read_json(path)) if seen(path) else {}
        except OSError:
            time.sleep(pause_s)
    return {}


def _lived_at(moment: float, pid: int) -> bool:
    """Whether the process of this number on this host has lived since `moment`, or before."""
    try:
        return bool(psutil.Process(pid).create_time() <= moment)
    except psutil.NoSuchProcess:
        return False
