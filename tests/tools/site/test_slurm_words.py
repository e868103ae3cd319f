"""What is read out of SLURM's words: times, GPUs, kinds of nodes, partitions, accounts."""

import pytest

from tools.site.slurm import (
    Association,
    NodeKind,
    minutes,
    parse_associations,
    parse_config,
    parse_gres,
    parse_kinds,
    parse_partitions,
    parse_qos_limits,
)


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
        ("gpu:a100:2,gpu:1g.10gb:7", (7, "1g.10gb")),
        ("lustre:1,gpu:v100:4,nvme:900", (4, "v100")),
        ("gpumem:80", (0, "")),
    ],
)
def test_gpus_of_a_node(gres, expected):
    assert parse_gres(gres) == expected


def test_nodes_of_a_kind_are_counted_by_partition():
    text = (
        "gpu|4|96|1400000|gpu:h100:8(S:0-1)|nvlink,ib|n[1-4]\n"
        "cpu|16+|64+|256000|(null)|(null)|c[01-16]\n"
    )
    assert parse_kinds(text) == (
        NodeKind("gpu", 4, 96, 1400000, 8, "h100", ("nvlink", "ib"), "n[1-4]"),
        NodeKind("cpu", 16, 64, 256000, 0, "", (), "c[01-16]"),
    )


def test_partitions():
    text = (
        "PartitionName=gpu AllowGroups=ALL AllowAccounts=physics,biology AllowQos=high,vip "
        "Default=NO GraceTime=120 RootOnly=NO MaxTime=2-00:00:00 PreemptMode=REQUEUE State=UP\n"
        "PartitionName=cpu AllowGroups=ALL AllowAccounts=ALL DenyAccounts=guests AllowQos=ALL "
        "Default=YES GraceTime=60 RootOnly=NO MaxTime=UNLIMITED PreemptMode=OFF State=DOWN\n"
        "PartitionName=admin Default=NO RootOnly=YES MaxTime=UNLIMITED State=UP\n"
    )
    gpu, cpu = parse_partitions(text)
    assert (gpu.name, gpu.is_default, gpu.is_up, gpu.max_time_min) == ("gpu", False, True, 2880)
    assert gpu.allowed_qos == ("high", "vip")
    assert gpu.grace_s == 120
    assert (cpu.name, cpu.is_default, cpu.is_up, cpu.max_time_min) == ("cpu", True, False, None)
    # A partition that preempts nobody gives no grace.
    assert cpu.grace_s == 0
    assert [gpu.takes(account) for account in ("physics", "guests")] == [True, False]
    assert [cpu.takes(account) for account in ("physics", "guests")] == [True, False]


def test_accounts_and_limits():
    assert parse_associations("physics||high,normal||2-00:00:00\nbio|gpu|normal|normal|\n") == (
        Association("physics", "", ("high", "normal"), "", 2880),
        Association("bio", "gpu", ("normal",), "normal", None),
    )
    assert parse_qos_limits("normal|\nhigh|04:00:00\n") == {"high": 240}


def test_settings():
    text = "Configuration data as of now\nClusterName             = alps\nEpilog   = (null)\n"
    assert parse_config(text) == {"ClusterName": "alps", "Epilog": "(null)"}
