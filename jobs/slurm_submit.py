"""Hands a prepared run to SLURM: by submitit, or as a plain batch script. Nothing stays on the login node."""

import shlex
from dataclasses import dataclass
from typing import Any

import submitit
from submitit.core.utils import DelayedSubmission, FailedJobError

from jobs.executor import python_of, sbatch_options, sbatch_text, setup_lines, step_options
from jobs.node import NodeJob
from nanoslime.config.run import RunConfig
from nanoslime.layout import Layout
from nanoslime.processes.command import ask
from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import publish, publish_json
from nanoslime.types import RunError

_COMMAND_DEADLINE_S = 60.0


@dataclass(frozen=True)
class SubmittedJob(NodeJob):
    """The callable that submitit pickles, and asks what to run after a requeue."""

    def checkpoint(self, *args: Any, **kwargs: Any) -> DelayedSubmission:
        """The same again: called by submitit's handler, once the attempt has ended (see NodeJob.__call__)."""
        return DelayedSubmission(self)


def submit_submitit(config: RunConfig, layout: Layout, run: RunDir, driver: str = "") -> str:
    """Submit by submitit, which requeues by itself; returns the job id. Files: the run's slurm/ folder."""
    if "%" in str(run.path):
        way_out = "use another run root or cluster.submit=sbatch"
        raise RunError(f"submitit takes the % in {run.path} for a pattern: {way_out}")
    options = sbatch_options(config, layout)
    folder = run.path / "slurm"
    folder.mkdir(mode=0o700, exist_ok=True)
    python, requeues = shlex.quote(python_of(config)), config.cluster.max_requeues
    executor = submitit.SlurmExecutor(folder, max_num_timeout=requeues, python=python)
    executor.update_parameters(
        job_name=str(options.pop("job-name")),
        nodes=layout.num_nodes,
        ntasks_per_node=1,
        time=config.cluster.time_limit_min,
        signal_delay_s=config.cluster.signal_lead_s,
        setup=setup_lines(config),
        srun_args=step_options(config, layout),
        stderr_to_stdout=True,
        wckey=None,  # sites that track workload keys refuse submitit's own
        additional_parameters={
            k: v for k, v in options.items() if k not in ("nodes", "ntasks-per-node")
        },
    )
    try:
        job = executor.submit(SubmittedJob(str(run.path), driver))
    except FailedJobError as error:
        raise RunError(f"sbatch refused the job: {_reason(str(error))}") from error
    return _record(run, str(job.job_id), "submitit")


def submit_sbatch(config: RunConfig, layout: Layout, run: RunDir, driver: str = "") -> str:
    """Submit the batch script, kept as job.sbatch in the run directory; returns the job id."""
    script = run.path / "job.sbatch"
    publish(script, sbatch_text(config, layout, run.path, driver).encode())
    done = ask(["sbatch", "--parsable", str(script)], _COMMAND_DEADLINE_S)
    if done.returncode:
        raise RunError(f"sbatch refused the job: {_reason(done.stderr)}")
    return _record(run, done.stdout.strip().split(";")[0], "sbatch")


def _record(run: RunDir, job_id: str, submitter: str) -> str:
    publish_json(run.path / "job.json", {"job_id": job_id, "submitted_by": submitter})
    return job_id


def _reason(text: str) -> str:
    """What sbatch complained about, in one line."""
    lines = [line.partition("error:")[2].strip() for line in text.splitlines() if "error:" in line]
    return "; ".join(dict.fromkeys(lines)) or text.strip().replace("\n", " ")
