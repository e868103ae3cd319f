"""What only a person can say: which partition, account, run root and environment.

Each question has an answer that Enter takes. One is asked only where there is a choice.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.checkout import ROOT, made_by
from nanoslime.types import RunError
from tools.site.slurm import Association, Cluster, NodeKind, Partition


@dataclass(frozen=True, slots=True)
class Answers:
    partition: Partition
    kind: NodeKind
    account: str
    """Empty: SLURM takes the user's own, or keeps none."""
    qos: str
    run_root: Path
    venv: Path


class Person:
    """Asks at the terminal, counts its questions, and takes the defaults where nobody answers."""

    def __init__(self, *, answers: bool) -> None:
        self.answers = answers
        self.num_asked = 0

    def ask(self, question: str, default: str, refusal: Callable[[str], str]) -> str:
        """The answer; `refusal` says what is wrong with one, and it is asked again."""
        while self.answers:
            self.num_asked += 1
            try:
                answer = input(f"{question} [{default}]: ").strip()
            except EOFError:
                print("(no answer: taken as it is)")
                self.answers = False
                break
            if not answer:
                break
            wrong = refusal(answer)
            if not wrong:
                return answer
            print(wrong)
        return default

    def choose(self, what: str, choices: Sequence[str], default: str) -> str:
        """One of these names, or of their numbers from 1 on."""
        if len(choices) < 2:
            return default
        by_number = {str(number): name for number, name in enumerate(choices, 1)}

        def refusal(answer: str) -> str:
            if answer in choices or answer in by_number:
                return ""
            return f"{answer!r} is none of {', '.join(choices)}"

        answer = self.ask(what, default, refusal)
        return answer if answer in choices else by_number[answer]


@dataclass(frozen=True, slots=True)
class Given:
    """What options have said already; empty where they have not."""

    partition: str = ""
    account: str = ""
    run_root: str = ""
    venv: str = ""


def ask_person(cluster: Cluster, person: Person, given: Given) -> Answers:
    """Raises RunError for an option that names nothing of this cluster."""
    kinds = {p.name: _main_kind(cluster, p) for p in cluster.partitions if p.is_up}
    usable = {name: kind for name, kind in kinds.items() if kind is not None}
    if not usable:
        raise RunError("no partition of this cluster is up and has nodes (sinfo)")
    name = given.partition or _ask_partition(cluster, usable, person)
    if name not in usable:
        raise RunError(f"--partition {name}: this cluster has {', '.join(usable)}")
    [partition] = [p for p in cluster.partitions if p.name == name]
    account = given.account or _ask_account(cluster, partition, person)
    run_root = given.run_root or _ask_run_root(person)
    venv = given.venv or _ask_venv(usable[name], person)
    return Answers(
        partition=partition,
        kind=usable[name],
        account=account,
        qos=_qos(cluster, partition, account),
        run_root=_absolute(run_root),
        venv=_absolute(venv),
    )


def _main_kind(cluster: Cluster, partition: Partition) -> NodeKind | None:
    """The nodes of a partition that a run is for: those with GPUs, which are whole ones, and then
    the most of a kind.
    """
    kinds = [kind for kind in cluster.kinds if kind.partition == partition.name]

    def fitness(kind: NodeKind) -> tuple[bool, bool, int]:
        return kind.gpus > 0, not kind.has_slices, kind.count

    return max(kinds, key=fitness, default=None)


def describe(partition: Partition, kind: NodeKind) -> str:
    """A partition in a line: nodes, GPUs, cores, memory, limit."""
    gpus = f"{kind.gpus} x {kind.gpu_type or 'GPU'}, " if kind.gpus else "no GPUs, "
    limit = "no time limit"
    if partition.max_time_min is not None:
        limit = f"at most {partition.max_time_min} min"
    default = ", the site's default" if partition.is_default else ""
    return (
        f"{kind.count} nodes of {gpus}{kind.cpus} cores, {kind.memory_mb / 1000:.0f} GB; "
        f"{limit}{default}"
    )


def _ask_partition(cluster: Cluster, usable: dict[str, NodeKind], person: Person) -> str:
    """The default: the site's where it has GPUs (whole ones, not slices) or no partition has, else
    the one with the most.
    """

    def fitness(partition: Partition) -> tuple[bool, bool, bool, int]:
        kind = usable[partition.name]
        num_devices = kind.count * max(kind.gpus, 1)
        return kind.gpus > 0, not kind.has_slices, partition.is_default, num_devices

    partitions = [p for p in cluster.partitions if p.name in usable]
    default = max(partitions, key=fitness).name
    if len(partitions) > 1 and person.answers:
        for number, partition in enumerate(partitions, 1):
            print(f"  {number}  {partition.name:14} {describe(partition, usable[partition.name])}")
    return person.choose("partition", [p.name for p in partitions], default)


def _associations(cluster: Cluster, partition: Partition) -> list[Association]:
    """The user's associations that hold in a partition, if it takes their accounts."""
    return [own for own in cluster.associations if own.partition in ("", partition.name)]


def _ask_account(cluster: Cluster, partition: Partition, person: Person) -> str:
    all_accounts = dict.fromkeys(own.account for own in _associations(cluster, partition))
    # Where none is listed, one may be below a listed one: SLURM, which is asked later, knows.
    accounts = list(filter(partition.takes, all_accounts)) or list(all_accounts)
    if cluster.why_no_accounts and cluster.enforces_accounts:
        print(f"  SLURM does not tell your accounts: {cluster.why_no_accounts}")
        return person.ask("account (Enter: SLURM's default)", "", lambda answer: "")
    if not accounts and cluster.enforces_accounts:
        raise RunError(
            f"none of your accounts may use partition {partition.name} (sacctmgr show assoc "
            f"user=$USER), and this cluster enforces accounts: choose another partition by "
            "--partition, or name an account by --account"
        )
    if not accounts:
        return ""
    default = cluster.default_account if cluster.default_account in accounts else accounts[0]
    if len(accounts) > 1 and person.answers:
        print(f"  your accounts: {', '.join(accounts)}")
    return person.choose("account", accounts, default)


def _qos(cluster: Cluster, partition: Partition, account: str) -> str:
    """The QOS that a job has to name: only where the partition does not take the default one."""
    if not partition.allowed_qos:
        return ""
    for own in _associations(cluster, partition):
        if own.account == account:
            if (own.default_qos or "normal") in partition.allowed_qos:
                return ""
            return next((name for name in own.qos if name in partition.allowed_qos), "")
    return ""


def max_time_min(cluster: Cluster, answers: Answers) -> int | None:
    """The longest job that partition, association and QOS allow; None: no limit."""
    partition = answers.partition
    limits = [partition.max_time_min, cluster.qos_limits.get(partition.qos)]
    for own in _associations(cluster, partition):
        if own.account == answers.account:
            limits.append(own.max_time_min)
            qos = answers.qos or own.default_qos or "normal"
            limits.append(cluster.qos_limits.get(qos))
    return min((limit for limit in limits if limit is not None), default=None)


def _ask_run_root(person: Person) -> str:
    """The default lies on the site's large filesystem, where the login shell names one."""
    named = [os.environ.get(name, "") for name in ("SCRATCH", "WORK", "PROJECT")]
    place = next((path for path in named if path and os.access(path, os.W_OK)), "~")

    def refusal(answer: str) -> str:
        if "$" in answer:
            return f"{answer}: write the directory out"
        parent = _absolute(answer)
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            return f"{parent} is no directory that you may write to"
        return ""

    question = "directory for runs, on a filesystem that all nodes see"
    return person.ask(question, f"{place}/nanoslime-runs", refusal)


def _ask_venv(kind: NodeKind, person: Person) -> str:
    """The default is the environment of this checkout, there or not yet."""
    target = "cuda" if kind.gpus else "cpu"
    own = ROOT / ".venv" / target
    default = own
    stamp = Path(sys.prefix, ".nanoslime-target")
    if not own.exists() and stamp.exists() and f"target={target}\n" in stamp.read_text():
        # The one that runs this, which another checkout has made.
        default = Path(sys.prefix)

    def refusal(answer: str) -> str:
        if (_absolute(answer) / "bin/python").exists():
            return ""
        return (
            f"{answer} holds no bin/python; the one of this checkout is made by {made_by(target)}"
        )

    return person.ask("environment of the nodes", str(default), refusal)


def _absolute(path: str | Path) -> Path:
    return Path(path).expanduser().absolute()
