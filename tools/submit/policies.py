"""What accounting allows a job: limits of its QOS, of its partition's QOS, and of its accounts.

    sacctmgr show assoc, show qos -> Policies -> the limit that would keep a job waiting for ever

A job that is above one of them alone, whatever else runs, waits without an end, where SLURM is told
to enforce limits and not to refuse them at submission. SLURM asks the QOS of the partition first,
then that of the job, then the user's own association and all accounts above it; what one of the two
QOS says of a resource is the end of the matter.
"""

import getpass
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from jobs.cluster_env import slurm_says
from jobs.sbatch import cpus_per_node
from nanoslime.config import RunConfig
from nanoslime.config.base import minutes
from nanoslime.layout import Layout
from nanoslime.types import RunError
from tools.submit.megabytes import megabytes

_OF_QOS = (
    *("MaxWall", "MaxTRES", "MaxTRESPerNode", "MaxTRESPU", "MaxTRESPA", "GrpTRES", "MinTRES"),
    *("MaxJobsPU", "MaxJobsPA", "GrpJobs", "MaxSubmitPU", "MaxSubmitPA", "GrpSubmit"),
)
_OF_ASSOCIATION = (
    *("MaxWall", "MaxTRES", "MaxTRESPerNode", "GrpTRES"),
    *("MaxJobs", "GrpJobs", "MaxSubmit", "GrpSubmit"),
)
_RESOURCES = ("MaxTRES", "MaxTRESPU", "MaxTRESPA", "GrpTRES")
_MEGABYTES = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2, "P": 1024**3}
_DEFAULT_QOS = "normal"
# Of the user's association to the root of all accounts there are few steps.
_MAX_DEPTH = 20


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one QOS, association or account, by their names in sacctmgr."""

    owner: str
    by_name: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Policies:
    """What sacctmgr tells that may concern a job; empty where nothing is enforced or told."""

    qos: Mapping[str, Limits] = field(default_factory=dict)
    overrides_partition: frozenset[str] = frozenset()
    # The QOS of a job that asks for none.
    default_qos: str = _DEFAULT_QOS
    # The user's own association first, then the accounts above it.
    associations: Sequence[Limits] = ()

    def of_job(self, qos: str, partition_qos: str) -> tuple[list[Limits], Sequence[Limits]]:
        """The QOS that a job is under, the one that is asked first in front; and the rest."""
        name = qos or self.default_qos
        names = [partition_qos, name]
        if name in self.overrides_partition:
            names.reverse()
        return [self.qos[name] for name in dict.fromkeys(names) if name in self.qos], (
            self.associations
        )


def ask(config: RunConfig) -> Policies:
    """The policies of the user's account; none where SLURM enforces none, or does not tell them."""
    said = slurm_says("scontrol", "show", "config")
    settings = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    settings = {name.strip(): value.strip() for name, value in settings.items()}
    enforced = settings.get("AccountingStorageEnforce", "").replace(" ", "").lower().split(",")
    if not {"limits", "safe", "all"} & set(enforced):
        return Policies()
    cluster = settings.get("ClusterName", "")
    user = getpass.getuser()
    account = config.cluster.account or _default_account(user)
    own = _own_association(user, account, cluster, config.cluster.partition)
    qos = {}
    overrides = set()
    for row in _rows("qos", ["Name", "Flags", *_OF_QOS]):
        qos[row["Name"]] = Limits(f"the QOS {row['Name']}", row)
        if "OverPartQOS" in row["Flags"]:
            overrides.add(row["Name"])
    associations = []
    if own:
        owner = f"the association of {user} with the account {account}"
        associations.append(Limits(owner, own))
        associations += _accounts_above(account, cluster)
    return Policies(
        qos=qos,
        overrides_partition=frozenset(overrides),
        default_qos=own.get("DefaultQOS") or _DEFAULT_QOS,
        associations=tuple(associations),
    )


def _rows(entity: str, columns: Sequence[str], *where: str) -> list[dict[str, str]]:
    """What sacctmgr lists, by the names of its columns; nothing where it does not answer."""
    listing = ["sacctmgr", "--noheader", "--parsable2", "show", entity, *where]
    text = slurm_says(*listing, f"format={','.join(columns)}")
    rows = [line.split("|") for line in text.splitlines()]
    return [dict(zip(columns, row, strict=True)) for row in rows if len(row) == len(columns)]


def _default_account(user: str) -> str:
    rows = _rows("user", ["User", "DefaultAccount"], user)
    return rows[0]["DefaultAccount"] if rows else ""


def _own_association(user: str, account: str, cluster: str, partition: str) -> dict[str, str]:
    """That of the partition where there is one, else that of all."""
    columns = ["Partition", "DefaultQOS", *_OF_ASSOCIATION]
    where = [f"user={user}", f"account={account}", f"cluster={cluster}"]
    rows = _rows("assoc", columns, *where)
    by_partition = {row["Partition"]: row for row in rows}
    return by_partition.get(partition) or by_partition.get("", {})


def _accounts_above(account: str, cluster: str) -> list[Limits]:
    """An account and those above it, whose limits hold for all their users together."""
    columns = ["Account", "User", "ParentName", *_OF_ASSOCIATION]
    found: list[Limits] = []
    while account and len(found) < _MAX_DEPTH:
        where = [f"account={account}", f"cluster={cluster}"]
        rows = [row for row in _rows("assoc", columns, *where, "user=") if not row["User"]]
        if not rows:
            break
        # What is not of the group is handed down to the user's own association.
        of_group = {name: text for name, text in rows[0].items() if name.startswith("Grp")}
        found.append(Limits(f"the account {account}", of_group))
        account = rows[0]["ParentName"]
    return found


@dataclass(frozen=True, slots=True)
class _Asked:
    """How much a job asks for of a resource, and the setting that says so."""

    setting: str
    amount: float

    def __str__(self) -> str:
        return f"{self.setting}={self.amount:.0f}"


def check(config: RunConfig, layout: Layout, policies: Policies, partition_qos: str) -> None:
    """Raises RunError for a job that no end of other jobs would ever let start."""
    qos, associations = policies.of_job(config.cluster.qos, partition_qos)
    time = _Asked("cluster.time_limit_min", config.cluster.time_limit_min)
    for owner, text in _in_force("MaxWall", qos, associations):
        if text and time.amount > minutes(text):
            raise RunError(_refusal(time, owner, "MaxWall", f"{minutes(text)} minutes"))
    per_node = _resources(config, layout)
    whole = {
        name: _Asked(
            f"{asked.setting} on cluster.nodes={layout.num_nodes}", asked.amount * layout.num_nodes
        )
        for name, asked in per_node.items()
    }
    whole["node"] = _Asked("cluster.nodes", layout.num_nodes)
    for limit in _RESOURCES:
        _check_resources(limit, whole, qos, associations)
    _check_resources("MaxTRESPerNode", per_node, qos, associations)
    _check_least(whole, qos)
    for limit in (*_OF_QOS, *_OF_ASSOCIATION):
        if "Jobs" in limit or "Submit" in limit:
            for owner, text in _in_force(limit, qos, associations):
                if text == "0":
                    raise RunError(
                        f"{owner} lets no job start ({limit}=0), so that this one would wait for "
                        "ever; choose another cluster.qos or cluster.account"
                    )


def _resources(config: RunConfig, layout: Layout) -> dict[str, _Asked]:
    """What a job asks for on each node, by SLURM's names."""
    cluster = config.cluster
    asked = {"cpu": _Asked("cluster.cpus_per_node", cpus_per_node(config, layout))}
    memory_mb = megabytes(cluster.memory_per_node)
    if memory_mb:
        asked["mem"] = _Asked("cluster.memory_per_node (MB)", memory_mb)
    if layout.device == "cuda" and cluster.gpu_request != "none":
        gpus = _Asked("cluster.gpus_per_node", layout.slots_per_node)
        asked["gres/gpu"] = gpus
        kind = cluster.gpu_request.partition("gpu:")[2]
        if kind:
            asked[f"gres/gpu:{kind}"] = gpus
    return asked


def _in_force(
    limit: str, qos: Sequence[Limits], associations: Sequence[Limits]
) -> Iterable[tuple[str, str]]:
    """Whose limit of this name holds, and what it is: that of the first QOS that has one, else
    those of all associations.
    """
    of_qos = [(one.owner, one.by_name[limit]) for one in qos if one.by_name.get(limit)]
    if of_qos:
        return of_qos[:1]
    return [(one.owner, one.by_name[limit]) for one in associations if one.by_name.get(limit)]


def _check_resources(
    limit: str,
    asked: Mapping[str, _Asked],
    qos: Sequence[Limits],
    associations: Sequence[Limits],
) -> None:
    for name, wanted in asked.items():
        for owner, allowed in _in_force(
            name, _of_resource(limit, qos), _of_resource(limit, associations)
        ):
            if wanted.amount > float(allowed):
                text = f"{name}={float(allowed):.0f}"
                raise RunError(_refusal(wanted, owner, limit, text))


def _check_least(asked: Mapping[str, _Asked], qos: Sequence[Limits]) -> None:
    for one in _of_resource("MinTRES", qos):
        for name, least in one.by_name.items():
            if name in asked and asked[name].amount < float(least):
                raise RunError(
                    f"{asked[name]}: {one.owner} takes no job with less than {name}="
                    f"{float(least):.0f} (MinTRES), and this one would wait for ever; ask for "
                    "more, or choose another cluster.qos"
                )


def _of_resource(limit: str, all_limits: Iterable[Limits]) -> list[Limits]:
    """The limits of this name, by resource in place of by name."""
    return [Limits(one.owner, amounts(one.by_name.get(limit, ""))) for one in all_limits]


def amounts(text: str) -> dict[str, str]:
    """The amounts in a list of SLURM's resources (cpu=4,mem=1.46T,gres/gpu=8); memory in MB.

    sacctmgr rounds an amount that it shows with a unit, so that the largest is meant which it
    could stand for.
    """
    found = {}
    for word in text.split(","):
        name, _, amount = word.partition("=")
        match = re.fullmatch(r"(\d+)(?:\.(\d+))?([KMGTP]?)", amount)
        if match is None:
            continue
        digits = match[2] or ""
        number = float(f"{match[1]}.{digits or 0}")
        if digits:
            number += 0.5 * 10.0 ** -len(digits)
        found[name] = str(number * (_MEGABYTES[match[3] or "M"] if name == "mem" else 1))
    return found


def _refusal(asked: _Asked, owner: str, limit: str, allowed: str) -> str:
    return (
        f"{asked}: {owner} allows at most {allowed} ({limit}), and SLURM would let the job wait "
        "for ever; ask for less, or choose another cluster.qos or cluster.account"
    )
