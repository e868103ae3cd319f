"""What is read out of SLURM's words: times, GPUs, kinds of nodes, partitions, accounts."""

import pytest

from tools.site.slurm import (
    Association,
    NodeKind,
    Share,
    minutes,
    most_gpus,
    parse_associations,
    parse_config,
    parse_kinds,
    parse_partitions,
    parse_qos_limits,
    parse_share,
)
from tools.submit.limits import gpus_by_type


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30:00", 30),
        ("04:00:00", 240),
        ("2-00:00:00", 2880),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("45", 45),
        ("UNLIMITED", None),
        ("INFINITE", None),
        ("NONE", None),
        ("", None),
        ("soon", None),
    ],
)
def test_times_are_whole_minutes(text, expected):
    assert minutes(text) == expected


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("(null)", (0, "")),
        ("gpu:8", (8, "")),
        ("gpu", (1, "")),
        ("gpu:h100:8(S:0-1)", (8, "h100")),
        ("gpu:h100", (1, "h100")),
        ("gpu:nvidia_a100-sxm4-80gb:4(S:0,1),shard:8", (4, "nvidia_a100-sxm4-80gb")),
        # Types that begin with a digit, or are numbers.
        ("gpu:3090:4", (4, "3090")),
        ("gpu:2080ti:8(S:0-1)", (8, "2080ti")),
        ("gpu:1g.10gb:7", (7, "1g.10gb")),
        ("gpu:nvidia_a100_1g.10gb+me:3", (3, "nvidia_a100_1g.10gb+me")),
        ("gpu:h100:no_consume:8", (8, "h100")),
        ("gpu:no_consume:8", (8, "")),
        # Whole GPUs before slices of some.
        ("gpu:a100:4,gpu:1g.10gb:7", (4, "a100")),
        ("gpu:1g.10gb:7(S:0,1),gpu:3g.20gb:2(S:0,1)", (7, "1g.10gb")),
        ("gpu:a100:2,gpu:a100:2", (4, "a100")),
        ("", (0, "")),
        ("lustre:1,gpu:v100:4,nvme:900", (4, "v100")),
        ("gpumem:80", (0, "")),
    ],
)
def test_gpus_of_a_node(gres, expected):
    assert most_gpus(gpus_by_type(gres)) == expected
    assert (gpus_by_type(gres)[expected[1]], gpus_by_type(gres)["t4"]) == (expected[0], 0)


def test_nodes_of_a_kind_are_counted_by_partition():
    text = (
        "gpu|4|96|1400000|gpu:h100:8(S:0-1)|nvlink,ib|n[1-4]\n"
        "cpu|16+|64+|256000|(null)|(null)|c[01-16]\n"
        "mig|1|64|512000|gpu:a100:4(S:0,1),gpu:1g.10gb:7(S:0,1)|(null)|m1\n"
    )
    assert parse_kinds(text) == (
        NodeKind("gpu", 4, 96, 1400000, 8, "h100", ("nvlink", "ib"), "n[1-4]"),
        NodeKind("cpu", 16, 64, 256000, 0, "", (), "c[01-16]"),
        NodeKind("mig", 1, 64, 512000, 4, "a100", (), "m1", has_other_gpus=True),
    )


def test_partitions():
    text = (
        "PartitionName=gpu AllowGroups=ALL AllowAccounts=physics,biology AllowQos=high,vip "
        "QoS=gpuqos MaxCPUsPerNode=48 MaxMemPerNode=500000 "
        "Default=NO GraceTime=120 RootOnly=NO MaxTime=2-00:00:00 PreemptMode=REQUEUE State=UP\n"
        "PartitionName=cpu AllowGroups=ALL AllowAccounts=ALL DenyAccounts=guests AllowQos=ALL "
        "QoS=N/A MaxCPUsPerNode=UNLIMITED MaxMemPerCPU=4000 "
        "Default=YES GraceTime=60 RootOnly=NO MaxTime=UNLIMITED PreemptMode=OFF State=DOWN\n"
        "PartitionName=admin Default=NO RootOnly=YES MaxTime=UNLIMITED State=UP\n"
    )
    gpu, cpu = parse_partitions(text)
    assert (gpu.name, gpu.is_default, gpu.is_up, gpu.max_time_min) == ("gpu", False, True, 2880)
    assert gpu.allowed_qos == ("high", "vip")
    assert gpu.grace_s == 120
    assert (gpu.qos, gpu.max_cpus, gpu.max_mb, gpu.max_mb_per_cpu) == ("gpuqos", 48, 500000, None)
    assert (cpu.qos, cpu.max_cpus, cpu.max_mb, cpu.max_mb_per_cpu) == ("", None, None, 4000)
    assert (cpu.name, cpu.is_default, cpu.is_up, cpu.max_time_min) == ("cpu", True, False, None)
    # A partition that preempts nobody gives no grace.
    assert cpu.grace_s == 0
    assert [gpu.takes(account) for account in ("physics", "guests")] == [True, False]
    assert [cpu.takes(account) for account in ("physics", "guests")] == [True, False]


_TWO = "CoresPerSocket=24 Sockets=2 ThreadsPerCore=2 RealMemory=1000000 CPUTot=96"


@pytest.mark.parametrize(
    ("nodes", "bounds", "config", "expected"),
    [
        (_TWO, "", {}, Share(96, 1_000_000)),
        # Cores of the system: SLURM 22.05 and later tells what is left.
        (f"{_TWO} CPUEfctv=92 CoreSpecCount=2 MemSpecLimit=16000", "", {}, Share(92, 984_000)),
        (f"{_TWO} CPUEfctv=94 CPUSpecList=0-1", "", {}, Share(94, 1_000_000)),
        (f"{_TWO} CoreSpecCount=2", "", {}, Share(92, 1_000_000)),
        # The least of all nodes.
        (f"{_TWO}\nNodeName=n2 {_TWO} CPUEfctv=88 MemSpecLimit=5", "", {}, Share(88, 999_995)),
        (_TWO, "MaxCPUsPerNode=48 MaxMemPerNode=500000", {}, Share(48, 500_000)),
        (f"{_TWO} CPUEfctv=40", "MaxCPUsPerNode=48 MaxMemPerNode=UNLIMITED", {}, Share(40, 10**6)),
        (_TWO, "MaxCPUsPerNode=48 MaxMemPerCPU=4000", {}, Share(48, 192_000)),
        # The whole cluster's bound, which a partition's own replaces.
        (_TWO, "", {"MaxMemPerNode": "700000"}, Share(96, 700_000)),
        (_TWO, "MaxMemPerNode=800000", {"MaxMemPerNode": "700000"}, Share(96, 800_000)),
        (_TWO, "", {"MaxMemPerNode": "UNLIMITED", "MaxMemPerCPU": "1000"}, Share(96, 96_000)),
    ],
)
def test_a_job_gets_what_system_and_partition_leave(nodes, bounds, config, expected):
    [partition] = parse_partitions(f"PartitionName=gpu State=UP {bounds}\n")
    kind = NodeKind("gpu", 2, 96, 1_000_000, 8, "h100", (), "n[1-2]")
    assert parse_share(f"NodeName=n1 {nodes}\n", kind, partition, config) == expected


def test_accounts_and_limits():
    assert parse_associations("physics||high,normal||2-00:00:00\nbio|gpu|normal|normal|\n") == (
        Association("physics", "", ("high", "normal"), "", 2880),
        Association("bio", "gpu", ("normal",), "normal", None),
    )
    assert parse_qos_limits("normal|\nhigh|04:00:00\n") == {"high": 240}


def test_settings():
    text = "Configuration data as of now\nClusterName             = alps\nEpilog   = (null)\n"
    assert parse_config(text) == {"ClusterName": "alps", "Epilog": "(null)"}
