"""A node with engines is lost as a whole, and comes back: with agents, Ray and rollout workers as
they are, engines that make up their tokens, and no trainer.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.checkout import ROOT
from nanoslime.config.load import load
from nanoslime.layout import EnginePlace, Layout, TrainerPlace
from nanoslime.models.parallel_sizes import ParallelDims
from nanoslime.run_dir import DONE, Attempt, RunDir
from tests import process_table

pytestmark = [pytest.mark.ray, pytest.mark.matrix, pytest.mark.timeout(300)]


class Nodes:
    """The agents of an attempt on three simulated nodes, the last two with an engine."""

    def __init__(self, root: Path, model: Path):
        self.run = RunDir.create(root, "run")
        flags = ["--nodes", "3", "--hf-checkpoint", str(model), "--cluster.hang-factor", "3"]
        flags += ["--engine", "tests.orchestration.node_loss_driver:Kind", "--n-samples-per-prompt"]
        flags += ["2", "--reward", "tests.orchestration.rewards:always_one"]
        config = load(None, None, flags)
        layout = Layout(
            num_nodes=3,
            slots_per_node=1,
            device="cpu",
            backend="megatron",
            parallel=ParallelDims(tp=1, pp=1, cp=1, ep=1, dp=1),
            trainers=(TrainerPlace(0, 0, 0),),
            engines=(EnginePlace(0, 1, (0,)), EnginePlace(1, 2, (0,))),
        )
        self.run.write_config(config, layout)
        self.attempt: Attempt = self.run.new_attempt(f"l{os.getpid()}-0")
        self.agents = [self.start(node) for node in range(3)]

    def start(self, node: int) -> subprocess.Popen[bytes]:
        driver = f"{sys.executable} -m tests.orchestration.node_loss_driver"
        command = [sys.executable, "-m", "jobs.node", str(self.run.path), "--attempt", "1"]
        command += ["--local-node", str(node), "--driver", driver]
        with self.attempt.log("agent", node).open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    def power_cut(self, node: int) -> None:
        agent = self.agents[node]
        family = process_table.descendants(agent.pid, process_table.all_processes())
        # The agent comes first, or it would tell the others.
        agent.kill()
        agent.wait()
        for process in family:
            os.kill(process.pid, signal.SIGKILL)

    @property
    def progress(self) -> dict[str, Any]:
        file = self.attempt.path / "progress.json"
        return json.loads(file.read_text()) if file.exists() else {"steps": 0, "states": []}

    def wait_for(self, what: str, condition: Any, timeout_s: float = 60.0) -> None:
        def holds_or_ended() -> bool:
            return condition() or self.attempt.ended() is not None

        in_time = process_table.wait_for(holds_or_ended, timeout_s)
        logs = sorted((self.attempt.path / "logs").glob("*.log"))
        tails = "\n".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in logs)
        assert in_time and condition(), f"{what}: {self.attempt.ended()} {self.progress}\n{tails}"

    def wait_for_steps(self, num_more: int) -> None:
        goal = self.progress["steps"] + num_more
        self.wait_for(f"step {goal}", lambda: self.progress["steps"] >= goal)


@pytest.fixture
def nodes(no_leftovers: None, tmp_path: Path, tiny_model: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path, tiny_model)
    yield made
    for agent in made.agents:
        agent.terminate()
    for agent in made.agents:
        agent.wait(60)


def test_a_run_goes_on_without_a_lost_engine_node_or_worker_and_takes_it_back(nodes: Nodes) -> None:
    nodes.wait_for("the first rollouts", lambda: nodes.progress["steps"] >= 2, timeout_s=150)
    assert nodes.progress["states"] == ["ready", "ready"]

    def are_regular() -> bool:
        beats = nodes.attempt.heartbeats()
        return all(beats[str(node)]["count"] >= 4 for node in range(3))

    nodes.wait_for("regular heartbeats", are_regular)
    nodes.power_cut(2)
    nodes.wait_for("the loss", lambda: nodes.progress["states"] == ["ready", "starting"])
    nodes.wait_for_steps(3)
    assert nodes.progress["workers"] == [0]
    nodes.wait_for("the agents' word", nodes.attempt.lost(2).exists)
    nodes.agents[2] = nodes.start(2)
    nodes.wait_for("its return", lambda: nodes.progress["states"] == ["ready", "ready"])
    nodes.wait_for("its rollouts", lambda: nodes.progress["workers"] == [0, 1])
    assert not nodes.attempt.lost(2).exists()

    def pids() -> list[str]:
        return re.findall(
            r"rollout worker 0, pid (\d+)", nodes.attempt.log("worker", 0).read_text()
        )

    os.kill(int(pids()[-1]), signal.SIGKILL)
    nodes.wait_for("the other loss", lambda: nodes.progress["states"] == ["starting", "ready"])
    nodes.wait_for("the other return", lambda: nodes.progress["workers"] == [0, 1])
    assert len(pids()) == 2
    (nodes.attempt.path / "finish").touch()
    assert [agent.wait(60) for agent in nodes.agents] == [DONE, DONE, DONE]
    assert nodes.attempt.ended() == (DONE, "")
