"""How a job is handed to SLURM, and which jobs have held a run one after the other.

A person's submission uses it, and so does a job that submits the next one of its chain.
"""

import os

from nanoslime.processes.command import ask
from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import publish_json, read_json
from nanoslime.types import RunError

_SUBMIT_DEADLINE_S = 60.0


def submit(sbatch: str, script: str, *options: str) -> str:
    """Submit a batch script and return the job's id. Of a job that submits, it inherits nothing.

    Raises RunError with the reason why SLURM refuses it.
    """
    command = [sbatch, "--parsable", *options]
    done = ask(command, _SUBMIT_DEADLINE_S, env=submitter_environment(), stdin=script)
    if done.returncode:
        raise RunError(f"sbatch refused the job: {complaint(done.stderr)}")
    # With several clusters it prints JOB;CLUSTER.
    job_id = done.stdout.strip().split(";")[0]
    if not job_id.isdecimal():
        raise RunError(
            f"sbatch took the job and printed {done.stdout.strip()!r} in place of its number; "
            "look for it in squeue, and end it: nothing of the run is kept"
        )
    return job_id


def submitter_environment() -> dict[str, str]:
    """That of a job without what SLURM tells a job, which would be options of the next one."""
    return {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or k[:6] != "SLURM_"}


def record_job(run: RunDir, job_id: str, after: str = "") -> None:
    """Notes the job that holds the run, and the one that has submitted it, where that is so."""
    earlier = [job for job in chain(run, after or job_id) if job != job_id]
    publish_json(run.job, {"job_id": job_id, "jobs": [*earlier, job_id]})


def chain(run: RunDir, job_id: str) -> list[str]:
    """The jobs of which each has submitted the next one, with `job_id` among them."""
    jobs = read_json(run.job).get("jobs", ()) if run.job.exists() else ()
    return list(jobs) if job_id in jobs else [job_id]


def complaint(text: str) -> str:
    """The errors in the output of sbatch, each once, in one line."""
    errors = []
    for line in text.splitlines():
        _, _, after_error = line.partition("error:")
        message = after_error.strip()
        if message and message not in errors:
            errors.append(message)
    if not errors:
        return text.strip().replace("\n", " ")
    return "; ".join(errors)
