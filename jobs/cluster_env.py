"""The facts that SLURM tells a task about its place; a rehearsal makes them up."""

from __future__ import annotations

import os
import re
import shutil
import socket
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from nanoslime.config.cluster import MAX_SCRATCH_BYTES
from nanoslime.plugins import resolve
from nanoslime.processes.command import ask
from nanoslime.processes.shared_memory import remove_announced
from nanoslime.types import RunError

_COMMAND_DEADLINE_S = 30.0
# submitit 1.5.4; its public property reads the environment of this process alone.
_EXPAND_NODELIST = "submitit.slurm.slurm:_parse_node_list"
_DEFAULT_KILL_WAIT_S = 30.0
_TEMPORARY = ("SLURM_TMPDIR", "TMPDIR")
_LAST_RESORT = "/tmp"
# Ports from 20,000 on, a block of eight for each job, all below the ephemeral range
# (32768 and up).
_FIRST_PORT = 20_000
_NUM_PORT_BLOCKS = 1500
_PORTS_PER_BLOCK = 8
# A connected UDP socket sends nothing. This address (RFC 5737) shows the default route.
_ANY_DESTINATION = "192.0.2.1"
_DISCARD_PORT = 9


@dataclass(frozen=True, slots=True)
class ClusterEnv:
    node_index: int
    num_nodes: int
    node_name: str
    node_names: tuple[str, ...]
    # The address of this node, reachable from the others; empty where `address_problem` says why
    # it has none.
    address: str
    job_id: str
    restart_count: int
    # Cores granted on this node; 0 where that is unknown.
    cpus: int
    # Whether this is a simulated node.
    local: bool = False
    # Where scratch directories are made on this node.
    scratch_root: Path = Path(_LAST_RESORT)
    address_problem: str = ""

    @property
    def attempt_key(self) -> str:
        """The same on all nodes of one life of the job, and only there."""
        return f"{self.job_id}-{self.restart_count}"

    def scratch(self, attempt: Path) -> Path:
        """Node-local directory of an attempt.

        It is named after the attempt's directory, since two clusters on one host have equal job
        ids.
        """
        return self.scratch_root / f"ns-{self.node_index}-{tag(attempt):08x}"

    def first_port(self, attempt: Path) -> int:
        """The first port that an attempt tries."""
        block = zlib.crc32(self.job_id.encode(), tag(attempt)) % _NUM_PORT_BLOCKS
        return _FIRST_PORT + block * _PORTS_PER_BLOCK

    def kill_wait_s(self, told_grace_s: int | None = None) -> float:
        """Seconds from SIGTERM to SIGKILL of a job that must go: SLURM's KillWait, or the grace
        time of a job that is preempted.
        """
        job = job_facts(self.job_id)
        if job.get("PreemptTime", "None") != "None":
            grace_s = preemption_grace_s(job["Partition"]) or told_grace_s
            if grace_s:
                return float(grace_s)
        match = re.search(r"KillWait\s*=\s*(\d+)", slurm_says("scontrol", "show", "config"))
        return float(match[1]) if match else _DEFAULT_KILL_WAIT_S

    @classmethod
    def from_slurm(
        cls, environ: Mapping[str, str], network_interface: str = "", scratch: str = ""
    ) -> ClusterEnv:
        """The facts of the SLURM task with this environment; RunError outside a task.

        network_interface, scratch: as in the cluster file.
        """
        if "SLURM_JOB_ID" not in environ or "SLURM_NODEID" not in environ:
            raise RunError(
                "SLURM_JOB_ID and SLURM_NODEID are not set: start this with srun inside a job"
            )
        node_list = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
        listed = slurm_says("scontrol", "show", "hostnames", node_list).split()
        # A container may lack scontrol.
        expand = resolve(_EXPAND_NODELIST, {}, "SLURM_JOB_NODELIST")
        names = tuple(listed or expand(node_list))
        index = int(environ["SLURM_NODEID"])
        cpus = environ.get("SLURM_CPUS_PER_TASK") or environ.get("SLURM_CPUS_ON_NODE", "0")
        address = address_problem = ""
        try:
            address = _address(names, index, network_interface)
        except RunError as error:
            # The node is named, with all else that is wrong, before Ray starts.
            address_problem = str(error)
        return cls(
            node_index=index,
            num_nodes=len(names),
            node_name=environ.get("SLURMD_NODENAME", names[index]),
            node_names=names,
            address=address,
            address_problem=address_problem,
            job_id=own_job_id(environ),
            restart_count=int(environ.get("SLURM_RESTART_COUNT", "0")),
            cpus=int(cpus),
            scratch_root=scratch_root(environ, scratch),
        )

    @classmethod
    def for_local(
        cls,
        index: int,
        num_nodes: int,
        job_id: str,
        cpus: int = 0,
        root: Path = Path(_LAST_RESORT),
    ) -> ClusterEnv:
        """Node `index` of a rehearsal; each has a loopback address of its own."""
        names = tuple(f"node{i}" for i in range(num_nodes))
        return cls(
            node_index=index,
            num_nodes=num_nodes,
            node_name=names[index],
            node_names=names,
            address=f"127.0.1.{1 + index}",
            job_id=job_id,
            restart_count=0,
            cpus=cpus,
            local=True,
            scratch_root=root,
        )


def own_job_id(environ: Mapping[str, str]) -> str:
    """The job that has this environment, as SLURM's commands name it: JOB_INDEX for a task of a
    job array. One of its tasks has the number of the array, by which commands mean all of them.
    """
    index = environ.get("SLURM_ARRAY_TASK_ID")
    return f"{environ['SLURM_ARRAY_JOB_ID']}_{index}" if index else environ["SLURM_JOB_ID"]


def tag(attempt: Path) -> int:
    """32 bits that stand for an attempt's directory."""
    return zlib.crc32(str(attempt).encode())


def scratch_root(environ: Mapping[str, str], scratch: str = "") -> Path:
    """Where a node's scratch directories are made: in `scratch`, else in the job's own temporary
    directory where that is a short enough path, else in /tmp.
    """
    if scratch:
        root = Path(scratch)
        # tools/preflight names a node that has not its disk.
        with suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
        return root
    for name in _TEMPORARY:
        root = Path(environ.get(name, ""))
        is_short = len(os.fsencode(root)) <= MAX_SCRATCH_BYTES
        if root.is_absolute() and is_short and os.access(root, os.W_OK):
            return root
    return Path(_LAST_RESORT)


def remove_scratch(path: Path) -> None:
    """Remove our scratch directory, and what is announced there to be in shared memory; RunError if
    somebody else's is in its place.
    """
    if not os.access(path, os.F_OK):
        return
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise RunError(
            f"{path} belongs to another user; it is this job's scratch directory: remove it"
        )
    remove_announced(path)
    shutil.rmtree(path, ignore_errors=True)


def interface_address(name: str) -> str:
    """IPv4 address of a network interface; RunError lists the interfaces that exist."""
    interfaces = psutil.net_if_addrs()
    for entry in interfaces.get(name, []):
        if entry.family == socket.AF_INET:
            return str(entry.address)
    raise RunError(
        f"cluster.network_interface={name} has no address on {socket.gethostname()}; "
        f"there: {', '.join(interfaces)}"
    )


def _address(names: tuple[str, ...], index: int, network_interface: str) -> str:
    """This node's address on the named interface, or on the one that leads to other nodes.

    Nodes of a one-host cluster, whose addresses are loopback ones, are told apart only by
    SLURM's NodeAddr.
    """
    if network_interface:
        first, _, _ = network_interface.partition(",")
        return interface_address(first)
    own_address = _node_address(names[index])
    if own_address.startswith("127."):
        return own_address
    destination = own_address
    if len(names) > 1:
        other = names[0] if index > 0 else names[1]
        destination = _node_address(other)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((destination or _ANY_DESTINATION, _DISCARD_PORT))
        except OSError as error:
            raise RunError(
                f"{names[index]} finds no address that reaches {destination or 'anything'} "
                f"({error}); set cluster.network_interface"
            ) from error
        return str(probe.getsockname()[0])


def _node_address(name: str) -> str:
    """SLURM's NodeAddr of a node as an IPv4 address; empty where it is not known."""
    try:
        return socket.gethostbyname(node_hosts([name]).get(name, name))
    except OSError:
        return ""


def node_hosts(names: Sequence[str]) -> dict[str, str]:
    """By node SLURM's NodeAddr, where it tells one."""
    said = slurm_says("scontrol", "show", "node", ",".join(names), "--oneliner")
    found = [facts(line) for line in said.splitlines()]
    return {node["NodeName"]: node["NodeAddr"] for node in found if "NodeAddr" in node}


def preemption_grace_s(partition: str = "") -> int:
    """Seconds that a partition, by default the site's default one, leaves to a job that it
    preempts; 0 where it preempts none, or says nothing.
    """
    for line in slurm_says("scontrol", "show", "partition", "--oneliner").splitlines():
        said = facts(line)
        field, value = ("PartitionName", partition) if partition else ("Default", "YES")
        grace_s = said.get("GraceTime", "")
        if said.get(field) == value and said.get("PreemptMode") != "OFF" and grace_s.isdigit():
            return int(grace_s)
    return 0


def job_facts(job_id: str) -> dict[str, str]:
    """What SLURM says of a job now, by its words; nothing where it does not answer."""
    return facts(slurm_says("scontrol", "show", "job", "--oneliner", job_id))


def facts(line: str) -> dict[str, str]:
    """The words NAME=VALUE in a line of scontrol."""
    return dict(re.findall(r"(\S+?)=(\S*)", line))


def slurm_says(*command: str) -> str:
    """Output of a SLURM command; empty where it is missing, fails, or does not answer."""
    environ = {**os.environ, "LC_ALL": "C"}
    try:
        done = ask(command, _COMMAND_DEADLINE_S, env=environ)
    except (RunError, OSError):
        return ""
    return done.stdout if done.returncode == 0 else ""
