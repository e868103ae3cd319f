"""Which nodes are unfit, by what all of them have found, and a table of it all."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from types import MappingProxyType

from tools.preflight.node import Reading

# Heartbeats count, so that clocks may differ; files and logs of nodes that differ more mislead.
_MAX_SKEW_S = 5.0
# What one node of its own may have, where it is the only one of the job.
_OF_ONE_NODE = ("ecc", "shm", "temp")
# What all nodes share is no node's fault.
_SHARED = ("storage",)
_MAX_NAMED = 4


@dataclass(frozen=True, slots=True)
class Report:
    """What a node has found out about itself."""

    name: str
    readings: Sequence[Reading]
    versions: Mapping[str, str]
    address: str = ""


@dataclass(frozen=True, slots=True)
class Echo:
    """A node's answer to a file of node 0: what it has read, and when by its clock.

    On node 0's clock it was between `asked` and `heard`.
    """

    text: str
    at: float
    asked: float
    heard: float

    @property
    def skew_s(self) -> float:
        """How much the node's clock is ahead of node 0's at least, 0 where it may be right."""
        return self.at - min(max(self.at, self.asked), self.heard)


@dataclass(frozen=True, slots=True)
class Verdict:
    # By node, what is wrong with it; empty where Ray may start.
    problems: dict[str, list[Reading]] = field(default_factory=dict)
    # The unfit nodes without which the run may do; none where the fault is not a node's own.
    excluded: tuple[str, ...] = ()
    table: str = ""

    @property
    def cause(self) -> str:
        """One line; empty where all nodes are fit."""
        found = [f"{readings[0].problem}" for readings in self.problems.values()]
        told = "; ".join(dict.fromkeys(found[:_MAX_NAMED]))
        more = len(found) - _MAX_NAMED
        unfit = f"{told}; and {more} nodes more" if more > 0 else told
        return f"preflight: {unfit}" if found else ""


def judge(
    reports: Sequence[Report],
    echoes: Mapping[str, Echo],
    canary: str,
    links: Mapping[str, Reading] = MappingProxyType({}),
) -> Verdict:
    """The verdict on all nodes.

    `canary` is the text that each of them had to see, `links` what is known of each one's links.
    """
    found = [(report.name, reading) for report in reports for reading in report.readings]
    found += _versions(reports)
    found += _files([report.name for report in reports], echoes, canary)
    found += _clocks(echoes)
    found += links.items()
    problems: dict[str, list[Reading]] = {}
    for name, reading in found:
        if reading.problem:
            problems.setdefault(name, []).append(reading)
    checks = {reading.check for _, reading in found}
    is_of_nodes = not any(_is_of_site(check, problems, len(reports)) for check in checks)
    excluded = tuple(problems) if is_of_nodes else ()
    return Verdict(problems, excluded, _table(found, len(reports)))


def _is_of_site(check: str, problems: Mapping[str, Sequence[Reading]], num_nodes: int) -> bool:
    """Whether another choice of nodes would not help."""
    failed = [name for name, of in problems.items() if check in {r.check for r in of}]
    if check in _SHARED or num_nodes == 1:
        return bool(failed) and check not in _OF_ONE_NODE
    return len(failed) == num_nodes


def _versions(reports: Sequence[Report]) -> list[tuple[str, Reading]]:
    """Every node has the versions that most have."""
    found = []
    names = reports[0].versions
    usual = {}
    for what in names:
        counts = Counter(report.versions.get(what, "none") for report in reports)
        [(usual[what], _)] = counts.most_common(1)
    for report in reports:
        differing = [what for what in names if report.versions.get(what, "none") != usual[what]]
        told = [f"{what} {report.versions.get(what)} (not {usual[what]})" for what in differing]
        problem = ""
        if told:
            problem = (
                f"{report.name} has {', '.join(told)}, unlike the other nodes; "
                "all nodes need one environment and one checkout"
            )
        value = ", ".join(told) or f"python {usual['python']}, code {usual['code']}"
        found.append((report.name, Reading("versions", value, problem)))
    return found


def _files(
    names: Sequence[str], echoes: Mapping[str, Echo], canary: str
) -> list[tuple[str, Reading]]:
    """Every node has read what node 0 has written, soon."""
    found = []
    for name in names:
        echo = echoes.get(name)
        problem = ""
        if echo is None or echo.text != canary:
            read = "does not see" if echo is None else "reads something else in"
            problem = (
                f"{name} {read} a file that {names[0]} wrote into the run directory; it must be "
                "on a filesystem that all nodes share, and that shows new files within seconds"
            )
        value = "unfit" if problem or echo is None else "within seconds"
        found.append((name, Reading("shared files", value, problem)))
    return found


def _clocks(echoes: Mapping[str, Echo]) -> list[tuple[str, Reading]]:
    """The clocks of all nodes agree; where they do not, most of them are right."""
    found = []
    usual = median_low([echo.skew_s for echo in echoes.values()] or [0.0])
    for name, echo in echoes.items():
        skew_s = echo.skew_s - usual
        problem = ""
        if abs(skew_s) > _MAX_SKEW_S:
            side = "ahead of" if skew_s > 0 else "behind"
            problem = (
                f"the clock of {name} is {abs(skew_s):.0f} s {side} those of the other nodes; "
                "its time service (chrony, ntpd) needs its administrator"
            )
        value = f"{skew_s:+.0f} s" if problem else f"within {_MAX_SKEW_S:g} s"
        found.append((name, Reading("clock", value, problem)))
    return found


def _table(found: Sequence[tuple[str, Reading]], num_nodes: int) -> str:
    """A line for each check and what it has found, with the nodes of which that is so."""
    nodes: dict[tuple[str, str, str], list[str]] = {}
    for name, reading in found:
        mark = "UNFIT" if reading.problem else "ok"
        nodes.setdefault((reading.check, mark, reading.value), []).append(name)
    rows = [("preflight", "", "found", "nodes")]
    order = {check: i for i, check in enumerate(dict.fromkeys(r.check for _, r in found))}
    for (check, mark, value), names in sorted(nodes.items(), key=lambda row: order[row[0][0]]):
        rows.append((check, mark, value, _listed(names, num_nodes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _listed(names: Sequence[str], num_nodes: int) -> str:
    if len(names) == num_nodes > 1:
        return f"all {num_nodes}"
    more = len(names) - _MAX_NAMED
    told = ", ".join(names[:_MAX_NAMED])
    return f"{told} and {more} more" if more > 0 else told
