"""What SLURM says of a cluster: its partitions, their nodes, and whom the user may charge.

Each parser takes the text of one command and is tested on texts; `ask_cluster` runs the commands.
"""

import getpass
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jobs.cluster_env import facts as words_of
from jobs.submission import complaint
from nanoslime.processes.command import ask
from nanoslime.types import RunError
from tools.submit.limits import cpus_for_jobs, gpus_by_type, mb_for_jobs

_DEADLINE_S = 30.0
_UNLIMITED = ("UNLIMITED", "INFINITE", "NONE", "N/A", "")
_ANY = ("ALL", "(null)", "")


@dataclass(frozen=True, slots=True)
class NodeKind:
    """The nodes of a partition that have the same resources and features."""

    partition: str
    count: int
    cpus: int
    memory_mb: int
    gpus: int
    gpu_type: str
    """Empty where SLURM gives the GPUs no type."""
    features: tuple[str, ...]
    nodes: str
    """Their names, as SLURM lists them."""
    has_other_gpus: bool = False
    """Whether each has GPUs of other types as well."""

    @property
    def has_slices(self) -> bool:
        """Whether its GPUs are parts of some (MIG)."""
        return is_slice(self.gpu_type)


@dataclass(frozen=True, slots=True)
class Partition:
    name: str
    is_default: bool
    is_up: bool
    max_time_min: int | None
    grace_s: int
    """Seconds that a preempted job has; 0 where none is preempted, or without a warning."""
    allowed_accounts: tuple[str, ...]
    """Empty: all but the denied ones."""
    denied_accounts: tuple[str, ...]
    allowed_qos: tuple[str, ...]
    allowed_groups: tuple[str, ...]
    default_time_min: int | None
    max_cpus: int | None = None
    """The CPUs that a job gets of a node at most."""
    max_mb: int | None = None
    max_mb_per_cpu: int | None = None
    qos: str = ""
    """The QOS whose limits hold for all of the partition's jobs; empty: none."""

    def takes(self, account: str) -> bool:
        """Whether these lists have the account; SLURM may take its parents for it."""
        if self.allowed_accounts:
            return account in self.allowed_accounts
        return account not in self.denied_accounts


@dataclass(frozen=True, slots=True)
class Association:
    """An account that the user may charge, in all partitions or in one."""

    account: str
    partition: str
    qos: tuple[str, ...]
    default_qos: str
    max_time_min: int | None


@dataclass(frozen=True, slots=True)
class Cluster:
    name: str
    config: dict[str, str]
    """The settings of `scontrol show config`."""
    partitions: tuple[Partition, ...]
    kinds: tuple[NodeKind, ...]
    associations: tuple[Association, ...]
    """Empty where SLURM keeps no accounts, or does not tell them."""
    why_no_accounts: str
    """Why sacctmgr does not tell them; empty where it does, or there are none."""
    default_account: str
    qos_limits: dict[str, int]
    """The minutes that a job of a QOS may take, where it has a limit."""

    @property
    def enforces_accounts(self) -> bool:
        return "associations" in self.config.get("AccountingStorageEnforce", "")


def ask_cluster() -> Cluster:
    """Raises RunError where SLURM is not here, or does not answer."""
    for command in ("scontrol", "sinfo"):
        if shutil.which(command) is None:
            raise RunError(
                f"there is no {command} in PATH, so no SLURM to describe: load its module (module "
                "load slurm), or run this on a login node of the cluster"
            )
    config = parse_config(_says("scontrol", "show", "config"))
    name = config.get("ClusterName", "")
    if not re.fullmatch(r"[\w.-]+", name):
        raise RunError(f"SLURM calls this cluster {name!r}, which cannot be the name of a file")
    kinds = parse_kinds(_says("sinfo", "--noheader", "--exact", f"--format={_KIND_FORMAT}"))
    partitions = parse_partitions(_says("scontrol", "show", "partition", "--oneliner"))
    accounts = Accounts()
    if config.get("AccountingStorageType", "").endswith("slurmdbd"):
        try:
            accounts = _ask_accounts(name)
        except RunError as error:
            # A site may hide them, or keep sacctmgr from its users.
            accounts = Accounts(why_not=str(error))
    return Cluster(
        name=name,
        config=config,
        partitions=partitions,
        kinds=kinds,
        associations=accounts.associations,
        why_no_accounts=accounts.why_not,
        default_account=accounts.default,
        qos_limits=accounts.qos_limits,
    )


@dataclass(frozen=True, slots=True)
class Accounts:
    """What sacctmgr tells of the user."""

    associations: tuple[Association, ...] = ()
    default: str = ""
    qos_limits: dict[str, int] = field(default_factory=dict)
    why_not: str = ""


def _ask_accounts(cluster: str) -> Accounts:
    user = getpass.getuser()
    listing = ["sacctmgr", "--noheader", "--parsable2", "show"]
    mine = [f"user={user}", f"cluster={cluster}", f"format={_ASSOCIATION_FORMAT}"]
    return Accounts(
        associations=parse_associations(_says(*listing, "assoc", *mine)),
        default=_says(*listing, "user", user, "format=DefaultAccount").strip(),
        qos_limits=parse_qos_limits(_says(*listing, "qos", "format=Name,MaxWall")),
    )


def _says(*command: str) -> str:
    try:
        done = ask(list(command), _DEADLINE_S)
    except OSError as error:
        raise RunError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise RunError(f"{' '.join(command)} fails: {complaint(done.stderr)}")
    return done.stdout


_KIND_FORMAT = "%R|%D|%c|%m|%G|%f|%N"
_ASSOCIATION_FORMAT = "Account,Partition,QOS,DefaultQOS,MaxWall"


def parse_config(text: str) -> dict[str, str]:
    """The settings that `scontrol show config` lists."""
    return dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", text, re.MULTILINE))


def parse_kinds(text: str) -> tuple[NodeKind, ...]:
    """The kinds of nodes in what sinfo prints by _KIND_FORMAT; one that has no number is left out.

    A node is listed once for each of its partitions.
    """
    kinds = []
    for line in text.splitlines():
        partition, count, cpus, memory, gres, features, nodes = line.split("|", 6)
        by_type = gpus_by_type(gres)
        gpus, gpu_type = most_gpus(by_type)
        listed = tuple(word for word in features.split(",") if word not in _ANY)
        numbers = [int(re.sub(r"\D.*", "", number) or 0) for number in (count, cpus, memory)]
        kinds.append(NodeKind(partition, *numbers, gpus, gpu_type, listed, nodes, len(by_type) > 1))
    return tuple(kinds)


def most_gpus(by_type: Mapping[str, int]) -> tuple[int, str]:
    """How many GPUs a node has, and their type: of several types the one with the most.

    Slices of GPUs are chosen only where a node has nothing else.
    """
    most = max(by_type, key=lambda name: (not is_slice(name), by_type[name]), default="")
    return by_type.get(most, 0), most


def slice_gb(gpu_type: str) -> int | None:
    """The memory of a slice of a GPU (MIG), which its type tells, such as a100_1g.10gb+me."""
    match = re.search(r"\dg\.(\d+)gb", gpu_type.lower())
    return int(match[1]) if match else None


def is_slice(gpu_type: str) -> bool:
    return slice_gb(gpu_type) is not None


def parse_partitions(text: str) -> tuple[Partition, ...]:
    """The partitions in what `scontrol show partition --oneliner` prints."""
    found = []
    for line in text.splitlines():
        facts = words_of(line)
        if "PartitionName" not in facts or facts.get("RootOnly") == "YES":
            continue
        is_preempted = facts.get("PreemptMode", "OFF") != "OFF"
        grace = facts.get("GraceTime", "0")
        found.append(
            Partition(
                name=facts["PartitionName"],
                is_default=facts.get("Default") == "YES",
                is_up=facts.get("State", "UP") == "UP",
                max_time_min=minutes(facts.get("MaxTime", "")),
                grace_s=int(grace) if is_preempted and grace.isdigit() else 0,
                allowed_accounts=_words(facts.get("AllowAccounts", "")),
                denied_accounts=_words(facts.get("DenyAccounts", "")),
                allowed_qos=_words(facts.get("AllowQos", "")),
                allowed_groups=_words(facts.get("AllowGroups", "")),
                default_time_min=minutes(facts.get("DefaultTime", "")),
                max_cpus=_number(facts.get("MaxCPUsPerNode", "")),
                max_mb=_number(facts.get("MaxMemPerNode", "")),
                max_mb_per_cpu=_number(facts.get("MaxMemPerCPU", "")),
                qos="" if facts.get("QoS", "N/A") in ("N/A", *_ANY) else facts["QoS"],
            )
        )
    return tuple(found)


def parse_associations(text: str) -> tuple[Association, ...]:
    """The user's accounts in what sacctmgr prints by _ASSOCIATION_FORMAT."""
    found = []
    for line in text.splitlines():
        account, partition, qos, default_qos, limit = line.split("|")
        found.append(Association(account, partition, _words(qos), default_qos, minutes(limit)))
    return tuple(found)


def parse_qos_limits(text: str) -> dict[str, int]:
    limits = {}
    for line in text.splitlines():
        name, limit = line.split("|")
        allowed = minutes(limit)
        if allowed is not None:
            limits[name] = allowed
    return limits


def minutes(text: str) -> int | None:
    """A time of SLURM's (D-HH:MM:SS, HH:MM:SS, MM:SS or minutes) in whole minutes; None: no limit,
    or one that is written otherwise.
    """
    if text.upper() in _UNLIMITED:
        return None
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [days or "0", *parts]):
        return None
    numbers = [int(part) for part in parts]
    if days:
        hours, min_, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, min_, seconds = numbers
    else:
        hours, min_, seconds = 0, *[*numbers, 0][:2]
    return (int(days or 0) * 24 + hours) * 60 + min_ + seconds // 60


@dataclass(frozen=True, slots=True)
class Share:
    """What a job gets of each of its nodes at most."""

    cpus: int
    memory_mb: int


def ask_share(cluster: Cluster, partition: Partition, kind: NodeKind) -> Share:
    """What a job of the partition gets of any node of a kind."""
    text = _says("scontrol", "show", "node", "--oneliner", kind.nodes)
    return parse_share(text, kind, partition, cluster.config)


def parse_share(
    text: str, kind: NodeKind, partition: Partition, config: Mapping[str, str]
) -> Share:
    """The least that the nodes in what `scontrol show node --oneliner` prints have for a job.

    SLURM keeps cores and memory for the system; a partition has bounds of its own, or those of
    the whole cluster.
    """
    nodes = [words_of(line) for line in text.splitlines() if "NodeName=" in line]
    cpus = [kind.cpus, *map(cpus_for_jobs, nodes)]
    memory_mb = [kind.memory_mb, *map(mb_for_jobs, nodes)]
    if partition.max_cpus:
        cpus.append(partition.max_cpus)
    max_mb, max_mb_per_cpu = partition.max_mb, partition.max_mb_per_cpu
    if not max_mb and not max_mb_per_cpu:
        max_mb = _number(config.get("MaxMemPerNode", ""))
        max_mb_per_cpu = _number(config.get("MaxMemPerCPU", ""))
    if max_mb:
        memory_mb.append(max_mb)
    if max_mb_per_cpu:
        memory_mb.append(max_mb_per_cpu * min(cpus))
    return Share(int(min(cpus)), int(min(memory_mb)))


def _number(text: str) -> int | None:
    """A bound; None: none, or one that is written otherwise."""
    return int(text) if text.isdecimal() else None


def _words(text: str) -> tuple[str, ...]:
    return () if text in _ANY else tuple(text.split(","))


def try_job(options: Sequence[str]) -> str:
    """Why SLURM would refuse a job with these options of sbatch; empty where it would not."""
    done = ask(["sbatch", "--test-only", *options], _DEADLINE_S, stdin="#!/bin/sh\n")
    return complaint(done.stderr) if done.returncode else ""
