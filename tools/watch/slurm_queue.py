"""What SLURM says of a user's jobs, asked at most once in 30 s by all commands of this user.

    squeue --user OWNER -> a file in the user's cache -> the job of a run

A squeue that is missing, fails or does not answer is an answer too, and is kept as long.
"""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from nanoslime.processes.command import ask
from nanoslime.storage.shared_files import publish
from nanoslime.types import RunError

_ASK_EVERY_S = 30.0
_ANSWER_DEADLINE_S = 10.0
# %i is JOB_INDEX for a task of a job array, whose %A is the array's until it begins.
_FORMAT = "%A|%T|%r|%L left on %N|%i"
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")


class Job(NamedTuple):
    """A job as squeue prints it; of one that is not in the queue `state` says so in words."""

    job_id: str
    state: str
    # Why it waits; "None" where SLURM has no reason, and empty without a job.
    reason: str = ""
    time_and_nodes: str = ""

    @property
    def waits(self) -> bool:
        return self.state in _WAITING

    @property
    def runs(self) -> bool:
        return bool(self.reason) and not self.waits


def find_job(job_id: str, owner: int) -> Job:
    """The job of the user with the id `owner`, as it was at most 30 s ago."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cluster = os.environ.get("SLURM_CONF", "") + os.environ.get("SLURM_CLUSTERS", "")
    tag = hashlib.sha256(f"{owner} {cluster}".encode()).hexdigest()[:16]
    cache = home / "nanoslime" / f"squeue-{tag}"
    answer = ""
    # A home that cannot be written keeps nothing.
    with suppress(OSError):
        if 0 <= time.time() - cache.stat().st_mtime < _ASK_EVERY_S:
            answer = cache.read_text()
    if not answer:
        with suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Whoever comes meanwhile does not ask again.
            publish(cache, b"squeue is being asked", mode=0o600)
        answer = _squeue(owner)
        with suppress(OSError):
            publish(cache, answer.encode(), mode=0o600)
    problem, *lines = answer.split("\n")
    jobs = {}
    for line in lines:
        number, *told = line.split("|")
        if len(told) > 2:
            name = told[3] if len(told) > 3 else number
            jobs[name] = Job(name, *told[:3])
    return jobs.get(job_id) or Job(job_id, problem or "not in the queue any more")


def _squeue(owner: int) -> str:
    """A line with the problem, empty where there is none, and a line for each job."""
    command = ["squeue", "--noheader", "--array", f"--user={owner}", f"--format={_FORMAT}"]
    try:
        done = ask(command, _ANSWER_DEADLINE_S, who="squeue")
    except RunError as error:
        return str(error)
    except OSError:
        return "there is no squeue here"
    return f"squeue: {' '.join(done.stderr.split())}" if done.returncode else f"\n{done.stdout}"
