"""The text of a cluster's file, of facts that are made here: what it leads to when it is loaded."""

from dataclasses import replace
from pathlib import Path

import pytest

from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.load import load
from nanoslime.types import RunError
from tools.site.cluster_file import Request, text
from tools.site.node_facts import NodeFacts
from tools.site.questions import Answers, Given, Person, ask_person, max_time_min
from tools.site.slurm import Association, Cluster, NodeKind, Partition, Share

WHOLE = Share(96, 1_400_000)
H100 = NodeKind("gpu", 4, 96, 1_400_000, 8, "h100", ("nvlink",), "g[1-4]")
GPU = Partition("gpu", True, True, 2880, 120, (), (), ("high",), (), None)
ALPS = Cluster(
    name="alps",
    config={"SLURM_VERSION": "23.11.4", "JobRequeue": "1"},
    partitions=(GPU,),
    kinds=(H100,),
    associations=(Association("physics", "", ("high", "normal"), "", 1440),),
    why_no_accounts="",
    default_account="physics",
    qos_limits={"high": 720},
)
ANSWERS = Answers(GPU, H100, "physics", "high", Path("/scratch/me/runs"), Path("/home/me/.venv"))
NODE = NodeFacts(
    host="g1",
    is_node=True,
    interfaces={"eno1": "ethernet", "ib0": "infiniband"},
    default_interface="eno1",
    hcas={"mlx5_0": "InfiniBand", "mlx5_1": "InfiniBand"},
    scratch={"/tmp": 50, "/local": 3000},
    gpu_memory_gib=79.647,
    gpu_name="NVIDIA H100 80GB HBM3",
)


def loaded(tmp_path: Path, cluster: Cluster = ALPS, node: NodeFacts = NODE) -> ClusterConfig:
    request = Request(cluster, ANSWERS, max_time_min(cluster, ANSWERS), Share(92, 1_384_000))
    file = tmp_path / "alps.yaml"
    file.write_text(text(request, node))
    return load(None, file, []).cluster


def test_all_that_was_found_is_in_the_file(tmp_path):
    cluster = loaded(tmp_path)
    assert (cluster.gpus_per_node, cluster.gpu_memory_gib) == (8, 79.6)
    assert (cluster.cpus_per_node, cluster.memory_per_node) == (92, "1384000M")
    assert (cluster.partition, cluster.account, cluster.qos) == ("gpu", "physics", "high")
    assert (cluster.network_interface, cluster.infiniband_hcas) == ("ib0", "mlx5_0,mlx5_1")
    assert cluster.scratch == "/local"
    assert (cluster.run_root, cluster.venv) == ("/scratch/me/runs", "/home/me/.venv")
    # The shortest of two days, one day of the association and twelve hours of the QOS.
    assert (cluster.max_time_min, cluster.time_limit_min) == (720, 720)
    # A preempted job has 120 s.
    assert cluster.signal_lead_s == 120


def test_gpus_are_asked_for_by_type_where_a_partition_has_several(tmp_path):
    assert loaded(tmp_path).gpu_request == "gpus-per-node"
    other = replace(H100, count=2, gpu_type="a100", nodes="a[1-2]")
    mixed = replace(ALPS, kinds=(H100, other))
    assert loaded(tmp_path, mixed).gpu_request == "gres:gpu:h100"


@pytest.mark.parametrize("gpu_type", ["3090", "2080ti", "1g.10gb", "nvidia_a100_1g.10gb+me"])
def test_gpus_of_a_node_with_several_types_are_asked_for_by_any_type(gpu_type, tmp_path):
    kind = replace(H100, gpu_type=gpu_type, has_other_gpus=True)
    request = Request(ALPS, replace(ANSWERS, kind=kind), None, WHOLE)
    file = tmp_path / "alps.yaml"
    file.write_text(text(request, NODE))
    cluster = load(None, file, []).cluster
    assert cluster.gpu_request == f"gres:gpu:{gpu_type}"
    # A slice has 10 GB (9.3 GiB) of the GPU whose memory nvidia-smi tells.
    assert cluster.gpu_memory_gib == (9.3 if "1g.10gb" in gpu_type else 79.6)


def test_the_qos_of_a_partition_bounds_the_time_of_all_its_jobs():
    of_partition = replace(GPU, qos="gpuqos")
    cluster = replace(ALPS, qos_limits={"high": 720, "gpuqos": 600})
    assert max_time_min(cluster, ANSWERS) == 720
    assert max_time_min(cluster, replace(ANSWERS, partition=of_partition)) == 600
    # It has one without accounts, too.
    answers = replace(ANSWERS, partition=of_partition, account="")
    assert max_time_min(replace(cluster, associations=()), answers) == 600


def choose(cluster: Cluster, **given: str) -> Answers:
    given |= {"run_root": "/runs", "venv": "/venv"}
    return ask_person(cluster, Person(answers=False), Given(**given))


def test_an_account_below_a_listed_one_is_left_to_slurm():
    """A partition lists `physics`, and the user's accounts are below it."""
    low = Association("physics-low", "", ("normal",), "normal", 60)
    high = Association("physics-high", "", ("high",), "high", 90)
    listed = replace(GPU, allowed_accounts=("physics",))
    cluster = replace(
        ALPS,
        partitions=(listed,),
        config={"AccountingStorageEnforce": "associations"},
        associations=(low, high),
        default_account="physics-high",
    )
    answers = choose(cluster)
    assert (answers.account, answers.qos) == ("physics-high", "")
    assert max_time_min(cluster, answers) == 90
    # One that is listed itself is taken before others, which --account still names.
    listed_too = replace(cluster, associations=(low, Association("physics", "", (), "", 30)))
    assert choose(listed_too).account == "physics"
    named = choose(listed_too, account="physics-low")
    assert max_time_min(listed_too, named) == 60
    denied = replace(GPU, denied_accounts=("physics-low",))
    assert (
        choose(replace(cluster, partitions=(denied,), associations=(low,))).account == low.account
    )
    elsewhere = replace(low, partition="cpu")
    with pytest.raises(RunError, match="none of your accounts may use partition gpu"):
        choose(replace(cluster, associations=(elsewhere,)))


def test_whole_gpus_are_chosen_before_more_slices_of_some():
    mig = replace(GPU, name="mig")
    slices = replace(H100, partition="mig", count=9, gpu_type="1g.10gb", nodes="m[1-9]")
    both = replace(slices, partition="gpu")
    cluster = replace(
        ALPS, partitions=(replace(mig, is_default=True), GPU), kinds=(slices, both, H100)
    )
    answers = choose(cluster)
    assert (answers.partition.name, answers.kind) == ("gpu", H100)
    assert choose(cluster, partition="mig").kind == slices


def test_a_job_without_a_limit_takes_a_day(tmp_path):
    endless = replace(ALPS, associations=(), qos_limits={})
    answers = replace(ANSWERS, partition=replace(GPU, max_time_min=None, grace_s=0))
    request = Request(endless, answers, max_time_min(endless, answers), WHOLE)
    assert request.max_time_min is None
    assert (request.time_limit_min, request.signal_lead_s) == (1440, 300)


@pytest.mark.parametrize(
    ("gpu_type", "expected"),
    [("h200", 140), ("nvidia_h200", 140), ("NVIDIA-A100-SXM4-40GB", 39), ("gh200", 94), ("x", 80)],
)
def test_the_memory_of_a_gpu_follows_from_its_type_where_no_node_tells(
    gpu_type, expected, tmp_path
):
    kind = replace(H100, gpu_type=gpu_type)
    answers = replace(ANSWERS, kind=kind)
    request = Request(replace(ALPS, kinds=(kind,)), answers, None, WHOLE)
    content = text(request, replace(NODE, gpu_memory_gib=None))
    assert f"gpu_memory_gib: {expected}" in content
    assert ("CHECK" in content) == (expected == 80)


def test_plain_ethernet_and_a_directory_of_the_job_leave_their_fields_empty(tmp_path):
    plain = replace(NODE, interfaces={"eno1": "ethernet"}, hcas={}, job_directory="/local/j1")
    cluster = loaded(tmp_path, node=plain)
    assert (cluster.network_interface, cluster.infiniband_hcas, cluster.scratch) == ("", "", "")
