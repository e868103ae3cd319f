"""Hands a prepared run to SLURM: by submitit, or as a plain batch script.

Nothing stays on the login node. The script is that of batch_script.py either way.
"""

import submitit
from submitit.core.utils import FailedJobError

from jobs import submission
from jobs.node import NodeJob
from nanoslime.config.run import RunConfig
from nanoslime.layout import Layout
from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import publish
from nanoslime.types import RunError
from tools.submit import snapshot
from tools.submit.batch_script import sbatch_text
from tools.submit.run_files import SUBMITIT_FOLDER


class _Executor(submitit.SlurmExecutor):
    """submitit's (1.5.4), which submits `script` in place of one of its own."""

    script = ""

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.script


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
    executor = _Executor(folder)
    code = snapshot.newest(run.path)
    executor.script = sbatch_text(config, layout, run.path, driver, code=code, submitit=True)
    executor.update_parameters(nodes=layout.num_nodes, ntasks_per_node=1)
    try:
        job = executor.submit(NodeJob(str(run.path), driver))
    except FailedJobError as error:
        raise RunError(f"sbatch refused the job: {submission.complaint(str(error))}") from error
    submission.record_job(run, str(job.job_id))
    return str(job.job_id)


def submit_sbatch(config: RunConfig, layout: Layout, run: RunDir, driver: str = "") -> str:
    """Submit the batch script and return the job id.

    The script stays in the run directory as job.sbatch. Raises RunError where sbatch refuses
    the job.
    """
    text = sbatch_text(config, layout, run.path, driver, code=snapshot.newest(run.path))
    publish(run.batch_script, text.encode())
    job_id = submission.submit("sbatch", text)
    submission.record_job(run, job_id)
    return job_id
