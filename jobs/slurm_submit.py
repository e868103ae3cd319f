"""Hands a prepared run to SLURM: by submitit, or as a plain batch script.

Nothing stays on the login node.
"""

import shlex

import submitit
from submitit.core.utils import FailedJobError

from jobs import where
from jobs.node import NodeJob
from jobs.run_files import SUBMITIT_FOLDER
from jobs.sbatch import (
    OUTLIVES_STEP,
    python_of,
    requeue_line,
    sbatch_options,
    sbatch_text,
    setup_lines,
    step_options,
)
from nanoslime.config.run import RunConfig
from nanoslime.layout import Layout
from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import publish
from nanoslime.types import RunError

# submitit takes these as parameters of its own.
_SUBMITIT_PARAMETERS = ("job-name", "nodes", "ntasks-per-node")


def submit_submitit(config: RunConfig, layout: Layout, run: RunDir, driver: str = "") -> str:
    """Submit by submitit and return the job id.

    submitit keeps its files in the run's slurm/ folder. Raises RunError where sbatch
    refuses the job.
    """
    if "%" in str(run.path):
        raise RunError(
            f"submitit takes the % in {run.path} for a pattern: "
            "use another run root or cluster.submit=sbatch"
        )
    folder = run.path / SUBMITIT_FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    executor = submitit.SlurmExecutor(folder, python=shlex.quote(python_of(config)))
    options = sbatch_options(config, layout)
    additional = {k: v for k, v in options.items() if k not in _SUBMITIT_PARAMETERS}
    executor.update_parameters(
        job_name=str(options["job-name"]),
        nodes=layout.num_nodes,
        ntasks_per_node=1,
        time=config.cluster.time_limit_min,
        signal_delay_s=config.cluster.signal_lead_s,
        setup=[*setup_lines(config), OUTLIVES_STEP],
        teardown=[requeue_line(config, run.path, driver)],
        srun_args=step_options(config, layout),
        stderr_to_stdout=True,
        # Sites that track workload keys refuse submitit's own.
        wckey=None,
        additional_parameters=additional,
    )
    try:
        job = executor.submit(NodeJob(str(run.path), driver))
    except FailedJobError as error:
        raise RunError(f"sbatch refused the job: {where.complaint(str(error))}") from error
    where.record_job(run, str(job.job_id))
    return str(job.job_id)


def submit_sbatch(config: RunConfig, layout: Layout, run: RunDir, driver: str = "") -> str:
    """Submit the batch script and return the job id.

    The script stays in the run directory as job.sbatch. Raises RunError where sbatch refuses
    the job.
    """
    text = sbatch_text(config, layout, run.path, driver)
    publish(run.batch_script, text.encode())
    job_id = where.submit("sbatch", text)
    where.record_job(run, job_id)
    return job_id
