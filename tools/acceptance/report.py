"""The report of a ladder as JSON and as text, without names of hosts, users and places.

It may leave the site: whatever came from a log, a path or SLURM is scrubbed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tools.acceptance.checks import FAILED_CHECK, Check
from tools.acceptance.names import Names, scrub, scrubbed
from tools.acceptance.rungs import Rung


@dataclass(slots=True)
class Outcome:
    """What became of a rung."""

    rung: Rung
    # passed, failed, impossible or not reached
    state: str
    reason: str = ""
    seconds: float = 0.0
    checks: Sequence[Check] = ()


@dataclass(slots=True)
class Report:
    outcomes: list[Outcome] = field(default_factory=list)
    # The code's commit and versions.
    code: dict[str, Any] = field(default_factory=dict)
    # Names of the site that may stand in what a rung tells.
    hidden: Names = field(default_factory=Names)
    # The rungs that are still to come.
    rest: list[Rung] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return all(outcome.state != "failed" for outcome in self.outcomes)

    def content(self) -> dict[str, Any]:
        """What the JSON file holds."""
        hidden = self.hidden.pattern()
        rungs = []
        for one in self._all():
            checks = [asdict(check) for check in one.checks]
            found = {"reason": one.reason, "seconds": round(one.seconds, 1), "checks": checks}
            place = {"rung": one.rung.name, "title": one.rung.title, "nodes": one.rung.num_nodes}
            rungs.append({**place, "state": one.state, **scrubbed(found, hidden)})
        return {**scrubbed(self.code, hidden), "verdict": self.verdict(), "rungs": rungs}

    def verdict(self) -> str:
        """One sentence on the whole ladder."""
        passed = [one for one in self.outcomes if one.state == "passed"]
        for one in self.outcomes:
            if one.state == "failed":
                return f"FAILED at {one.rung.title}, after {len(passed)} rungs that passed"
        if self.rest:
            return f"passed {len(passed)} rungs so far; the next one is {self.rest[0].title}"
        ends = [one for one in self.outcomes if one.state == "impossible"]
        higher = [one for one in ends if one.rung.num_nodes > 1]
        if higher:
            return (
                f"passed {len(passed)} rungs; the ladder ends early before {higher[0].rung.title}: "
                f"{higher[0].reason}"
            )
        return f"passed all {len(passed)} rungs"

    def text(self) -> str:
        """What a person reads."""
        hidden = self.hidden.pattern()
        lines = [self.verdict(), ""]
        for one in self._all():
            spent = f", {one.seconds:.0f} s" if one.seconds else ""
            reason = f": {scrub(one.reason, hidden)}" if one.reason else ""
            lines.append(f"{one.state.upper():11} {one.rung.title}{spent}{reason}")
            for check in one.checks:
                mark = "!" if check.outcome == FAILED_CHECK else " "
                told = scrub(check.text, hidden)
                lines.append(f"  {mark} {check.name:16} {check.outcome:10}  {told}")
        return "\n".join(lines) + "\n"

    def _all(self) -> list[Outcome]:
        return [*self.outcomes, *(Outcome(rung, "not reached") for rung in self.rest)]
