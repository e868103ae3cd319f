"""A stand-in for the driver: it takes rollouts from workers on the nodes of Ray, whose engines make
up their tokens, and brings lost ones back as a session does, until the attempt has a file `finish`.

After each rollout `progress.json` tells how many there were, and the states of the engines.
"""

import asyncio
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nanoslime.config.load import read
from nanoslime.engine_kind import EngineKind, EngineStart
from nanoslime.orchestration.ray import cluster
from nanoslime.orchestration.ray.actors import RunOnRay
from nanoslime.orchestration.ray.workers import RayEngines
from nanoslime.orchestration.rollout_manager import Assignment
from nanoslime.rollout.admission import Limits
from nanoslime.rollout.producer import Producer, Recipe, Serving
from nanoslime.rollout.tasks import GroupTask, Sampling
from nanoslime.run_dir import DONE
from nanoslime.storage.shared_files import publish_json
from nanoslime.types import Generation, Prompt, Status
from nanoslime.weight_sync.engine_pool import EnginePool
from tests.jobs.driver_place import parse_place


@dataclass(frozen=True)
class MadeUp:
    """An engine without a process; it is the same wherever it is sent."""

    name: str

    async def generate(self, request: Any) -> list[Generation]:
        await asyncio.sleep(0.2)
        tokens = [5, 6]
        return [Generation(tokens, [-1.0] * 2, Status.COMPLETED, [(0, 0)])] * request.n

    def health(self) -> bool:
        return True

    def interrupt(self) -> None: ...


class Owner:
    def __init__(self, start: EngineStart):
        self._name = f"made-up-{start.index}"

    def start(self, deadline_s: float) -> MadeUp:
        return MadeUp(self._name)

    def close(self) -> None: ...


class Kind(EngineKind):
    name = "made_up"
    title = "made up"
    takes_slots = True
    transports = ("disk",)
    owner = "tests.orchestration.node_loss_driver:Owner"


class Prompts:
    position = 0

    def next(self, n: int) -> list[Prompt]:
        numbers = range(self.position, self.position + n)
        self.position += n
        return [Prompt(i, np.array([5, 6, 7], np.int32), "p", "l") for i in numbers]


def main() -> int:
    attempt, _ = parse_place()
    config = read(attempt.run.config)
    layout = attempt.layout
    cluster.connect(json.loads(attempt.head.read_text()), layout.num_nodes, 60)
    servers = RayEngines(RunOnRay(config, attempt, Path(config.model.hf_checkpoint)), layout)
    servers.start()
    engines = servers.wait()
    restarts = [partial(servers.restart, index) for index in range(len(engines))]
    workers = servers.open_workers(engines)
    home = dict(zip([e.name for e in engines], servers.workers_by_engine, strict=True))
    pool = EnginePool(engines, restarts, max_restarts=3)
    assignment = Assignment(workers, home)
    pool.subscribe(assignment.set_engines, assignment.drain)
    pool.serve()
    sampling = Sampling.of(config.rollout)

    def make_task(prompt: Prompt, group_id: int) -> GroupTask:
        return GroupTask(group_id, prompt, sampling, seed=group_id, reward=config.data.reward)

    producer = Producer(
        Limits(batch=4, max_staleness=0, num_rollouts=100_000),
        Recipe(make_task, lambda group: True, has_versions=False),
        Prompts(),
        Serving(workers, pool.lost, lambda: pool.service(pool.serve)),
    )
    seen: set[int] = set()
    step = 0
    while not (attempt.path / "finish").exists():
        rollout = producer.take(step)
        numbers = {group.group_id for group in rollout.groups}
        assert len(numbers) == 4 and not numbers & seen
        seen |= numbers
        made_by = {sample.arrays.worker for group in rollout.groups for sample in group.samples}
        producer.finish(step, rollout.groups)
        step += 1
        states = [str(state) for state in pool.states()]
        publish_json(
            attempt.path / "progress.json",
            {"steps": step, "states": states, "workers": sorted(made_by), "time": time.time()},
        )
    assert seen == set(range(len(seen)))
    producer.close()
    pool.close()
    servers.close()
    cluster.disconnect()
    return DONE


if __name__ == "__main__":
    sys.exit(main())
