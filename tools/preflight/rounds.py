"""How the nodes of an attempt are looked at together.

every node   preflight/<i>.json   what it has found out about itself
node 0       canary.json          when all have: a file that all must see
every node   canary/<i>.json      what it has read there, and when by its own clock
node 0       preflight.txt .json  when all have, or time is up: the table, and the verdict
"""

import subprocess
import sys
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.checkout import module_command
from nanoslime.processes.logs import last_line
from nanoslime.processes.ports import free_port
from nanoslime.run_dir import Attempt
from nanoslime.storage.shared_files import publish, publish_json, read_json, seen
from nanoslime.types import MachineFailure
from tools.preflight.node import Place, Reading, examine, own_versions
from tools.preflight.verdict import Echo, Report, Verdict, judge


class Preflight:
    """One node's part of it."""

    def __init__(self, attempt: Attempt, place: Place) -> None:
        self._attempt = attempt
        self._place = place
        self._canary = attempt.path / "canary.json"
        self.reports = attempt.path / "preflight"
        self._echoes = attempt.path / "canary"
        # By node, when node 0 has heard its answer.
        self._heard: dict[int, float] = {}
        self._has_answered = False
        self._links = attempt.path / "links.json"
        self._links_result = attempt.path / "links.result.json"
        self._links_log = attempt.log("links", place.env.node_index)
        self._measuring: subprocess.Popen[bytes] | None = None

    def is_over(self) -> bool:
        return seen(self._attempt.preflight)

    def examine(self) -> None:
        """Look at this node and tell node 0."""
        place = self._place
        report = Report(place.name, examine(place), own_versions(), place.env.address)
        self.reports.mkdir(exist_ok=True)
        publish_json(self._own(self.reports), asdict(report))

    def take_part(self) -> bool:
        """Do what node 0 asks of each node; whether there is a verdict."""
        if not self._has_answered and seen(self._canary):
            text = read_json(self._canary)["text"]
            self._echoes.mkdir(exist_ok=True)
            publish_json(self._own(self._echoes), {"text": text, "time": time.time()})
            self._has_answered = True
        if self._measuring is None and seen(self._links):
            node = str(self._place.env.node_index)
            command = [
                *module_command(sys.executable, "tools.links"),
                str(self._attempt.path),
                node,
            ]
            with self._links_log.open("ab") as log:
                self._measuring = subprocess.Popen(command, stdout=log, stderr=log)
        return self.is_over()

    def ask(self) -> None:
        """Of node 0: have all nodes answer."""
        publish_json(self._canary, {"text": uuid.uuid4().hex, "time": time.time()})

    def have_all_answered(self) -> bool:
        self.take_part()
        num_nodes = self._place.env.num_nodes
        for node in range(num_nodes):
            if node not in self._heard and seen(self._echoes / f"{node}.json"):
                self._heard[node] = time.time()
        return len(self._heard) == num_nodes

    def missing(self) -> list[str]:
        """The nodes that have not told what they have found, each with its agent's log."""
        names = enumerate(self._place.env.node_names)
        told = self.reports
        silent = [(node, name) for node, name in names if not seen(told / f"{node}.json")]
        return [f"{name} (node {node}, {self.log_of(node)})" for node, name in silent]

    def log_of(self, node: int) -> Path:
        """The log of a node's agent."""
        return self._attempt.log("agent", node)

    def wants_links(self) -> bool:
        cluster = self._place.cluster
        wanted = cluster.measure_links
        if wanted is None:
            wanted = cluster.expected_gbps is not None and not self._place.env.local
        return wanted and self._place.env.num_nodes > 1

    def ask_for_links(self) -> None:
        """Of node 0: have all nodes measure their links."""
        layout = self._place.layout
        addresses = [report.address for report in self._reports()]
        facts = {
            "names": self._place.env.node_names,
            "addresses": addresses,
            "port": free_port(addresses[0]),
            "device": layout.device,
            "trainer": layout.trainers[0].node if layout.trainers else 0,
            "engines": sorted({engine.node for engine in layout.engines}),
            "expected_gbps": self._place.cluster.expected_gbps,
            "network_interface": self._place.cluster.network_interface,
        }
        self._links.with_suffix("").mkdir(exist_ok=True)
        publish_json(self._links, facts)

    def are_links_measured(self) -> bool:
        """Where one of the processes has died, the others tell of that first."""
        self.take_part()
        if self._measuring is None or self._measuring.poll() is None:
            return False
        return seen(self._links_result) or not self._silent_about_links()

    def _silent_about_links(self) -> list[str]:
        """The nodes whose process has not even told that it could not measure."""
        names = enumerate(self._place.env.node_names)
        told = self._links.with_suffix("")
        return [name for node, name in names if not seen(told / f"{node}.json")]

    def judge(self) -> Verdict:
        """The verdict on all nodes. MachineFailure where their links could not be measured."""
        names = self._place.env.node_names
        asked = read_json(self._canary)
        echoes = {}
        for node, heard in sorted(self._heard.items()):
            answer = read_json(self._echoes / f"{node}.json")
            echoes[names[node]] = Echo(answer["text"], answer["time"], asked["time"], heard)
        links = {}
        if seen(self._links):
            if not seen(self._links_result):
                silent = ", ".join(self._silent_about_links())
                raise MachineFailure(
                    "the links of the nodes could not be measured: "
                    f"{f'nothing came from {silent}; ' if silent else ''}"
                    f"{last_line(self._links_log)}; "
                    f"cluster.measure_links=false leaves that out; log: {self._links_log}"
                )
            found = read_json(self._links_result)["readings"].items()
            links = {name: Reading(**reading) for name, reading in found}
        return judge(self._reports(), echoes, asked["text"], links)

    def publish(self, verdict: Verdict) -> None:
        facts = {"cause": verdict.cause, "excluded": verdict.excluded}
        publish(self._attempt.preflight.with_suffix(".txt"), f"{verdict.table}\n".encode())
        nodes = [asdict(report) for report in self._reports()]
        publish_json(self._attempt.preflight, facts | {"nodes": nodes})

    def _reports(self) -> list[Report]:
        num_nodes = self._place.env.num_nodes
        return [_read(self.reports / f"{node}.json") for node in range(num_nodes)]

    def _own(self, folder: Path) -> Path:
        return folder / f"{self._place.env.node_index}.json"


def _read(file: Path) -> Report:
    facts: dict[str, Any] = read_json(file)
    readings = [Reading(**reading) for reading in facts["readings"]]
    return Report(**facts | {"readings": readings})
