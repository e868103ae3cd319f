"""The real SLURM of other tests: four nodes, signals, requeue, node failure, nothing left."""

import os
from pathlib import Path

import pytest

from tests import process_table
from tests.slurm.cluster import SlurmCluster

pytestmark = pytest.mark.slurm


@pytest.fixture
def batch(slurm_cluster, tmp_path):
    """Submit a script; its output goes to `tmp_path/<job id>.out`."""

    def submit(script: str, *options: str) -> int:
        file = tmp_path / "job.sh"
        file.write_text("#!/bin/bash\n" + script)
        output = f"--output={tmp_path}/%j.out"
        return slurm_cluster.sbatch(output, "--open-mode=append", *options, str(file))

    return submit


def output_has(file: Path, text: str, times: int = 1) -> bool:
    """Whether the text comes in the file that often within 20 s."""

    def has_come() -> bool:
        return file.exists() and file.read_text().count(text) == times

    return process_table.wait_for(has_come, timeout_s=20)


def test_srun_reaches_four_nodes_with_two_cpus_each(slurm_cluster):
    shape = ["--nodes=4", "--ntasks-per-node=1", "--cpus-per-task=2"]
    task = "echo $SLURMD_NODENAME $SLURM_CPUS_PER_TASK"
    result = slurm_cluster.run("srun", *shape, "bash", "-c", task)
    assert sorted(result.stdout.splitlines()) == ["n1 2", "n2 2", "n3 2", "n4 2"]


def test_more_cpus_than_a_node_has_are_refused(slurm_cluster):
    with pytest.raises(RuntimeError, match="Requested node configuration is not available"):
        slurm_cluster.sbatch("--cpus-per-task=3", "--wrap=true")


def test_nodes_have_addresses_of_their_own(slurm_cluster):
    command = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %o"]
    listing = slurm_cluster.run(*command).stdout
    assert listing.split() == [
        *("n1", "127.0.1.1"),
        *("n2", "127.0.1.2"),
        *("n3", "127.0.1.3"),
        *("n4", "127.0.1.4"),
    ]


def test_there_is_no_accounting(slurm_cluster):
    assert slurm_cluster.run("sacct", check=False).returncode == 1


def test_a_failed_job_is_reported_with_its_output(slurm_cluster, batch):
    job_id = batch("echo the cause; exit 3\n")
    with pytest.raises(RuntimeError, match=f"(?s)job {job_id} is FAILED .*the cause"):
        slurm_cluster.wait_state(job_id, "COMPLETED", timeout_s=20)
    assert slurm_cluster.job(job_id)["ExitCode"] == "3:0"


def test_waiting_too_long_names_the_job_and_its_state(slurm_cluster, batch):
    job_id = batch("sleep 60\n")
    slurm_cluster.wait_state(job_id, "RUNNING", timeout_s=20)
    late = f"job {job_id} is RUNNING .*awaited COMPLETED for 0.2 s"
    with pytest.raises(TimeoutError, match=late):
        slurm_cluster.wait_state(job_id, "COMPLETED", timeout_s=0.2)


def test_a_signal_reaches_the_tasks_of_every_node(slurm_cluster, batch, tmp_path):
    script = r"""
srun bash -c "
    trap 'echo got it on \$SLURMD_NODENAME; exit 0' USR1
    echo ready
    while :; do sleep 0.1; done"
"""
    job_id = batch(script, "--nodes=4", "--ntasks-per-node=1")
    output = tmp_path / f"{job_id}.out"
    assert output_has(output, "ready", times=4)
    slurm_cluster.run("scancel", "--signal=USR1", str(job_id))
    slurm_cluster.wait_state(job_id, "COMPLETED", timeout_s=20)
    answers = {line for line in output.read_text().splitlines() if line.startswith("got")}
    assert answers == {f"got it on n{i}" for i in range(1, 5)}


def test_a_requeued_job_starts_again_and_counts_it(slurm_cluster, batch, tmp_path):
    script = 'echo "life ${SLURM_RESTART_COUNT:-0}"\n[ -n "$SLURM_RESTART_COUNT" ] || sleep 60\n'
    job_id = batch(script, "--requeue")
    output = tmp_path / f"{job_id}.out"
    assert output_has(output, "life 0")
    slurm_cluster.run("scontrol", "requeue", str(job_id))
    fields = slurm_cluster.wait_state(job_id, "COMPLETED", timeout_s=40)
    assert fields["Restarts"] == "1"
    assert output.read_text().splitlines()[-1] == "life 1"


def test_an_urgent_job_preempts_and_requeues(slurm_cluster, batch, tmp_path):
    job_id = batch("echo started\nsleep 60\n", "--nodes=4", "--exclusive", "--requeue")
    assert output_has(tmp_path / f"{job_id}.out", "started")
    options = ["--partition=urgent", "--nodes=4", "--output=/dev/null"]
    urgent = slurm_cluster.sbatch(*options, "--wrap=true")
    slurm_cluster.wait_state(urgent, "COMPLETED", timeout_s=40)
    assert slurm_cluster.job(job_id)["Restarts"] == "1"


def test_a_killed_node_takes_its_tasks_along_and_fails_the_job(slurm_cluster, batch, tmp_path):
    script = "srun bash -c 'echo $$ > $SLURMD_NODENAME; exec sleep 60'\n"
    options = ["--nodes=2", "--no-requeue", f"--chdir={tmp_path}", "--nodelist=n3,n4"]
    job_id = batch(script, *options)
    assert output_has(tmp_path / "n3", "\n")
    assert output_has(tmp_path / "n4", "\n")
    slurm_cluster.kill_node("n4")
    alive = process_table.all_processes()
    assert int((tmp_path / "n3").read_text()) in alive
    assert int((tmp_path / "n4").read_text()) not in alive
    slurm_cluster.run("scontrol", "update", "nodename=n4", "state=down", "reason=test")
    slurm_cluster.wait_state(job_id, "NODE_FAIL", timeout_s=20)


def test_after_a_node_failure_the_next_test_has_four_nodes(slurm_cluster):
    slurm_cluster.run("srun", "--nodes=4", "true")


def test_stopping_ends_jobs_daemons_and_daemons_that_escaped(tmp_path):
    escaped = tmp_path / "pid"
    with SlurmCluster(num_nodes=1, gpus_per_node=8) as cluster:
        show_gpus = ["bash", "-c", "echo $CUDA_VISIBLE_DEVICES"]
        gpus = cluster.run("srun", "--gpus-per-node=8", *show_gpus).stdout
        assert gpus == "0,1,2,3,4,5,6,7\n"
        job = f"--wrap=setsid --fork bash -c 'echo $$ > {escaped}; exec sleep 60'; sleep 60"
        cluster.sbatch("--output=/dev/null", job)
        assert output_has(escaped, "\n")
        before = set(process_table.descendants(os.getpid(), process_table.all_processes()))
    after = process_table.all_processes()
    left = [p for p in after.values() if p.has_env("SLURM_CONF", str(cluster.config_file))]
    assert left == []
    escaped_pid = int(escaped.read_text())
    assert escaped_pid in {process.pid for process in before}
    assert escaped_pid not in after
    assert not cluster.directory.exists()


def test_two_clusters_of_one_host_do_not_touch_each_other(slurm_cluster):
    """Their nodes and jobs have equal names, numbers and addresses."""
    script = ["--nodes=4", "--ntasks-per-node=1", "--wrap=srun sleep 60"]
    with SlurmCluster() as other:
        jobs = {cluster.directory: cluster.sbatch(*script) for cluster in (slurm_cluster, other)}
        for cluster in (slurm_cluster, other):
            cluster.wait_state(jobs[cluster.directory], "RUNNING", timeout_s=20)
        # A node that is lost with a job on it would hold up the end of the cluster.
        other.run("scancel", str(jobs[other.directory]))
        other.wait_state(jobs[other.directory], "CANCELLED", timeout_s=20)
        other.kill_node("n1")
    own = jobs[slurm_cluster.directory]
    assert slurm_cluster.job(own)["JobState"] == "RUNNING"
    assert slurm_cluster.run("srun", "--overlap", f"--jobid={own}", "hostname").stdout.split()
    slurm_cluster.run("scancel", str(own))
