"""What SLURM says of a cluster: its partitions, their nodes, and whom the user may charge.

Each parser takes the text of one command and is tested on texts; `ask_cluster` runs the commands.
"""

import getpass
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field

from jobs.where import complaint
from nanoslime.processes.command import ask
from nanoslime.types import RunError

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

    def takes(self, account: str) -> bool:
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
        gpus, gpu_type = parse_gres(gres)
        listed = tuple(word for word in features.split(",") if word not in _ANY)
        numbers = [int(re.sub(r"\D.*", "", number) or 0) for number in (count, cpus, memory)]
        kinds.append(NodeKind(partition, *numbers, gpus, gpu_type, listed, nodes))
    return tuple(kinds)


def parse_gres(gres: str) -> tuple[int, str]:
    """How many GPUs a node has, and their type: of several types the one with the most.

    The words of SLURM are `gpu:8`, `gpu:h100:8(S:0-1)`, `gpu:a100:4,gpu:1g.10gb:7,shard:8`.
    """
    by_type: dict[str, int] = {}
    for word in re.sub(r"\([^)]*\)", "", gres).split(","):
        match = re.fullmatch(r"gpu(?::([\w.-]*[a-zA-Z][\w.-]*))?(?::(\d+))?", word.strip())
        if match:
            gpu_type = match[1] or ""
            by_type[gpu_type] = by_type.get(gpu_type, 0) + int(match[2] or 1)
    if not by_type:
        return 0, ""
    most = max(by_type, key=lambda name: by_type[name])
    return by_type[most], most


def parse_partitions(text: str) -> tuple[Partition, ...]:
    """The partitions in what `scontrol show partition --oneliner` prints."""
    found = []
    for line in text.splitlines():
        facts = dict(re.findall(r"(\S+?)=(\S*)", line))
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


def first_of(nodes: str) -> str:
    """The first node of a list such as `n[1-4],m7`."""
    return next(iter(_says("scontrol", "show", "hostnames", nodes).split()), "")


def reserved_mb(node: str) -> int:
    """The memory of a node that SLURM keeps for the system (MemSpecLimit)."""
    match = re.search(r"MemSpecLimit=(\d+)", _says("scontrol", "show", "node", node))
    return int(match[1]) if match else 0


def _words(text: str) -> tuple[str, ...]:
    return () if text in _ANY else tuple(text.split(","))


def try_job(options: Sequence[str]) -> str:
    """Why SLURM would refuse a job with these options of sbatch; empty where it would not."""
    done = ask(["sbatch", "--test-only", *options], _DEADLINE_S, stdin="#!/bin/sh\n")
    return complaint(done.stderr) if done.returncode else ""
