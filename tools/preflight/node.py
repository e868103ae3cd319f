"""What an agent finds out about its own node: each check gives what it has found, or a problem."""

import hashlib
import os
import platform
import resource
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.checkout import ROOT
from jobs.cluster_env import ClusterEnv, node_hosts
from nanoslime.config.cluster import ClusterConfig
from nanoslime.layout import Layout
from nanoslime.processes.command import ask
from nanoslime.types import RunError
from tools.preflight.gpus import check_ecc, check_gpus
from tools.provenance import versions

_GIB = 2**30
# Ray's processes of a node with eight GPUs hold some thousands of files and of threads.
_MIN_OPEN_FILES = 4096
_MIN_PROCESSES = 2048
# InfiniBand registers memory, NCCL's buffers above all. Some daemons start with 64 KiB or 8 MiB.
_MIN_LOCKED_BYTES = _GIB
# Ray's object store of a rehearsal takes 0.2 GB; with GPUs, NCCL has its own besides.
_MIN_SHM_BYTES = {"cpu": _GIB // 4, "cuda": _GIB}
_MIN_TEMP_BYTES = _GIB
_MIN_STORAGE_BYTES = _GIB // 16
_QUOTA_DEADLINE_S = 10.0
_KIB = 1024
_HCAS = Path("/sys/class/infiniband")


@dataclass(frozen=True, slots=True)
class Place:
    """A node of an attempt, and what is asked of it."""

    env: ClusterEnv
    layout: Layout
    cluster: ClusterConfig
    attempt: Path

    @property
    def name(self) -> str:
        return self.env.node_name


@dataclass(frozen=True, slots=True)
class Reading:
    """What one check has found on one node; a problem is a whole sentence."""

    check: str
    value: str
    problem: str = ""


def examine(place: Place) -> list[Reading]:
    """The readings of this node; a check that does not apply to it gives none."""
    readings = []
    for check, look in CHECKS.items():
        try:
            reading = Reading(check, look(place))
        except RunError as error:
            reading = Reading(check, "unfit", str(error))
        except OSError as error:
            reading = Reading(check, "unfit", f"{place.name}: {error}")
        if reading.value:
            readings.append(reading)
    return readings


def own_versions() -> dict[str, str]:
    """The versions on which all nodes have to agree; `code` stands for this checkout's own."""
    digest = hashlib.blake2b(digest_size=6)
    for folder in ("nanoslime", "jobs", "tools"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(os.fsencode(file.relative_to(ROOT)) + b"\0" + file.read_bytes())
    return {"python": platform.python_version(), **versions(), "code": digest.hexdigest()}


def active_hcas(root: Path = _HCAS) -> list[str]:
    """The adapters that have an active port of InfiniBand, and not of Ethernet."""
    layers = root.glob("*/ports/*/link_layer")
    ports = [layer.parent for layer in layers if "InfiniBand" in layer.read_text()]
    return sorted({p.parts[-3] for p in ports if "ACTIVE" in (p / "state").read_text()})


def wanted_hcas(environ: Mapping[str, str], root: Path = _HCAS) -> list[str]:
    """Those that NCCL may use: none where it is told to take sockets."""
    is_unwanted = environ.get("NCCL_IB_DISABLE") == "1"
    return (
        [] if is_unwanted or environ.get("NCCL_NET", "").lower() == "socket" else active_hcas(root)
    )


def _gpus(place: Place) -> str:
    if place.layout.device != "cuda":
        return ""
    deadline_s = place.cluster.gpu_probe_deadline_s
    return check_gpus(place.env, place.layout.slots_per_node, deadline_s)


def _ecc(place: Place) -> str:
    if place.layout.device != "cuda":
        return ""
    return check_ecc(place.name, os.environ, place.cluster.gpu_probe_deadline_s)


def check_cores(env: ClusterEnv) -> str:
    """RunError where this process may use fewer cores than its node was given."""
    allowed = len(os.sched_getaffinity(0))
    given = min(env.cpus, os.cpu_count() or 1)
    if allowed < given:
        raise RunError(
            f"the agent of {env.node_name} is pinned to {allowed} of the {given} cores "
            f"it was given; "
            f"start it with srun --cpus-per-task={env.cpus}, without taskset or --cpu-bind"
        )
    return f"{allowed} cores"


def check_limits(name: str, hcas: list[str]) -> str:
    """RunError where a limit that the agent has raised, as far as it goes, is still too low, and
    where InfiniBand could lock no memory.
    """
    files = _limit(resource.RLIMIT_NOFILE)
    processes = _limit(resource.RLIMIT_NPROC)
    locked = _limit(resource.RLIMIT_MEMLOCK)
    needs = [
        ("open files (ulimit -n)", "NOFILE", files, _MIN_OPEN_FILES),
        ("processes and threads (ulimit -u)", "NPROC", processes, _MIN_PROCESSES),
    ]
    if hcas:
        needs.append(("bytes of locked memory (ulimit -l)", "MEMLOCK", locked, _MIN_LOCKED_BYTES))
    for what, limit, has, needed in needs:
        if has < needed:
            raise RunError(
                f"{name} allows {has:,.0f} {what}, and {needed:,} are needed; raise Limit{limit} "
                f"of slurmd there, or name {limit} in PropagateResourceLimitsExcept of slurm.conf"
            )
    return f"{files:g} files, {processes:g} processes"


def _limit(limit: int) -> float:
    soft, _ = resource.getrlimit(limit)
    return float("inf") if soft == resource.RLIM_INFINITY else float(soft)


def _limits(place: Place) -> str:
    hcas = wanted_hcas(os.environ) if place.layout.device == "cuda" else []
    return check_limits(place.name, hcas)


def check_space(name: str, what: str, folder: Path, needed: int, remedy: str) -> str:
    """RunError where a folder of a node has less room than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{folder} of {name}, {what}, has {free / _GIB:.2f} GiB free, and "
            f"{needed / _GIB:g} GiB are needed; {remedy}"
        )
    return f"{free // _GIB} GiB free"


def _shared_memory(place: Place) -> str:
    needed = _MIN_SHM_BYTES[place.layout.device]
    what = "which holds Ray's objects and NCCL's buffers"
    remedy = "remount it with a larger size=, or start the container with a larger --shm-size"
    return check_space(place.name, what, Path("/dev/shm"), needed, remedy)


def _temp(place: Place) -> str:
    folder = place.env.scratch(place.attempt).parent
    what = "where Ray keeps its sockets, logs and spilled objects"
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RunError(
            f"{folder} of {place.name}, {what}, is not there or cannot be written; "
            "set cluster.scratch to a directory of every node's own disk, or leave the node out"
        )
    return check_space(place.name, what, folder, _MIN_TEMP_BYTES, "remove what fills it")


def _storage(place: Place) -> str:
    """The shared filesystem of the run, which all nodes see alike."""
    if place.env.node_index:
        return ""
    remedy = "remove old runs or checkpoints, or ask for a larger quota"
    what = "where the run's checkpoints go"
    said = check_space(place.name, what, place.attempt, _MIN_STORAGE_BYTES, remedy)
    left = quota_left(place.attempt)
    if left is not None and left < _MIN_STORAGE_BYTES:
        raise RunError(
            f"the quota leaves {left / _GIB:.2f} GiB in {place.attempt}, where the run's "
            f"checkpoints go; {remedy}"
        )
    return said if left is None else f"{said}, {left // _GIB} GiB of the quota left"


def quota_left(folder: Path) -> int | None:
    """Bytes that the user may still write; None where `quota` does not tell."""
    mounts = (parent for parent in (folder, *folder.parents) if parent.is_mount())
    command = ["quota", "-w", "-f", os.fspath(next(mounts))]
    try:
        done = ask(command, _QUOTA_DEADLINE_S, env={**os.environ, "LC_ALL": "C"})
    except (OSError, RunError):
        return None
    left = []
    for line in done.stdout.splitlines():
        _, used, soft, hard, *_ = [*line.replace("*", " ").split(), "", "", "", ""]
        limit = hard if hard != "0" else soft
        if used.isdigit() and limit.isdigit() and limit != "0":
            left.append(int(limit) - int(used))
    return min(left) * _KIB if left else None


def _interface(place: Place) -> str:
    if place.env.address_problem:
        raise RunError(f"{place.name}: {place.env.address_problem}")
    named = place.cluster.network_interface
    return f"{named} has an address" if named else "the default route has an address"


def _ports(place: Place) -> str:
    """A server can listen at the node's address."""
    if place.env.address_problem:
        return ""
    with socket.socket() as probe:
        try:
            probe.bind((place.env.address, 0))
        except OSError as error:
            raise RunError(
                f"no server can listen at {place.env.address} of {place.name} "
                f"({error.strerror}); set cluster.network_interface to an interface of the node, "
                "or widen net.ipv4.ip_local_port_range"
            ) from error
    return "free"


def _names(place: Place) -> str:
    """The other nodes' names have addresses here, where those lead to the interface to be used."""
    others = [name for name in place.env.node_names if name != place.name]
    if place.env.local or not others:
        return ""
    hosts = node_hosts(others)
    for name in others:
        host = hosts.get(name, name)
        try:
            socket.gethostbyname(host)
        except OSError as error:
            if place.cluster.network_interface or name not in hosts:
                return "not all nodes are found, and need not be"
            raise RunError(
                f"{place.name} does not find the address of {name} ({host}): {error.strerror}; "
                "its /etc/hosts or DNS needs an entry"
            ) from error
    return "all nodes are found"


CHECKS: dict[str, Callable[[Place], str]] = {
    "gpus": _gpus,
    "ecc": _ecc,
    "cores": lambda place: check_cores(place.env),
    "limits": _limits,
    "shm": _shared_memory,
    "temp": _temp,
    "storage": _storage,
    "interface": _interface,
    "ports": _ports,
    "names": _names,
}
