"""What SLURM would never start, or start otherwise than planned, is refused at submission.

Where EnforcePartLimits=NO, `sbatch --test-only` accepts a job that then waits for ever. So a
partition and its nodes are asked what they allow.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jobs.cluster_env import facts, slurm_says
from jobs.sbatch import cpus_per_node
from nanoslime.config import RunConfig
from nanoslime.config.base import minutes
from nanoslime.layout import Layout
from nanoslime.types import RunError
from tools.submit import policies
from tools.submit.megabytes import megabytes

# Options of sbatch that a plan rests on, and what sets each.
_SET_BY = {
    "nodes": "cluster.nodes",
    "partition": "cluster.partition",
    "time": "cluster.time_limit_min",
    "time-min": "cluster.time_limit_min",
    "signal": "cluster.signal_lead_s",
    "mem": "cluster.memory_per_node",
    "mem-per-cpu": "cluster.memory_per_node",
    "mem-per-gpu": "cluster.memory_per_node",
    "cpus-per-task": "cluster.cpus_per_node",
    "cpus-per-gpu": "cluster.cpus_per_node",
    "gpus": "cluster.gpus_per_node and cluster.gpu_request",
    "gpus-per-node": "cluster.gpus_per_node and cluster.gpu_request",
    "gpus-per-task": "cluster.gpus_per_node and cluster.gpu_request",
    "gres": "cluster.gpus_per_node and cluster.gpu_request",
    "requeue": "cluster.requeue or cluster.resume_by",
    "no-requeue": "cluster.requeue or cluster.resume_by",
    "job-name": "name",
    "ntasks": "cluster.nodes, as a node has one task,",
    "ntasks-per-node": "cluster.nodes, as a node has one task,",
    "array": "cluster.nodes, as a job holds one run,",
}


@dataclass(frozen=True, slots=True)
class _Need:
    """What a job asks of each node, by a setting with its value, and what each has."""

    setting: str
    number: float
    has: Sequence[float]
    # What the nodes have, as text.
    found: Sequence[str]


def check_extra_options(config: RunConfig) -> None:
    """Raises RunError for an option of extra_sbatch that says again, or otherwise, what a field
    says; sbatch takes the beginning of an option's name for it."""
    cluster = config.cluster
    for name, value in cluster.extra_sbatch.items():
        if name == "gres" and "gpu" not in value:
            continue
        found = next((option for option in _SET_BY if option.startswith(name)), None)
        field = name.replace("-", "_")
        if found is None and getattr(cluster, field, None):
            found = name
        if found is not None:
            raise RunError(
                f"cluster.extra_sbatch has {name!r}, of which the plan would know nothing: set "
                f"{_SET_BY.get(found, f'cluster.{field}')} instead"
            )


def check_limits(config: RunConfig, layout: Layout) -> None:
    """Raises RunError where none of the job's partitions ever starts it, or the user's QOS and
    accounts never let it start; nothing is known where SLURM does not answer."""
    lines = slurm_says("scontrol", "show", "partition", "--all", "--oneliner").splitlines()
    partitions = {found["PartitionName"]: found for found in map(facts, lines) if found}
    default = [name for name, found in partitions.items() if found.get("Default") == "YES"]
    asked = config.cluster.partition.split(",") if config.cluster.partition else default[:1]
    allowed = policies.ask(config)
    refusals = []
    for name in asked if partitions else ():
        if name not in partitions:
            raise RunError(
                f"cluster.partition={config.cluster.partition!r}: there is no partition {name}; "
                f"choose one of {', '.join(partitions)}"
            )
        try:
            _check_partition(config, layout, partitions[name])
            policies.check(config, layout, allowed, partitions[name].get("QoS", ""))
        except RunError as error:
            refusals.append(error)
    if refusals and len(refusals) == len(asked):
        raise refusals[0]


def _check_partition(config: RunConfig, layout: Layout, partition: dict[str, str]) -> None:
    cluster = config.cluster
    name = partition["PartitionName"]
    cores = cpus_per_node(config, layout)
    memory_mb = megabytes(cluster.memory_per_node)
    bounds = (
        ("cluster.time_limit_min", cluster.time_limit_min, "MaxTime", minutes),
        ("cluster.nodes", layout.num_nodes, "MaxNodes", int),
        ("cluster.cpus_per_node", cores, "MaxCPUsPerNode", int),
        ("cluster.memory_per_node", memory_mb, "MaxMemPerNode", int),
    )
    for setting, number, limit, read in bounds:
        allowed = partition.get(limit, "UNLIMITED")
        if allowed[:1].isdecimal() and number > read(allowed):
            raise RunError(
                f"{setting}={number:.0f}: the partition {name} allows at most "
                f"{read(allowed)} ({limit}={allowed}); lower it, or choose another partition"
            )
    lines = slurm_says("scontrol", "show", "node", "--oneliner").splitlines()
    nodes = [node for node in map(facts, lines) if name in node.get("Partitions", "").split(",")]
    if not nodes:
        return
    needs = [
        _number_needed("cluster.cpus_per_node", cores, map(cpus_for_jobs, nodes), "cores"),
        _number_needed("cluster.memory_per_node", memory_mb, map(mb_for_jobs, nodes), "MB"),
    ]
    if layout.device == "cuda" and cluster.gpu_request != "none":
        kind = cluster.gpu_request.partition("gpu:")[2]
        gres = [node.get("Gres", "") for node in nodes]
        by_type = [gpus_by_type(one) for one in gres]
        gpus = [found[kind] if kind else found.total() for found in by_type]
        setting = f"cluster.gpus_per_node={layout.slots_per_node}"
        setting += f" of type {kind}" if kind else ""
        needs.insert(0, _Need(setting, layout.slots_per_node, gpus, gres))
    _check_nodes(layout, name, needs)


def _check_nodes(layout: Layout, partition: str, needs: Sequence[_Need]) -> None:
    num_nodes = len(needs[0].has)
    if layout.num_nodes > num_nodes:
        raise RunError(
            f"cluster.nodes={layout.num_nodes}: the partition {partition} has {num_nodes} nodes; "
            "ask for fewer, or choose another partition"
        )
    suits = [True] * num_nodes
    for need in needs:
        suits = [before and has >= need.number for before, has in zip(suits, need.has, strict=True)]
        if sum(suits) < layout.num_nodes:
            raise RunError(
                f"{need.setting}: the nodes of the partition {partition} have "
                f"{' or '.join(sorted(set(need.found)))}, so that {sum(suits)} of them have what "
                f"the job asks for, and it takes cluster.nodes={layout.num_nodes}; ask for less, "
                "or choose another partition"
            )


def _number_needed(setting: str, number: float, numbers: Iterable[float], unit: str) -> _Need:
    has = list(numbers)
    return _Need(f"{setting}={number:.0f}", number, has, [f"{one:.0f} {unit}" for one in has])


def gpus_by_type(gres: str) -> Counter[str]:
    """The GPUs in a node's generic resources, such as gpu:8 or gpu:a100:4(S:0,1),gpu:1g.10gb:7.

    A type may begin with a digit, or be a number: the count is what stands last.
    """
    found: Counter[str] = Counter()
    for resource in re.sub(r"\([^)]*\)|:no_consume", "", gres).split(","):
        name, *words = resource.strip().split(":")
        if name == "gpu":
            number = words.pop() if words and words[-1].isdecimal() else "1"
            found[":".join(words)] += int(number)
    return found


def cpus_for_jobs(node: Mapping[str, str]) -> float:
    """What scontrol says that jobs get of a node's CPUs: those without the system's own."""
    if "CPUEfctv" in node:
        return float(node["CPUEfctv"])
    # SLURM before 22.05.
    reserved = int(node.get("CoreSpecCount", 0)) * int(node.get("ThreadsPerCore", 1))
    return float(node.get("CPUTot") or "inf") - reserved


def mb_for_jobs(node: Mapping[str, str]) -> float:
    """What scontrol says that jobs get of a node's memory."""
    return float(node.get("RealMemory") or "inf") - float(node.get("MemSpecLimit", 0))
