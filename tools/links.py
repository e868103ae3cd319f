"""How fast the nodes of a job exchange data, measured by one process on each before Ray starts.

    python -m tools.links ATTEMPT_DIR NODE

All of them take part in an all-reduce, neighbours send to one another, and the first node with
trainers sends to each one with engines, which is the way of the weights. It is gloo on CPUs and
NCCL on GPUs, in as few seconds as that takes. `links.json` says who takes part, and what the site
expects; node 0 writes to `links.result.json` what was found, as readings of tools/preflight. Each
node writes `links/NODE.json` with its own part, or why it has none: it misses that of a process
that has died.

A node is unfit whose links are slower than half of what is expected, and one on which NCCL takes
sockets although it has InfiniBand, and nobody has said so.
"""

import os
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from nanoslime.failures import summary
from nanoslime.orchestration.rank_environment import interface_names, interface_of
from nanoslime.storage.shared_files import publish_json, read_json
from tools.preflight.node import Reading, wanted_hcas

_DEADLINE = timedelta(seconds=60)
_NUM_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
_NUM_TIMES = 3
_USED = re.compile(r"NCCL INFO Using network (\S+)")
_NIC = re.compile(r"NCCL INFO NET/\S+ : Using (.*)")


@dataclass(frozen=True, slots=True)
class Task:
    """What links.json says: the nodes in their order, and what the site expects of a link."""

    names: Sequence[str]
    addresses: Sequence[str]
    port: int
    device: str
    trainer: int
    engines: Sequence[int]
    # GB/s of one process a node; None: nothing is refused for its speed.
    expected_gbps: float | None
    network_interface: str = ""


@dataclass(frozen=True, slots=True)
class Link:
    source: int
    target: int
    gbps: float


@dataclass(frozen=True, slots=True)
class Nic:
    """By what a node exchanges data, and what it could take."""

    interface: str
    # NCCL's word for it; empty with gloo.
    network: str = ""
    adapters: str = ""
    hcas: Sequence[str] = ()


def pairs(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Neighbours on a ring, in rounds in which no node has two links."""
    ring = [(node, (node + 1) % num_nodes) for node in range(num_nodes)]
    if num_nodes == 2:
        return [[(0, 1)]]
    last = [ring.pop()] if num_nodes % 2 else []
    return [found for found in (ring[::2], ring[1::2], last) if found]


def measure(task: Task, node: int) -> tuple[float, list[Link]]:
    """The bandwidth of an all-reduce, as each node's data pass its link, and of the links that this
    node sends on, in GB/s.
    """
    num_nodes = len(task.names)
    data = torch.zeros(_NUM_BYTES[task.device], dtype=torch.uint8, device=task.device)
    dist.all_reduce(data)
    began = _now(task)
    for _ in range(_NUM_TIMES):
        dist.all_reduce(data)
    moved = 2 * (num_nodes - 1) / num_nodes * data.numel() * _NUM_TIMES
    all_reduce_gbps = moved / (_now(task) - began) / 1e9
    links = []
    way = [[(task.trainer, engine)] for engine in task.engines if engine != task.trainer]
    for concurrent in [*pairs(num_nodes), *way]:
        dist.barrier()
        for source, target in concurrent:
            if node == source:
                links.append(Link(source, target, _send(task, data, target)))
            elif node == target:
                _receive(data, source)
    return all_reduce_gbps, links


def _send(task: Task, data: torch.Tensor, target: int) -> float:
    """GB/s; the first of them sets up the connection, and the last one is answered."""
    dist.send(data, target)
    dist.recv(data[:1], target)
    began = _now(task)
    for _ in range(_NUM_TIMES):
        dist.send(data, target)
    dist.recv(data[:1], target)
    return data.numel() * _NUM_TIMES / (_now(task) - began) / 1e9


def _receive(data: torch.Tensor, source: int) -> None:
    dist.recv(data, source)
    dist.send(data[:1], source)
    for _ in range(_NUM_TIMES):
        dist.recv(data, source)
    dist.send(data[:1], source)


def _now(task: Task) -> float:
    if task.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def nic_of(interface: str, nccl_log: str, hcas: Sequence[str]) -> Nic:
    """What NCCL's log says of a node."""
    used = _USED.findall(nccl_log)
    adapters = _NIC.findall(nccl_log)
    return Nic(interface, used[-1] if used else "", adapters[-1].strip() if adapters else "", hcas)


def judge(task: Task, links: Sequence[Link], nics: Sequence[Nic]) -> dict[str, Reading]:
    """The reading of each node, by its name."""
    slow = slow_nodes(task, links)
    found = {}
    for node, (name, nic) in enumerate(zip(task.names, nics, strict=True)):
        own = [link for link in links if node in (link.source, link.target)]
        slowest = min(own, key=lambda link: link.gbps)
        other = task.names[slowest.target if slowest.source == node else slowest.source]
        problem = ""
        if nic.network == "Socket" and nic.hcas:
            problem = (
                f"NCCL on {name} sends through sockets ({nic.adapters or nic.interface}), though "
                f"{', '.join(nic.hcas)} of InfiniBand is active there; set "
                "cluster.infiniband_hcas to the adapters it is to use, in a container pass "
                "/dev/infiniband and libibverbs on, or set NCCL_NET=Socket where that is meant"
            )
        elif node in slow:
            problem = (
                f"{name} exchanges {slowest.gbps:.2g} GB/s with {other} through "
                f"{nic.adapters or nic.interface or 'its default route'}, less than half of "
                f"cluster.expected_gbps={task.expected_gbps:g}; see to that adapter and its cable, "
                "or set cluster.network_interface or cluster.infiniband_hcas to a faster one"
            )
        value = "unfit" if problem else _rounded(slowest.gbps)
        found[name] = Reading("links", value, problem)
    return found


def _rounded(gbps: float) -> str:
    """Whole powers of two, so that alike nodes share a line of the table."""
    bound = 2.0**-10
    while bound * 2 <= gbps:
        bound *= 2
    return f"{bound:g} GB/s or more"


def slow_nodes(task: Task, links: Sequence[Link]) -> set[int]:
    """The nodes without which no link is slower than half of what is expected: each time the one
    with most slow links, of equals the one that comes last. All of them where all links are slow.
    """
    half = (task.expected_gbps or 0.0) / 2
    slow = [link for link in links if link.gbps < half]
    if len(slow) == len(links):
        return set(range(len(task.names)))
    nodes = set()
    while slow:
        counts = Counter(node for link in slow for node in (link.source, link.target))
        worst = max(counts, key=lambda node: (counts[node], node))
        nodes.add(worst)
        slow = [link for link in slow if worst not in (link.source, link.target)]
    return nodes


def ipv4_addresses() -> Mapping[str, list[str]]:
    return {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
    }


def interface_for(task: Task, node: int, environ: Mapping[str, str]) -> str:
    """The interface to be used: what the job's environment or the site says, else the one that has
    the node's address.
    """
    named = environ.get("NCCL_SOCKET_IFNAME", "") or task.network_interface
    return named or interface_of(task.addresses[node], ipv4_addresses())


def main(argv: list[str]) -> int:
    attempt = Path(argv[0])
    node = int(argv[1])
    own = attempt / "links" / f"{node}.json"
    try:
        publish_json(own, _take_part(attempt, node))
    except Exception as error:
        publish_json(own, {"error": summary(error)})
        raise
    return 0


def _take_part(attempt: Path, node: int) -> dict[str, Any]:
    """What this node has measured; node 0 writes the readings of all."""
    task = Task(**read_json(attempt / "links.json"))
    interface = interface_for(task, node, os.environ)
    os.environ.update(interface_names(os.environ, interface))
    nccl_log = attempt / "logs" / f"nccl-links-{node}.log"
    os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(nccl_log)}
    # NCCL would end the process in which it has waited for too long.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if task.device == "cuda" else "gloo",
        init_method=f"tcp://{task.addresses[0]}:{task.port}",
        rank=node,
        world_size=len(task.names),
        timeout=_DEADLINE,
    )
    all_reduce_gbps, links = measure(task, node)
    said = nccl_log.read_text(errors="replace") if nccl_log.exists() else ""
    nic = nic_of(interface, said, wanted_hcas(os.environ))
    told: list[tuple[list[Link], Nic]] = [([], nic)] * len(task.names)
    dist.all_gather_object(told, (links, nic))
    dist.destroy_process_group()
    if node == 0:
        found = [link for links, _ in told for link in links]
        readings = judge(task, found, [nic for _, nic in told])
        facts = {
            "all_reduce_gbps": all_reduce_gbps,
            "links": [asdict(link) for link in found],
            "nics": [asdict(nic) for _, nic in told],
            "readings": {name: asdict(reading) for name, reading in readings.items()},
        }
        publish_json(attempt / "links.result.json", facts)
    return {"links": [asdict(link) for link in links], "nic": asdict(nic)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
