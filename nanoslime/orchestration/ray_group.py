"""Trainer ranks and engines as Ray actors on the node that the plan names. The only file that imports ray.

    driver (node 0) ── RayTrainGroup ── one RankActor per trainer rank, on the node of the plan
                    └─ RayEngines ───── one EngineActor per engine, each the owner of one server

Batches travel as one Ray object per data-parallel rank. Whoever dies ends the run: RunError says its name,
node and log.
"""

import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from nanoslime.batch import TrainBatch
from nanoslime.config import RunConfig
from nanoslime.engine_kind import EngineOwner, EngineStart, engine_kind
from nanoslime.layout import Layout
from nanoslime.orchestration.groups import TrainGroup
from nanoslime.orchestration.worker import TrainWorker
from nanoslime.processes.ports import free_port
from nanoslime.run_dir import Attempt
from nanoslime.training.backend import RankEnv
from nanoslime.types import Engine, RunError

logger = logging.getLogger(__name__)
NODE_LABEL = "nanoslime-node"
SLOT = "slot"  # the Ray resource that stands for a GPU on nodes that have none


def connect(head: dict[str, Any], num_nodes: int, deadline_s: float) -> None:
    """Connects the driver to the cluster that the node agents started; waits until every node has joined."""
    _init(address=head["ray_address"], _node_ip_address=head["node_ip"])
    end = time.monotonic() + deadline_s
    while (
        len(labels := {n["Labels"].get(NODE_LABEL) for n in ray.nodes() if n["Alive"]}) < num_nodes
    ):
        if time.monotonic() > end:
            missing = [i for i in range(num_nodes) if str(i) not in labels]
            cluster = f"the Ray cluster at {head['ray_address']}"
            raise RunError(f"nodes {missing} are not in {cluster} after {deadline_s:.0f}s")
        time.sleep(0.2)


def start_local(num_slots: int, device: str) -> None:
    """A Ray of this process's own, with one node (node 0), for `python -m nanoslime.train --num-gpus N`."""
    # Ray's own switch: a cluster on loopback that ends with this process
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    node = {"labels": {NODE_LABEL: "0"}, "num_cpus": max(2, num_slots), **_slots(num_slots, device)}
    _init(_node_ip_address="127.0.0.1", include_dashboard=False, **node)


def _init(**options: Any) -> None:
    ray.init(logging_level=logging.WARNING, log_to_driver=False, namespace="nanoslime", **options)


disconnect = ray.shutdown


def _slots(num: int, device: str) -> dict[str, Any]:
    """Ray's options for so many GPUs, or CPU slots."""
    return {"num_gpus": num} if device == "cuda" else {"resources": {SLOT: num}}


def _log_to(path: Path) -> None:
    """Sends this actor process's output to its own log of the attempt."""
    with path.open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=line, stream=sys.stderr, force=True)


@ray.remote
class RankActor:
    """One trainer rank. `setup` follows a `place` of rank 0, which then listens at the port found there."""

    def __init__(self, rank: int, config: RunConfig, model_dir: Path, device: str, log: Path):
        _log_to(log)
        self._rank, self._config, self._model_dir, self._device = rank, config, model_dir, device

    def place(self) -> tuple[tuple[str, int], list[int]]:
        """An address to meet at, and the node's numbers of the GPUs that Ray gave."""
        ip = ray.util.get_node_ip_address()
        return (ip, free_port(ip)), [int(i) for i in ray.get_gpu_ids()]

    def setup(self, world_size: int, meet: tuple[str, int], skipped_dir: Path) -> tuple[int, int]:
        """Builds the worker; returns (dp_rank, dp_size)."""
        env = RankEnv(self._rank, world_size, 0, self._device, f"tcp://{meet[0]}:{meet[1]}")
        here = ray.util.get_node_ip_address()
        logger.info(
            "trainer rank %d of %d on %s, pid %d", self._rank, world_size, here, os.getpid()
        )
        self._worker = TrainWorker(self._config, self._model_dir, env, skipped_dir)
        return self._worker.dp_rank, self._worker.dp_size

    def call(self, method: str, *args: Any) -> Any:
        """A collective method of TrainWorker, by name."""
        return getattr(self._worker, method)(*args)


@ray.remote
class EngineActor:
    """The owner of one engine on its node."""

    def __init__(self, index: int, config: RunConfig, model_dir: Path, device: str, log: Path):
        _log_to(log)
        self._kind = engine_kind(config.rollout)
        self._owner: EngineOwner | None = None
        self._start = EngineStart(
            config=config,
            index=index,
            model_dir=model_dir,
            device=device,
            host=ray.util.get_node_ip_address(),
            log=log.with_name(f"{self._kind.name}-{index}.log"),
        )

    def start(self, deadline_s: float, gpu_ids: list[int] | None) -> Engine:
        """`gpu_ids`: of the trainers that it shares them with; None: those that Ray gave."""
        if gpu_ids is None:
            gpu_ids = [int(i) for i in ray.get_gpu_ids()]
        self._owner = self._kind.make_owner(replace(self._start, gpu_ids=gpu_ids))
        return self._owner.start(deadline_s)

    def close(self) -> None:
        if self._owner is not None:
            self._owner.close()


class _Actors:
    """One actor per place (number, node of the plan, how many of its GPUs or CPU slots), on just that node.

    Their results are waited for together, with a deadline and a name for whoever fails.
    """

    def __init__(
        self,
        cls: Any,
        role: str,
        places: list[tuple[int, int, int]],
        config: RunConfig,
        attempt: Attempt,
        layout: Layout,
        model_dir: Path,
    ):
        kind, interface = role.split()[0], config.cluster.network_interface
        env = (
            {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
        )
        self._names = [f"{role} {i} on node {node}" for i, node, _ in places]
        self._logs = [attempt.log(kind, i) for i, _, _ in places]
        self.actors = [
            cls.options(
                name=f"{kind}-{i}",
                num_cpus=0,
                max_restarts=0,
                label_selector={NODE_LABEL: str(node)},
                runtime_env={"env_vars": env},
                **_slots(num_slots, layout.device),
            ).remote(i, config, model_dir, layout.device, log)
            for (i, node, num_slots), log in zip(places, self._logs, strict=True)
        ]

    def each(self, method: str, *args: Any) -> list[Any]:
        return [getattr(actor, method).remote(*args) for actor in self.actors]

    def kill(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def gather(self, refs: list[Any], what: str, deadline_s: float) -> list[Any]:
        """Results in order. Raises RunError as soon as one actor fails or dies, or at the deadline."""
        pending, end = list(refs), time.monotonic() + deadline_s
        while pending:
            ready, pending = ray.wait(
                pending, num_returns=1, timeout=max(0.0, end - time.monotonic())
            )
            if not ready:
                late = [refs.index(ref) for ref in pending]
                names = ", ".join(self._names[i] for i in late)
                raise RunError(
                    f"{names} did not {what} within {deadline_s:.0f}s; log: {self._logs[late[0]]}"
                )
            self._check(refs.index(ready[0]), ready[0], what)
        return ray.get(refs)

    def _check(self, i: int, ref: Any, what: str) -> None:
        try:
            ray.get(ref)
        except (RayTaskError, RayActorError) as e:
            failed = isinstance(e, RayTaskError)
            dead = (
                self._first_dead() if failed else i
            )  # the others' broken collectives follow from a death
            if dead is not None:
                died = f"{self._names[dead]} died while asked to {what}"
                raise RunError(f"{died}; log: {self._logs[dead]}") from e
            cause = e.cause if isinstance(e.cause, Exception) else e
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[-1]
            raise RunError(
                f"{self._names[i]} failed to {what}: {reason}; log: {self._logs[i]}"
            ) from e

    def _first_dead(self) -> int | None:
        """Which actor is dead, if one is: all are asked, with two seconds for news of a death to arrive."""
        pings = self.each("__ray_ready__")
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
    def __init__(
        self, config: RunConfig, attempt: Attempt, layout: Layout, model_dir: Path, transport: str
    ):
        super().__init__(config, attempt.run, model_dir, transport)
        places, deadline_s = (
            [(p.rank, p.node, 1) for p in layout.trainers],
            config.training.start_deadline_s,
        )
        self._ranks = _Actors(RankActor, "trainer rank", places, config, attempt, layout, model_dir)
        found = self._ranks.gather(self._ranks.each("place"), "start", deadline_s)
        self.address: str = found[0][0][0]  # of rank 0
        self.gpu_ids = [gpu for _, gpus in found for gpu in gpus]  # by rank; none on a CPU
        self._deadline_s = config.training.collective_deadline_s

    def setup(self) -> None:
        """Builds the ranks' models; before it they are processes that hold a place."""
        first = [self._ranks.actors[0].place.remote()]  # again: engines have taken ports meanwhile
        [(meet, _)] = self._ranks.gather(first, "choose a port", self._deadline_s)
        refs = self._ranks.each("setup", len(self._ranks.actors), meet, self.run.skipped)
        dp = self._ranks.gather(refs, "load the model", self.config.training.start_deadline_s)
        self._dp_ranks, self.dp_size = [rank for rank, _ in dp], dp[0][1]

    def _train(self, shards: list[list[TrainBatch]]) -> dict[str, float]:
        stored = [ray.put(of_rank) for of_rank in shards]
        pairs = zip(self._ranks.actors, self._dp_ranks, strict=True)
        refs = [actor.call.remote("train", stored[dp_rank]) for actor, dp_rank in pairs]
        return self._ranks.gather(refs, "train", self._deadline_s)[0]

    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> None:
        self._ranks.gather(
            self._ranks.each("call", method, *args), what, deadline_s or self._deadline_s
        )

    def close(self) -> None:
        self._ranks.kill()


class RayEngines:
    """The engine servers of a run; `start` starts them side by side, `wait` gives their clients once up."""

    def __init__(self, config: RunConfig, attempt: Attempt, layout: Layout, model_dir: Path):
        self._layout, shared = layout, config.cluster.colocate  # then the trainers hold the slots
        places = [(p.index, p.node, 0 if shared else len(p.slots)) for p in layout.engines]
        self._actors = _Actors(EngineActor, "engine", places, config, attempt, layout, model_dir)
        self._deadline_s = config.rollout.start_deadline_s
        self._title = engine_kind(config.rollout).title
        self._starting: list[Any] = []

    def start(self, gpus_by_rank: Sequence[int] | None = None) -> None:
        """`gpus_by_rank`: of the trainers, where engines share theirs; none: the engines have their own."""
        for actor, place in zip(self._actors.actors, self._layout.engines, strict=True):
            gpus = (
                [gpus_by_rank[rank] for rank in self._layout.ranks_at(place)]
                if gpus_by_rank
                else None
            )
            self._starting.append(actor.start.remote(self._deadline_s, gpus))

    def wait(self) -> list[Engine]:
        what = f"start its {self._title} server"
        return self._actors.gather(self._starting, what, self._deadline_s + 30)

    def close(self) -> None:
        refs = self._actors.each("close")
        ray.wait(refs, num_returns=len(refs), timeout=20)
        self._actors.kill()
