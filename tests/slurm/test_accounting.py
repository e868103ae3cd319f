"""What a real SLURM answers where accounts are enforced, GPUs have a type, and limits wait for the
start of a job.
"""

import pytest

from tests import process_table

pytestmark = pytest.mark.slurm


def submit(cluster, *options: str) -> tuple[int, str]:
    """The exit code of sbatch, and the last line that it says."""
    done = cluster.run("sbatch", *options, "--output=/dev/null", "--wrap=true", check=False)
    return done.returncode, (done.stdout + done.stderr).strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--account=nobody", "Invalid account or account/partition combination specified"),
        ("--account=chemistry", "Invalid account or account/partition combination specified"),
        ("--qos=vip", "Invalid qos specification"),
        ("--gres=gpu:a100:1", "Requested node configuration is not available"),
        ("--gres=gpu:h100:9", "Requested node configuration is not available"),
    ],
)
def test_what_the_site_does_not_give_is_refused(strict_slurm, option, complaint):
    code, line = submit(strict_slurm, option)
    assert code == 1
    assert line.endswith(complaint)


def test_own_accounts_and_qos_are_taken_and_the_first_account_is_the_default(strict_slurm):
    options = [[], ["--account=biology"], ["--qos=high"], ["--gres=gpu:h100:8"]]
    jobs = [strict_slurm.sbatch("--wrap=true", "--output=/dev/null", *more) for more in options]
    found = [strict_slurm.job(job) for job in jobs]
    assert [job["Account"] for job in found] == ["physics", "biology", "physics", "physics"]
    assert [job["QOS"] for job in found] == ["normal", "normal", "high", "normal"]
    strict_slurm.wait_state(jobs[-1], "COMPLETED", timeout_s=30)


def test_a_limit_of_the_partition_is_found_out_by_waiting_for_ever(strict_slurm):
    """sbatch takes the job, and so does --test-only; squeue alone says that it will not start."""
    too_long = ["--partition=long", "--time=10000"]
    assert submit(strict_slurm, "--test-only", *too_long)[0] == 0
    job = strict_slurm.sbatch(*too_long, "--wrap=true", "--output=/dev/null")

    def says_why() -> bool:
        fields = strict_slurm.job(job)
        return (fields["JobState"], fields["Reason"]) == ("PENDING", "PartitionTimeLimit")

    assert process_table.wait_for(says_why, 20, 0.2), strict_slurm.job(job)


def test_accounting_tells_of_a_job_that_is_over(strict_slurm):
    job = strict_slurm.sbatch("--account=biology", "--wrap=false", "--output=/dev/null")
    listing = ["sacct", "-nXP", "-j", str(job), "-o", "JobID,Account,State,ExitCode"]
    expected = f"{job}|biology|FAILED|1:0"

    def told() -> bool:
        return strict_slurm.run(*listing).stdout.strip() == expected

    assert process_table.wait_for(told, 30, 0.5), strict_slurm.run(*listing).stdout
