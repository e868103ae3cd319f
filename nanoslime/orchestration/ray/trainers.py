"""The trainer ranks as actors, and how the arrays of samples come to them from rollout workers.

    plans of a DP rank -> one call of each worker that keeps some -> one object of Ray for each
                       -> fetched by every rank of that DP rank, past the driver

A sample is not an object of its own: one costs Ray about a millisecond of processor time, in
the worker, in the raylets of both nodes and in each process that has a reference.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from nanoslime.batch import BatchPlan
from nanoslime.failures import summary, told_in_one_line
from nanoslime.layout import Layout
from nanoslime.orchestration.groups import TrainGroup
from nanoslime.orchestration.rank_environment import flight_recorder_files
from nanoslime.orchestration.ray.actors import ActorPlace, Actors, ActorSetup, RunOnRay
from nanoslime.orchestration.worker import TrainWorker
from nanoslime.processes.phases import IDLE, own_report
from nanoslime.processes.ports import free_port
from nanoslime.run_dir import RunDir
from nanoslime.training.backend import RankEnv
from nanoslime.training.batching import kept_arrays
from nanoslime.types import KeptArrays, MachineFailure, SampleArrays

logger = logging.getLogger(__name__)


# Ray notices within a second that a worker is dead. One that hangs it would wait for without
# an end.
_FETCH_S = 300.0
# What has come is there at once.
_AT_HAND_S = 1.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """Arrays that a rollout worker was asked for; `ref` becomes a list of SampleArrays, in the
    order of `kept`.
    """

    kept: list[KeptArrays]
    ref: ray.ObjectRef


def order(kept: Sequence[KeptArrays], workers: Sequence[Any]) -> list[Delivery]:
    """Asks the worker actors, which are in the order of their numbers; waits for none."""
    by_worker: dict[int, list[KeptArrays]] = {}
    for one in kept:
        by_worker.setdefault(one.worker, []).append(one)
    return [
        Delivery(own, workers[number].call_worker.remote("arrays", own))
        for number, own in by_worker.items()
    ]


def receive(deliveries: Sequence[Delivery]) -> dict[KeptArrays, SampleArrays]:
    """Waits for these deliveries. Raises RunError that names the worker of one that fails."""
    refs = [delivery.ref for delivery in deliveries]
    if refs:
        # They come to this node side by side.
        ray.wait(refs, num_returns=len(refs), timeout=_FETCH_S)
    found: dict[KeptArrays, SampleArrays] = {}
    for delivery in deliveries:
        try:
            arrays = ray.get(delivery.ref, timeout=_AT_HAND_S)
        except RayError as e:
            worker = delivery.kept[0].worker
            raise MachineFailure(
                f"the arrays of {len(delivery.kept)} samples by rollout worker {worker} cannot be "
                f"fetched, because its process has died or hangs, or its object store is gone: "
                f"{summary(e)}; what has become of it is in its log, and --resume goes on from "
                "the last checkpoint"
            ) from e
        found.update(zip(delivery.kept, arrays, strict=True))
    return found


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Where a trainer rank was put."""

    address: str
    port: int  # one that was free a moment ago
    gpu_ids: list[str]  # the node's numbers, or UUIDs, of the GPUs that Ray gave


@ray.remote
class RankActor:
    """One trainer rank. `place` comes before `setup`: rank 0 listens where it said."""

    def __init__(self, setup: ActorSetup):
        setup.enter()
        self._setup = setup
        self._worker: TrainWorker | None = None

    def place(self) -> RankPlace:
        address = ray.util.get_node_ip_address()
        gpu_ids = [str(gpu_id) for gpu_id in ray.get_gpu_ids()]
        with told_in_one_line(logger, "choose a port"):
            return RankPlace(address, free_port(address), gpu_ids)

    def setup(self, world_size: int, meeting: RankPlace, run: RunDir) -> tuple[int, int]:
        """Builds the worker; returns (dp_rank, dp_size)."""
        setup = self._setup
        os.environ.update(flight_recorder_files(os.environ, setup.log.parent))
        env = RankEnv(
            rank=setup.index,
            world_size=world_size,
            local_rank=0,
            device=setup.device,
            init_method=f"tcp://{meeting.address}:{meeting.port}",
        )
        address = ray.util.get_node_ip_address()
        logger.info(
            "trainer rank %d of %d on %s, pid %d", env.rank, world_size, address, os.getpid()
        )
        with told_in_one_line(logger, "load the model"):
            self._worker = TrainWorker(setup.config, setup.model_dir, env, run)
        return self._worker.dp_rank, self._worker.dp_size

    def call(self, method: str, *args: Any) -> Any:
        """A collective method of TrainWorker, by name."""
        name = f"trainer rank {self._setup.index}"
        own_report().enter(name, method)
        with told_in_one_line(logger, method):
            result = getattr(self._worker, method)(*args)
        own_report().enter(name, IDLE)
        return result


class RayTrainGroup(TrainGroup):
    """Construction begins to reserve the ranks' places; `setup` builds their models.

    `workers` are the actors of the rollout workers, in the order of their numbers.
    """

    def __init__(self, run: RunOnRay, layout: Layout, workers: Sequence[Any] = ()):
        super().__init__(run.config, run.attempt.run, run.model_dir, len(layout.trainers))
        places = [ActorPlace(place.rank, place.node, num_slots=1) for place in layout.trainers]
        self._ranks = Actors(RankActor, "trainer rank", "trainer", places, run)
        self._placing = self._ranks.start_on_each("place")
        self._dp_ranks: list[int] = []
        self._workers = workers

    def wait_for_places(self) -> None:
        found: list[RankPlace] = self._ranks.gather(self._placing, "start", self._deadlines.start)
        self.address = found[0].address
        self.gpu_ids = [gpu_id for place in found for gpu_id in place.gpu_ids]

    def setup(self) -> None:
        # A port is chosen only now: engines have taken some since the ranks were placed.
        first = self._ranks.actors[0].place.remote()
        [meeting] = self._ranks.gather([first], "choose a port", self._deadlines.start)
        world_size = len(self._ranks.actors)
        refs = self._ranks.start_on_each("setup", world_size, meeting, self.run)
        found = self._ranks.gather(refs, "load the model", self._deadlines.start)
        self._dp_ranks = [dp_rank for dp_rank, _ in found]
        self.dp_size = found[0][1]

    def _train(self, shards: list[list[BatchPlan]]) -> dict[str, float]:
        plans = [ray.put(of_dp_rank) for of_dp_rank in shards]
        fetches = [
            partial(receive, order(kept_arrays(of_dp_rank), self._workers)) for of_dp_rank in shards
        ]
        refs = [
            actor.call.remote("train_plans", plans[dp_rank], fetches[dp_rank])
            for actor, dp_rank in zip(self._ranks.actors, self._dp_ranks, strict=True)
        ]
        return self._ranks.gather(refs, "train", self._deadlines.train)[0]

    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> Any:
        refs = self._ranks.start_on_each("call", method, *args)
        return self._ranks.gather(refs, what, self._deadline(deadline_s))

    def close(self) -> None:
        self._ranks.kill()
