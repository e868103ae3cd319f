"""A cluster file: what a site writes down once, and what is refused in it."""

import re
from pathlib import Path

import pytest

from nanoslime.config import ClusterConfig
from nanoslime.config.load import load
from nanoslime.types import RunError


def read_cluster(tmp_path: Path, text: str, *flags: str) -> ClusterConfig:
    file = tmp_path / "site.yaml"
    file.write_text(f"gpus_per_node: 8\n{text}\n")
    return load(None, file, flags).cluster


@pytest.mark.parametrize("text", ["", "# nothing\n", "name: mine\nnodes: 2\n"])
def test_a_cluster_file_says_whether_its_nodes_have_gpus(tmp_path, text):
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises(
        RunError, match=r"site.yaml: gpus_per_node is not set; .*`gpus_per_node: 0`"
    ):
        load(None, file, [])
    assert load(None, file, ["--cluster.gpus-per-node", "8"]).cluster.device == "cuda"
    file.write_text(text + "gpus_per_node: 0\n")
    assert load(None, file, []).cluster.device == "cpu"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('comment: "a\\nrm -rf /"', r"--comment='a\\nrm -rf /' has a line break"),
        ('extra_sbatch: {nice: "1\\r2"}', "--nice=.* has a line break"),
        ('extra_sbatch: {"nice=1\\nrm": x}', "extra_sbatch: .* is no option of sbatch"),
        (
            "extra_sbatch: {--nice: '1'}",
            "'--nice' is no option of sbatch; write .* without the dash",
        ),
        ("env: {'A B': x}", "cluster.env: 'A B' is no name of an environment variable"),
        ("srun_options: [mpi=none]", "'mpi=none' is no option; write each one with its dashes"),
        ("container: apptainer", "cluster.container=apptainer needs cluster.container_image"),
        (
            "container_image: a.sif",
            "no effect with cluster.container=none; set it to pyxis or appt",
        ),
        ("venv: a\nconda: b", "venv='.*a' and cluster.conda='b' are two environments"),
        ("infiniband_hcas: mlx5_0\nenv: {NCCL_IB_HCA: mlx5_1}", "env has NCCL_IB_HCA, which"),
        ("gpu_request: gres:gpu:h100:8", "gpu_request='gres:gpu:h100:8': must match"),
        ("gpu_request: gres", "gpu_request='gres': must match"),
        ("exclusive: 3", "cluster.exclusive"),
        (
            "time_limit_min: 300\nmax_time_min: 240",
            "time_limit_min=300 is above .*max_time_min=240",
        ),
        (
            "nodes: 4\ntime_limit_min: 120\nmax_gpu_hours: 63",
            r"max_gpu_hours=63 is below the 64 hours of 4 nodes of 8 GPUs for 2 h; ask for fewer",
        ),
        ("extra_sbatch: {export: 'ALL,HF_TOKEN=hunter2'}", "export HF_TOKEN in the shell"),
    ],
)
def test_what_no_job_could_do_is_refused_with_the_way_out(tmp_path, text, says):
    with pytest.raises(RunError) as refused:
        read_cluster(tmp_path, text)
    assert re.search(says, str(refused.value))
    assert "hunter2" not in str(refused.value)


def test_a_cap_is_reached_and_not_passed(tmp_path):
    text = "nodes: 4\ntime_limit_min: 120\nmax_gpu_hours: 64"
    assert read_cluster(tmp_path, text).max_gpu_hours == 64
    with pytest.raises(RunError, match="below the 80 hours of 5 nodes"):
        read_cluster(tmp_path, text, "--nodes", "5")


def test_settings_of_nccl_become_the_variables_that_it_reads(tmp_path):
    text = "nccl: {DEBUG: WARN, NCCL_IB_TC: '106'}\ninfiniband_hcas: mlx5_0,mlx5_1\nenv: {A: b}"
    assert read_cluster(tmp_path, text).variables == {
        "NCCL_DEBUG": "WARN",
        "NCCL_IB_TC": "106",
        "NCCL_IB_HCA": "mlx5_0,mlx5_1",
        "A": "b",
    }


def test_a_site_without_requeue_goes_on_by_a_chain():
    assert ClusterConfig().goes_on_by == "requeue"
    assert ClusterConfig(requeue=False).goes_on_by == "chain"
    assert ClusterConfig(resume_by="chain").goes_on_by == "chain"
