"""The links of nodes: who is to blame, by hand. tests/jobs/test_node.py measures real ones."""

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.cluster_env import ClusterEnv
from nanoslime.types import MachineFailure
from tests import process_table
from tests.jobs.made_run import make_run
from tools.links import Link, Nic, Task, interface_for, judge, nic_of, pairs, slow_nodes
from tools.preflight.node import Place
from tools.preflight.rounds import Preflight

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
    assert "NCCL_NET=Socket" in found["n4"].problem
    without = judge(task(None), links(set()), [nic_of("eth0", SOCKETS, [])] * 4)
    assert not any(reading.problem for reading in without.values())


def test_the_interface_is_the_jobs_or_the_sites_before_that_of_the_address() -> None:
    sites = replace(task(), network_interface="ib0,ib1")
    assert interface_for(sites, 0, {"NCCL_SOCKET_IFNAME": "eth7"}) == "eth7"
    assert interface_for(sites, 0, {}) == "ib0,ib1"
    assert interface_for(task(), 0, {}) == "lo"


def test_a_node_whose_process_has_died_is_named(tmp_path: Path) -> None:
    """Those of the others have told that they could not measure."""
    made = make_run(tmp_path, 2)
    attempt = made.run.new_attempt()
    env = ClusterEnv.for_local(0, 2, "l0")
    preflight = Preflight(attempt, Place(env, made.layout, made.config.cluster, attempt.path))
    preflight.ask()
    (attempt.path / "links").mkdir()
    (attempt.path / "links.json").write_text("{}")
    preflight.take_part()
    assert preflight._measuring is not None
    assert preflight._measuring.wait(60) == 1
    assert (attempt.path / "links" / "0.json").exists()
    assert not preflight.are_links_measured()
    with pytest.raises(MachineFailure, match=r"nothing came from node1; .*Task.*; log: .*links-0"):
        preflight.judge()
    (attempt.path / "links" / "1.json").write_text("{}")
    assert process_table.wait_for(preflight.are_links_measured, 10.0)
