"""What a person does to a run: a shell in it, a tunnel to it, its end, its upload."""

import argparse
import getpass
import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from nanoslime.processes.command import ask
from nanoslime.processes.ports import free_port
from nanoslime.run_dir import RunDir
from nanoslime.types import RunError
from tools.watch.status import RunStatus, facts

_POLL_S = 1.0
_SCANCEL_DEADLINE_S = 30.0


def attach(asked: argparse.Namespace) -> Iterator[str]:
    """A shell in the run's allocation, beside what runs there; it takes this process's place."""
    status = RunStatus(asked.run)
    job = status.job
    if job is None or not job.runs:
        state = f"job {job.job_id} is {job.state}" if job else "it runs without SLURM"
        raise RunError(f"{status.run.path} has no allocation to attach to: {state}")
    place = [f"--nodelist={asked.node}"] if asked.node else []
    options = ["--overlap", f"--jobid={job.job_id}", "--nodes=1", "--ntasks=1", *place, "--pty"]
    command = ["srun", *options, os.environ.get("SHELL", "/bin/bash")]
    if not asked.print:
        os.execvp(command[0], command)
    yield shlex.join(command)


def tunnel(asked: argparse.Namespace) -> Iterator[str]:
    """Commands for a person's own machine, which lead to this one."""
    logs = RunDir.open(asked.run).tensorboard
    if logs.is_dir():
        port = free_port("127.0.0.1")
        serve = [sys.executable, "-m", "tensorboard.main", f"--logdir={logs}", f"--port={port}"]
        here = f"{getpass.getuser()}@{socket.getfqdn()}"
        yield "# TensorBoard, at http://localhost:6006 until Ctrl-C:"
        yield shlex.join(["ssh", "-t", "-L", f"6006:127.0.0.1:{port}", here, shlex.join(serve)])
    else:
        yield f"# TensorBoard: there is no {logs}"
    yield "# Ray's dashboard: runs start Ray without one"


def stop(asked: argparse.Namespace) -> Iterator[str]:
    """Has a run commit and end, then cancels its job.

    What has not ended in time is cancelled all the same; without SLURM it gets SIGTERM.
    """
    status = RunStatus(asked.run)
    job = status.job
    if status.runs:
        yield from _drain(status, asked.wait)
        # The run may have gone on in another job meanwhile.
        job = RunStatus(asked.run).job
    elif job is None or not (job.runs or job.waits):
        raise RunError(f"{status.run.path} does not run: {status.state}")
    if job is not None:
        done = ask(["scancel", job.job_id], _SCANCEL_DEADLINE_S)
        yield f"scancel {job.job_id}: {done.stderr.strip() or 'done'}"


def _drain(status: RunStatus, wait_s: float) -> Iterator[str]:
    """Asks the newest attempt, and each that SLURM starts meanwhile, until none runs."""
    deadline = time.monotonic() + wait_s
    asked = None
    while status.runs and time.monotonic() < deadline:
        attempt = status.run.attempt(status.lives[-1].number)
        if attempt != asked:
            asked = attempt
            try:
                attempt.request_stop(f"{getpass.getuser()} asked by runs.py stop")
            except OSError as error:
                yield f"the run cannot be asked to commit: {error}"
                break
            left_s = deadline - time.monotonic()
            yield f"attempt {attempt.number} commits and ends, for at most {left_s:.0f} s"
        time.sleep(_POLL_S)
        status = RunStatus(status.run.path)
    newest = status.lives[-1]
    record = facts(status.run.attempt(newest.number).path / "attempt.json")
    if not status.runs:
        yield f"attempt {newest.number}: {newest.outcome} {newest.cause}"
    elif status.job is None and record.get("host") == socket.gethostname():
        os.kill(record["pid"], signal.SIGTERM)
        yield f"process {record['pid']} has not ended in time and gets SIGTERM"


def sync(asked: argparse.Namespace) -> Iterator[str]:
    """Uploads what all attempts left for W&B, which knows them as one run."""
    run = RunDir.open(asked.run)
    folders = sorted(map(str, (run.path / "wandb").glob("offline-run-*")))
    if not folders:
        raise RunError(f"{run.path} has no wandb/offline-run-*: it ran without --use-wandb")
    if importlib.util.find_spec("wandb") is None:
        raise RunError(
            f"wandb is not installed in {sys.prefix}: "
            "install it there (uv pip install wandb) and sync again"
        )
    # W&B sends the folders of one run in the order of their starts.
    if subprocess.call([sys.executable, "-m", "wandb", "sync", "--include-synced", *folders]):
        raise RunError(f"not all of {run.path} was uploaded; sync it again")
    yield f"uploaded: {len(folders)} attempts of {run.path}"
