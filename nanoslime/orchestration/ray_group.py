"""Trainer ranks and engines are Ray actors on the nodes that the plan names. No other
file imports ray.

    driver (node 0) ── RayTrainGroup ── one RankActor for each trainer rank
                    └─ RayEngines ───── one EngineActor for each engine; it owns a server

Batches travel as one Ray object for each data-parallel rank. An actor that dies ends
the run: RunError says its name, node and log.
"""

import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from nanoslime.batch import BatchPlan
from nanoslime.config import RunConfig
from nanoslime.config.deadlines import Deadline
from nanoslime.engine_kind import EngineOwner, EngineStart, engine_kind
from nanoslime.failures import summary, told_in_one_line
from nanoslime.layout import Layout
from nanoslime.orchestration.groups import TrainGroup
from nanoslime.orchestration.rank_environment import (
    interface_names,
    interface_of,
    nccl_defaults,
    num_threads,
)
from nanoslime.orchestration.worker import TrainWorker
from nanoslime.processes.logs import FORMAT, set_level
from nanoslime.processes.ports import free_port
from nanoslime.run_dir import Attempt, RunDir
from nanoslime.training.backend import RankEnv
from nanoslime.types import Engine, RunError

logger = logging.getLogger(__name__)
NODE_LABEL = "nanoslime-node"
# The Ray resource that stands for a GPU on nodes that have none.
SLOT = "slot"
# What an actor writes of its environment into its log.
REPORTED = (
    "OMP_NUM_THREADS",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "NCCL_CUMEM_ENABLE",
    "NCCL_NVLS_ENABLE",
)


def connect(head: dict[str, Any], num_nodes: int, deadline_s: float) -> None:
    """Connects to the cluster of the node agents; waits until every node has joined."""
    _init(address=head["ray_address"], _node_ip_address=head["node_ip"])
    end = time.monotonic() + deadline_s
    while len(joined := _joined_nodes()) < num_nodes:
        if time.monotonic() > end:
            missing = [node for node in range(num_nodes) if str(node) not in joined]
            raise RunError(
                f"nodes {missing} are not in the Ray cluster at {head['ray_address']} "
                f"after {deadline_s:.0f}s"
            )
        time.sleep(0.2)


def _joined_nodes() -> set[str]:
    """The plan's numbers of the nodes that are alive in the cluster."""
    return {node["Labels"].get(NODE_LABEL) for node in ray.nodes() if node["Alive"]}


def start_local(num_slots: int, device: str) -> None:
    """Starts a Ray of this process's own, with one node, which is node 0 of the plan.

    `python -m nanoslime.train --num-gpus N` runs on it.
    """
    # Ray reads this. The cluster listens on loopback and ends with this process.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    _init(
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        labels={NODE_LABEL: "0"},
        num_cpus=max(2, num_slots),
        **_slots(num_slots, device),
    )


def _init(**options: Any) -> None:
    ray.init(logging_level=logging.WARNING, log_to_driver=False, namespace="nanoslime", **options)


def disconnect() -> None:
    ray.shutdown()


def _slots(num: int, device: str) -> dict[str, Any]:
    """Ray's options that reserve so many GPUs, or CPU slots."""
    if device == "cuda":
        return {"num_gpus": num}
    return {"resources": {SLOT: num}}


def _log_to(path: Path, level: str) -> None:
    """Sends this actor process's output to its own log of the attempt."""
    with path.open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    logging.basicConfig(format=FORMAT, stream=sys.stderr, force=True)
    set_level(level)


@dataclass(frozen=True, slots=True)
class ActorSetup:
    """What an actor process is told when it starts."""

    index: int  # the rank of a trainer, the number of an engine
    config: RunConfig
    model_dir: Path
    device: Literal["cpu", "cuda"]
    log: Path
    users_threads: str | None  # the job's OMP_NUM_THREADS; Ray sets that of an actor
    num_neighbours: int  # actors of its kind on its machine, itself included

    def enter_environment(self) -> None:
        """Sets what NCCL, gloo and torch read in this process."""
        address = ray.util.get_node_ip_address()
        interface = self.config.cluster.network_interface
        interface = interface or interface_of(address, ipv4_addresses())
        os.environ.update(interface_names(os.environ, interface))
        if self.device == "cuda":
            os.environ.update(nccl_defaults(os.environ, self.config.rollout.sglang))
        cores = len(os.sched_getaffinity(0))
        threads = num_threads(self.users_threads, cores, self.num_neighbours)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
        shown = {name: os.environ[name] for name in REPORTED if name in os.environ}
        logger.info("environment: %s", shown)


def ipv4_addresses() -> dict[str, list[str]]:
    """The IPv4 addresses of each interface of this machine."""
    return {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
    }


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
        _log_to(setup.log, setup.config.log_level)
        setup.enter_environment()
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
        with told_in_one_line(logger, method):
            return getattr(self._worker, method)(*args)


@ray.remote
class EngineActor:
    """The owner of one engine on its node."""

    def __init__(self, setup: ActorSetup):
        _log_to(setup.log, setup.config.log_level)
        setup.enter_environment()
        self._setup = setup
        self._owner: EngineOwner | None = None

    def start(self, deadline_s: float, gpu_ids: list[str] | None) -> Engine:
        """Starts it on the GPUs of `gpu_ids`; None stands for those that Ray gave."""
        setup = self._setup
        if gpu_ids is None:
            gpu_ids = [str(gpu_id) for gpu_id in ray.get_gpu_ids()]
        kind = engine_kind(setup.config.rollout)
        start = EngineStart(
            config=setup.config,
            index=setup.index,
            model_dir=setup.model_dir,
            device=setup.device,
            host=ray.util.get_node_ip_address(),
            log=setup.log.with_name(f"{kind.name}-{setup.index}.log"),
            gpu_ids=gpu_ids,
        )
        with told_in_one_line(logger, "start the engine"):
            self._owner = kind.make_owner(start)
            return self._owner.start(deadline_s)

    def close(self) -> None:
        if self._owner is not None:
            self._owner.close()


@dataclass(frozen=True, slots=True)
class ActorPlace:
    """Where the plan puts an actor."""

    index: int
    node: int
    num_slots: int  # of the node's GPUs or CPU slots


class _Actors:
    """One actor for each place, on just the node that the plan names.

    Their results are waited for together, with a deadline and a name for whoever fails.
    """

    def __init__(
        self,
        actor_class: Any,
        role: str,
        places: Sequence[ActorPlace],
        attempt: Attempt,
        config: RunConfig,
        model_dir: Path,
    ):
        """Errors name actors by `role`; its first word names them in Ray, and their logs."""
        device = config.cluster.device
        places_by_node = Counter(place.node for place in places)
        short_role = role.split()[0]
        self.actors: list[Any] = []
        self._names: list[str] = []
        self._logs: list[Path] = []
        for place in places:
            log = attempt.log(short_role, place.index)
            options = actor_class.options(
                name=f"{short_role}-{place.index}",
                num_cpus=0,
                max_restarts=0,
                label_selector={NODE_LABEL: str(place.node)},
                **_slots(place.num_slots, device),
            )
            setup = ActorSetup(
                index=place.index,
                config=config,
                model_dir=model_dir,
                device=device,
                log=log,
                users_threads=os.environ.get("OMP_NUM_THREADS"),
                # The nodes of a rehearsal are one machine.
                num_neighbours=places_by_node[place.node] if device == "cuda" else len(places),
            )
            self.actors.append(options.remote(setup))
            self._names.append(f"{role} {place.index} on node {place.node}")
            self._logs.append(log)

    def start_on_each(self, method: str, *args: Any) -> list[Any]:
        """Starts the call on every actor; `gather` waits for the results."""
        return [getattr(actor, method).remote(*args) for actor in self.actors]

    def kill(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def gather(self, refs: list[Any], what: str, deadline: Deadline) -> list[Any]:
        """Waits for one result of each actor; returns the results in order.

        Raises RunError as soon as one actor fails or dies, or at the deadline. `what`
        says in errors what the actors were asked to do.
        """
        actor_of = {ref: i for i, ref in enumerate(refs)}
        pending = list(refs)
        end = time.monotonic() + deadline.seconds
        while pending:
            time_left_s = max(0.0, end - time.monotonic())
            ready, pending = ray.wait(pending, num_returns=1, timeout=time_left_s)
            if not ready:
                late = [actor_of[ref] for ref in pending]
                names = ", ".join(self._names[i] for i in late)
                raise RunError(
                    f"{names} did not {what} within {deadline} seconds; log: {self._logs[late[0]]}"
                )
            self._check(actor_of[ready[0]], ready[0], what)
        return ray.get(refs)

    def _check(self, i: int, ref: Any, what: str) -> None:
        """Raises RunError where the finished call `ref` of actor `i` has failed."""
        try:
            ray.get(ref)
        except RayActorError as e:
            if e.actor_init_failed:  # before it had a log; the cause comes last
                reason = str(e).splitlines()[-1]
                raise RunError(f"{self._names[i]} failed to start: {reason}") from e
            raise self._died(i, what) from e
        except RayError as e:
            dead = self._first_dead()  # a death breaks the collectives of all other ranks
            if dead is not None:
                raise self._died(dead, what) from e
            # The actor has told its own log and us in one line.
            raise RunError(
                f"{self._names[i]} failed to {what}: {summary(e)}; log: {self._logs[i]}"
            ) from None

    def _died(self, i: int, what: str) -> RunError:
        return RunError(f"{self._names[i]} died while asked to {what}; log: {self._logs[i]}")

    def _first_dead(self) -> int | None:
        """Asks all actors and returns the first dead one; news may take two seconds."""
        pings = self.start_on_each("__ray_ready__")
        ray.wait(pings, num_returns=len(pings), timeout=2.0)
        for i, ping in enumerate(pings):
            try:
                ray.get(ping, timeout=0)
            except RayActorError:
                return i
            except (GetTimeoutError, RayError):
                continue
        return None


class RayTrainGroup(TrainGroup):
    """Construction reserves the ranks' places; `setup` builds their models."""

    def __init__(self, config: RunConfig, attempt: Attempt, layout: Layout, model_dir: Path):
        super().__init__(config, attempt.run, model_dir, len(layout.trainers))
        places = [ActorPlace(place.rank, place.node, num_slots=1) for place in layout.trainers]
        self._ranks = _Actors(RankActor, "trainer rank", places, attempt, config, model_dir)
        found: list[RankPlace] = self._ranks.gather(
            self._ranks.start_on_each("place"), "start", self._deadlines.start
        )
        self.address = found[0].address
        self.gpu_ids = [gpu_id for place in found for gpu_id in place.gpu_ids]
        self._dp_ranks: list[int] = []

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
        stored = [ray.put(of_dp_rank) for of_dp_rank in shards]
        refs = [
            actor.call.remote("train_plans", stored[dp_rank])
            for actor, dp_rank in zip(self._ranks.actors, self._dp_ranks, strict=True)
        ]
        return self._ranks.gather(refs, "train", self._deadlines.train)[0]

    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> Any:
        refs = self._ranks.start_on_each("call", method, *args)
        return self._ranks.gather(refs, what, self._deadline(deadline_s))

    def close(self) -> None:
        self._ranks.kill()


class RayEngines:
    """The engine servers of a run. `start` starts them side by side; `wait` returns their
    clients once all are up.
    """

    def __init__(self, config: RunConfig, attempt: Attempt, layout: Layout, model_dir: Path):
        self._layout = layout
        self._deadline = Deadline(config.rollout.start_deadline_s, "rollout.start_deadline_s")
        self._title = engine_kind(config.rollout).title
        self._starting: list[Any] = []
        # Colocated, the trainers hold the slots.
        places = [
            ActorPlace(place.index, place.node, 0 if config.cluster.colocate else len(place.slots))
            for place in layout.engines
        ]
        self._actors = _Actors(EngineActor, "engine", places, attempt, config, model_dir)

    def start(self, gpus_by_rank: Sequence[str] = ()) -> None:
        """Starts every server. `gpus_by_rank` are the trainers' GPUs, where the engines
        share them; without it the engines have their own.
        """
        for actor, place in zip(self._actors.actors, self._layout.engines, strict=True):
            gpu_ids = None
            if gpus_by_rank:
                gpu_ids = [gpus_by_rank[rank] for rank in self._layout.ranks_at(place)]
            self._starting.append(actor.start.remote(self._deadline.seconds, gpu_ids))

    def wait(self) -> list[Engine]:
        what = f"start its {self._title} server"
        # An engine that is late says so itself.
        deadline = replace(self._deadline, seconds=self._deadline.seconds + 30)
        return self._actors.gather(self._starting, what, deadline)

    def close(self) -> None:
        refs = self._actors.start_on_each("close")
        ray.wait(refs, num_returns=len(refs), timeout=20)
        self._actors.kill()
