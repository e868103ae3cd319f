"""The report of a ladder as JSON and as text, without names of hosts, users and places.

It may leave the site: whatever came from a log, a path or SLURM is scrubbed.
"""

import getpass
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.acceptance.checks import FAILED_CHECK, Check
from tools.acceptance.rungs import Rung

_ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b")
_PATH = re.compile(r"(?<![\w<])(?:~|\.{0,2})(?:/[^\s:;,'\"()\[\]]+)+/?")
# Tokens and keys are long words of letters and digits.
_SECRET = re.compile(r"\b(?:hf_\w{8,}|(?=\w*\d)[A-Za-z0-9_]{28,})\b")
_MAIL = re.compile(r"\b[\w.+-]+@[\w.-]+\b")
# Words that are too short to be taken out wherever they stand.
_MIN_NAME = 2


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
    names: set[str] = field(default_factory=set)

    @property
    def is_good(self) -> bool:
        return all(outcome.state != "failed" for outcome in self.outcomes)

    def content(self) -> dict[str, Any]:
        """What the JSON file holds."""
        rungs = []
        for one in self.outcomes:
            checks = [asdict(check) for check in one.checks]
            told = {"state": one.state, "reason": one.reason, "seconds": round(one.seconds, 1)}
            place = {"rung": one.rung.name, "title": one.rung.title, "nodes": one.rung.num_nodes}
            rungs.append({**place, **told, "checks": checks})
        return _scrubbed({**self.code, "verdict": self.verdict(), "rungs": rungs}, self._hidden())

    def verdict(self) -> str:
        """One sentence on the whole ladder."""
        passed = [one for one in self.outcomes if one.state == "passed"]
        for one in self.outcomes:
            if one.state == "failed":
                return f"FAILED at {one.rung.title}, after {len(passed)} rungs that passed"
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
        lines = [self.verdict(), ""]
        for one in self.outcomes:
            spent = f", {one.seconds:.0f} s" if one.seconds else ""
            reason = f": {one.reason}" if one.reason else ""
            lines.append(f"{one.state.upper():11} {one.rung.title}{spent}{reason}")
            for check in one.checks:
                mark = "!" if check.outcome == FAILED_CHECK else " "
                lines.append(f"  {mark} {check.name:16} {check.outcome:10}  {check.text}")
        return scrub("\n".join(lines) + "\n", self._hidden())

    def _hidden(self) -> list[str]:
        host = socket.gethostname()
        own = {host, host.partition(".")[0], socket.getfqdn(), getpass.getuser(), Path.home().name}
        names = {name for name in own | self.names if len(name) >= _MIN_NAME}
        return sorted(names, key=len, reverse=True)


def scrub(text: str, names: Iterable[str]) -> str:
    """The text without paths, addresses, secrets and these names."""
    for pattern, word in (
        (_MAIL, "<mail>"),
        (_PATH, "<path>"),
        (_ADDRESS, "<address>"),
        (_SECRET, "<secret>"),
    ):
        text = pattern.sub(word, text)
    for name in names:
        text = re.sub(rf"(?<![\w<]){re.escape(name)}(?![\w>])", "<name>", text)
    return text


def _scrubbed(content: Any, names: Sequence[str]) -> Any:
    if isinstance(content, dict):
        return {key: _scrubbed(value, names) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_scrubbed(value, names) for value in content]
    return scrub(content, names) if isinstance(content, str) else content
