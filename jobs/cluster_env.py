"""What SLURM tells a task about where it runs, behind one object; a rehearsal makes the same object up."""

from __future__ import annotations

import itertools
import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from nanoslime.processes.command import ask
from nanoslime.types import RunError

_COMMAND_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class ClusterEnv:
    node_index: int
    num_nodes: int
    node_name: str
    node_names: tuple[str, ...]
    address: str  # of this node, reachable from the others
    job_id: str
    restart_count: int
    cpus: int  # granted on this node; 0: unknown
    local: bool = False  # a simulated node

    @property
    def attempt_key(self) -> str:
        """The same on all nodes of one life of the job, and only there."""
        return f"{self.job_id}-{self.restart_count}"

    def scratch(self, attempt: Path) -> Path:
        """Node-local directory of an attempt; short, since Ray puts AF_UNIX sockets (107 bytes) deep in it.

        Named after the attempt's directory too, since job ids of two clusters on one host are the same.
        """
        return Path("/tmp") / f"ns-{self.job_id}-{self.node_index}-{tag(attempt):08x}"

    def first_port(self, attempt: Path) -> int:
        """First candidate of the attempt's ports, below the ephemeral range (32768 and up)."""
        return 20000 + zlib.crc32(self.job_id.encode(), tag(attempt)) % 1500 * 8

    def kill_wait_s(self) -> float:
        """Seconds between SIGTERM and SIGKILL of a job that must go: SLURM's KillWait, by default 30."""
        if self.local:
            return 0.0
        match = re.search(r"KillWait\s*=\s*(\d+)", _output("scontrol", "show", "config"))
        return float(match[1]) if match else 30.0

    @classmethod
    def from_slurm(cls, environ: Mapping[str, str], network_interface: str = "") -> ClusterEnv:
        """The facts of the task that has this environment; RunError where it is no SLURM task."""
        if "SLURM_JOB_ID" not in environ or "SLURM_NODEID" not in environ:
            raise RunError(
                "SLURM_JOB_ID and SLURM_NODEID are not set: start this with srun inside a job"
            )
        nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
        names = tuple(
            _output("scontrol", "show", "hostnames", nodes).split() or expand_nodelist(nodes)
        )
        index = int(environ["SLURM_NODEID"])
        return cls(
            node_index=index,
            num_nodes=len(names),
            node_names=names,
            job_id=environ["SLURM_JOB_ID"],
            node_name=environ.get("SLURMD_NODENAME", names[index]),
            address=_address(names, index, network_interface),
            restart_count=int(environ.get("SLURM_RESTART_COUNT", "0")),
            cpus=int(environ.get("SLURM_CPUS_PER_TASK") or environ.get("SLURM_CPUS_ON_NODE", "0")),
        )

    @classmethod
    def for_local(cls, index: int, num_nodes: int, job_id: str, cpus: int = 0) -> ClusterEnv:
        """Node `index` of a rehearsal: an own loopback address each."""
        names = tuple(f"node{i}" for i in range(num_nodes))
        address = f"127.0.1.{1 + index}"
        return cls(index, num_nodes, names[index], names, address, job_id, 0, cpus, local=True)


def tag(attempt: Path) -> int:
    """32 bits that stand for an attempt's directory."""
    return zlib.crc32(str(attempt).encode())


def expand_nodelist(text: str) -> list[str]:
    """Names in a SLURM node list such as n[1,3-4],m7 or r[1-2]n[01-02], for where scontrol is missing."""
    names: list[str] = []
    for part in re.split(r",(?![^\[]*\])", text):
        pieces = re.split(r"\[([^\]]*)\]", part)  # text, ranges, text, ranges, ..., text
        options = [_numbers(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
        names += map("".join, itertools.product(*options))
    return names


def _numbers(ranges: str) -> list[str]:
    found = []
    for item in ranges.split(","):
        low, _, high = item.partition("-")
        found += [str(number).zfill(len(low)) for number in range(int(low), int(high or low) + 1)]
    return found


def _address(names: tuple[str, ...], index: int, network_interface: str) -> str:
    """Of the named interface; else of the one that leads to the other nodes.

    Nodes of a one-host cluster, whose addresses are loopback ones, are told apart only by SLURM's NodeAddr.
    """
    if network_interface:
        return interface_address(network_interface)
    own = _node_address(names[index])
    if own.startswith("127."):
        return own
    other = next((name for i, name in enumerate(names) if i != index), "")
    target = _node_address(other) if other else own
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:  # sends nothing; 192.0.2.1 (RFC 5737) shows the default route
            probe.connect((target or "192.0.2.1", 9))
        except OSError as error:
            none = f"{names[index]} finds no address that reaches {target or 'anything'}"
            raise RunError(f"{none} ({error}); set cluster.network_interface") from error
        return str(probe.getsockname()[0])


def _node_address(name: str) -> str:
    """SLURM's NodeAddr of a node as an IPv4 address; empty where SLURM or the resolver does not know it."""
    match = re.search(r"NodeAddr=(\S+)", _output("scontrol", "show", "node", name, "-o"))
    try:
        return socket.gethostbyname(match[1]) if match else ""
    except OSError:
        return ""


def interface_address(name: str) -> str:
    """IPv4 address of a network interface; RunError lists the interfaces there are."""
    there = psutil.net_if_addrs()
    for entry in there.get(name, []):
        if entry.family == socket.AF_INET:
            return str(entry.address)
    none = f"cluster.network_interface={name} has no address on {socket.gethostname()}"
    raise RunError(f"{none}; there: {', '.join(there)}")


def _output(*command: str) -> str:
    """Output of a SLURM command; empty where it is missing, fails, or does not answer in time."""
    try:
        done = ask(command, _COMMAND_DEADLINE_S, env=dict(os.environ, LC_ALL="C"))
    except (RunError, OSError):
        return ""
    return done.stdout if done.returncode == 0 else ""
