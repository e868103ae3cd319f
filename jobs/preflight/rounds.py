"""How the agents of an attempt look at their nodes together.

every node   preflight/<i>.json   what it has found out about itself
node 0       canary.json          when all have: a file that all must see
every node   canary/<i>.json      what it has read there, and when by its own clock
node 0       preflight.txt .json  when all have, or time is up: the table, and the verdict
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.preflight.node import Place, Reading, examine, own_versions
from jobs.preflight.verdict import Echo, Report, Verdict, judge
from nanoslime.run_dir import Attempt, RunDir
from nanoslime.storage.shared_files import publish, publish_json, read_json, seen

CANARY_DEADLINE_S = 30.0


class Preflight:
    """One agent's part of it."""

    def __init__(self, attempt: Attempt, place: Place) -> None:
        self._attempt = attempt
        self._place = place
        self._canary = attempt.path / "canary.json"
        self.reports = attempt.path / "preflight"
        self._echoes = attempt.path / "canary"
        # By node, when node 0 has heard its answer.
        self._heard: dict[int, float] = {}

    def is_over(self) -> bool:
        return seen(self._attempt.preflight)

    def examine(self) -> None:
        """Look at this node and tell node 0."""
        report = Report(self._place.name, examine(self._place), own_versions())
        self.reports.mkdir(exist_ok=True)
        publish_json(self._own(self.reports), asdict(report))

    def answer(self) -> bool:
        """Answer node 0's canary once it is there; whether that is done."""
        if not seen(self._canary):
            return False
        text = read_json(self._canary)["text"]
        self._echoes.mkdir(exist_ok=True)
        publish_json(self._own(self._echoes), {"text": text, "time": time.time()})
        return True

    def ask(self) -> None:
        """Of node 0: have all nodes answer."""
        publish_json(self._canary, {"text": uuid.uuid4().hex, "time": time.time()})
        self.answer()

    def have_all_answered(self) -> bool:
        num_nodes = self._place.env.num_nodes
        for node in range(num_nodes):
            if node not in self._heard and seen(self._echoes / f"{node}.json"):
                self._heard[node] = time.time()
        return len(self._heard) == num_nodes

    def conclude(self) -> Verdict:
        """The verdict on all nodes, which is published."""
        names = self._place.env.node_names
        asked = read_json(self._canary)
        echoes = {}
        for node, heard in sorted(self._heard.items()):
            answer = read_json(self._echoes / f"{node}.json")
            echoes[names[node]] = Echo(answer["text"], answer["time"], asked["time"], heard)
        reports = [_read(self.reports / f"{node}.json") for node in range(len(names))]
        verdict = judge(reports, echoes, asked["text"])
        facts = {"cause": verdict.cause, "excluded": verdict.excluded}
        publish(self._attempt.preflight.with_suffix(".txt"), f"{verdict.table}\n".encode())
        publish_json(self._attempt.preflight, facts | {"nodes": [asdict(r) for r in reports]})
        return verdict

    def _own(self, folder: Path) -> Path:
        return folder / f"{self._place.env.node_index}.json"


def _read(file: Path) -> Report:
    facts: dict[str, Any] = read_json(file)
    readings = [Reading(**reading) for reading in facts["readings"]]
    return Report(facts["name"], readings, facts["versions"])


def table(attempt: Attempt) -> str:
    """What node 0 has found; empty before."""
    return attempt.preflight.with_suffix(".txt").read_text() if seen(attempt.preflight) else ""


def excluded(run: RunDir, key: str) -> Sequence[str]:
    """The nodes that the attempts of one life of a job have found unfit."""
    found = [attempt.preflight for attempt in run.all_attempts() if attempt.key == key]
    return [name for file in found if seen(file) for name in read_json(file)["excluded"]]
