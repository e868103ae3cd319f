"""The links of nodes: who is to blame by hand, and a measurement with one slow node for real."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.checkout import ROOT
from nanoslime.processes.ports import free_port
from nanoslime.storage.shared_files import read_json
from tools.links import Link, Nic, Task, judge, nic_of, pairs, slow_nodes

NAMES = ("n1", "n2", "n3", "n4")
# The lines of NCCL 2.27 with NCCL_DEBUG=INFO.
SOCKETS = """\
n1:71:71 [0] NCCL INFO Bootstrap: Using eth0:10.1.2.3<0>
n1:71:99 [0] NCCL INFO NET/IB : No device found.
n1:71:99 [0] NCCL INFO NET/Socket : Using [0]eth0:10.1.2.3<0>
n1:71:99 [0] NCCL INFO Using network Socket
"""
INFINIBAND = """\
n1:71:99 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.1.2.3<0>
n1:71:99 [0] NCCL INFO Using network IB
"""


def task(expected_gbps: float | None = 10.0, engines: tuple[int, ...] = (2, 3)) -> Task:
    return Task(NAMES, ["127.0.1.1"] * 4, 0, "cpu", 0, engines, expected_gbps)


def links(slow: set[int], gbps: float = 2.0) -> list[Link]:
    """Neighbours, and the way of the weights; those of slow nodes have so many GB/s."""
    ends = [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (0, 3)]
    return [Link(a, b, gbps if {a, b} & slow else 9.0) for a, b in ends]


@pytest.mark.parametrize("num_nodes", [2, 3, 4, 5, 8])
def test_neighbours_meet_once_and_no_node_has_two_links_at_a_time(num_nodes: int) -> None:
    rounds = pairs(num_nodes)
    met = {frozenset(pair) for found in rounds for pair in found}
    assert met == {frozenset((i, (i + 1) % num_nodes)) for i in range(num_nodes)}
    assert sum(len(found) for found in rounds) == len(met)
    for found in rounds:
        nodes = [node for pair in found for node in pair]
        assert len(nodes) == len(set(nodes))


@pytest.mark.parametrize("slow", [{0}, {1}, {2}, {3}, {1, 3}, {0, 1, 2, 3}, set()])
def test_a_node_is_slow_that_all_slow_links_have_in_common(slow: set[int]) -> None:
    assert slow_nodes(task(), links(slow)) == slow


def test_half_of_what_is_expected_is_enough() -> None:
    assert slow_nodes(task(4.0), links({2}, 2.0)) == set()
    assert slow_nodes(task(4.1), links({2}, 2.0)) == {2}
    assert slow_nodes(task(None), links({2}, 0.001)) == set()


def test_a_slow_node_is_told_with_its_adapter_and_the_setting() -> None:
    nics = [Nic("eth0", "IB", "[0]mlx5_0:1/IB")] * 4
    found = judge(task(), links({2}), nics)
    assert {name: bool(reading.problem) for name, reading in found.items()} == {
        "n1": False,
        "n2": False,
        "n3": True,
        "n4": False,
    }
    assert found["n3"].problem.startswith(
        "n3 exchanges 2 GB/s with n2 through [0]mlx5_0:1/IB, less than half of "
        "cluster.expected_gbps=10; "
    )
    assert found["n1"].value == "2 GB/s or more"


def test_sockets_beside_infiniband_are_a_fault_at_any_speed() -> None:
    nics = [nic_of("eth0", INFINIBAND, ["mlx5_0"])] * 3 + [nic_of("eth0", SOCKETS, ["mlx5_0"])]
    assert nics[0].network == "IB"
    found = judge(task(None), links(set()), nics)
    assert [name for name, reading in found.items() if reading.problem] == ["n4"]
    assert found["n4"].problem.startswith(
        "NCCL on n4 sends through sockets ([0]eth0:10.1.2.3<0>), though mlx5_0 of InfiniBand is "
        "active there; set cluster.infiniband_hcas"
    )
    without = judge(task(None), links(set()), [nic_of("eth0", SOCKETS, [])] * 4)
    assert not any(reading.problem for reading in without.values())


THROTTLED = """
set -e
ip link set lo up
tc qdisc add dev lo root handle 1: htb default 1
tc class add dev lo parent 1: classid 1:1 htb rate 100gbit
tc class add dev lo parent 1: classid 1:3 htb rate 200mbit
tc filter add dev lo protocol ip parent 1: prio 1 u32 match ip dst 127.0.1.3/32 flowid 1:3
tc filter add dev lo protocol ip parent 1: prio 1 u32 match ip src 127.0.1.3/32 flowid 1:3
"""


@pytest.mark.matrix
def test_a_node_with_a_slow_adapter_is_found_by_what_it_sends_and_receives(tmp_path: Path) -> None:
    """In a network of its own, in which 25 MB/s reach the third of four nodes."""
    if subprocess.run(["unshare", "-n", "sh", "-c", THROTTLED], capture_output=True).returncode:
        pytest.skip("only root may throttle a network")
    (tmp_path / "logs").mkdir()
    addresses = [f"127.0.1.{i}" for i in range(1, 5)]
    facts = {"names": NAMES, "addresses": addresses, "port": free_port(""), "device": "cpu"}
    facts |= {"trainer": 0, "engines": [2, 3], "expected_gbps": 0.1}
    (tmp_path / "links.json").write_text(json.dumps(facts))
    measure = f"exec {sys.executable} -m tools.links {tmp_path} $node"
    each = f"for node in 0 1 2 3; do ({measure}) & done; wait"
    command = ["unshare", "-n", "sh", "-c", f"{THROTTLED}\n{each}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = read_json(tmp_path / "links.result.json")
    rates = {(link["source"], link["target"]): link["gbps"] for link in result["links"]}
    assert rates.keys() == {(0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (0, 3)}
    assert all((rate < 0.05) == (2 in ends) for ends, rate in rates.items()), rates
    problems = {name: r["problem"] for name, r in result["readings"].items() if r["problem"]}
    assert problems.keys() == {"n3"}
    assert "through lo, less than half of cluster.expected_gbps=0.1" in problems["n3"]
