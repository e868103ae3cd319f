"""Trainer ranks and engines as Ray actors on the node that the plan names. The only file that imports ray.

    driver (node 0) ── RayTrainGroup ── one RankActor per trainer rank, on the node of the plan
                    └─ RayEngines ───── one EngineActor per engine, each the owner of one SGLang server

Batches travel as one Ray object per data-parallel rank. Whoever dies ends the run: RunError says its name,
node and log.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from nanoslime.batch import StepMetrics
from nanoslime.config import RunConfig
from nanoslime.layout import EnginePlace, Layout, TrainerPlace
from nanoslime.orchestration.groups import TrainGroup, metrics_row
from nanoslime.orchestration.worker import TrainWorker
from nanoslime.process_groups import free_port
from nanoslime.rollout.sglang import SGLangEngine, SGLangServer
from nanoslime.run_dir import Attempt
from nanoslime.training.backend import RankEnv
from nanoslime.types import RunError, SampleGroup

logger = logging.getLogger(__name__)
NODE_LABEL = "nanoslime-node"
SLOT = "slot"  # the Ray resource that stands for a GPU on nodes that have none


def connect(head: dict[str, Any], num_nodes: int, deadline_s: float) -> None:
    """Connects the driver to the cluster that the node agents started; waits until every node has joined."""
    ray.init(
        logging_level=logging.WARNING,
        address=head["ray_address"],
        _node_ip_address=head["node_ip"],
        log_to_driver=False,
        namespace="nanoslime",
    )
    end = time.monotonic() + deadline_s
    while len(labels := {n["Labels"].get(NODE_LABEL) for n in ray.nodes() if n["Alive"]}) < num_nodes:
        if time.monotonic() > end:
            missing = [i for i in range(num_nodes) if str(i) not in labels]
            raise RunError(
                f"nodes {missing} are not in the Ray cluster at {head['ray_address']} after {deadline_s:.0f}s"
            )
        time.sleep(0.2)


def start_local(num_slots: int, device: str) -> None:
    """A Ray of this process's own, with one node (node 0), for `python -m nanoslime.train --num-gpus N`."""
    kinds = {"num_gpus": num_slots} if device == "cuda" else {"resources": {SLOT: num_slots}}
    # Ray's own switch: a cluster on loopback that ends with this process
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        logging_level=logging.WARNING,
        num_cpus=max(2, num_slots), labels={NODE_LABEL: "0"}, include_dashboard=False, log_to_driver=False,
        _node_ip_address="127.0.0.1", namespace="nanoslime", **kinds,
    )  # fmt: skip


def disconnect() -> None:
    ray.shutdown()


def _placement(node: int, slots: int, device: str, env: dict[str, str]) -> dict[str, Any]:
    """Ray actor options for `slots` GPUs (or CPU slots) of exactly that node of the plan."""
    kinds = {"num_gpus": slots} if device == "cuda" else {"resources": {SLOT: slots}}
    return {
        "num_cpus": 0,
        "label_selector": {NODE_LABEL: str(node)},
        "runtime_env": {"env_vars": env},
        "max_restarts": 0,
        **kinds,
    }


def _interface_env(config: RunConfig, device: str) -> dict[str, str]:
    """What tells gloo and NCCL their network interface, where the cluster file names one."""
    name = config.cluster.network_interface
    variables = ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"] if device == "cuda" else ["GLOO_SOCKET_IFNAME"]
    return dict.fromkeys(variables, name) if name else {}


def _log_to(path: Path) -> None:
    """Sends this actor process's output to its own log of the attempt."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, sys.stdout.fileno())
    os.dup2(fd, sys.stderr.fileno())
    os.close(fd)
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=line, stream=sys.stderr, force=True)


@ray.remote
class RankActor:
    """One trainer rank. `address` comes first, so that rank 0 can tell the others where to meet."""

    def __init__(self, config: RunConfig, model_dir: Path, log: Path):
        _log_to(log)
        self._config, self._model_dir = config, model_dir
        self._worker: TrainWorker | None = None

    def address(self) -> tuple[str, int]:
        ip = ray.util.get_node_ip_address()
        return ip, free_port(ip)

    def setup(self, rank: int, world_size: int, device: str, meet: tuple[str, int]) -> tuple[int, int]:
        """Builds the worker; returns (dp_rank, dp_size)."""
        env = RankEnv(
            rank=rank, world_size=world_size, local_rank=0, device="cuda" if device == "cuda" else "cpu",
            init_method=f"tcp://{meet[0]}:{meet[1]}",
        )  # fmt: skip
        here = ray.util.get_node_ip_address()
        logger.info("trainer rank %d of %d on %s, pid %d", rank, world_size, here, os.getpid())
        self._worker = TrainWorker(self._config, self._model_dir, env)
        return self._worker.dp_rank, self._worker.dp_size

    def train(self, shards: Any) -> tuple[list[StepMetrics], dict[str, float]]:
        assert self._worker is not None
        return self._worker.train(shards), self._worker.seconds

    def call(self, method: str, *args: Any) -> Any:
        """Any other collective method of TrainWorker, by name."""
        return getattr(self._worker, method)(*args)


def engine_server(
    config: RunConfig, index: int, model_dir: Path, device: str, host: str, log: Path, gpu_ids: list[int]
) -> SGLangServer:
    """Engine `index` of the run, on this machine; on a CPU its thread has a core, the last one first."""
    cores = sorted(os.sched_getaffinity(0))
    return SGLangServer(
        name=f"engine-{index}",
        model_path=str(model_dir),
        config=config.rollout,
        dtype=config.model.dtype,
        device="cuda" if device == "cuda" else "cpu",
        host=host,
        port=free_port(host),
        log=log,
        seed=config.seed * 1000 + index,
        cpu_core=cores[-1 - index % len(cores)],
        gpu_ids=gpu_ids,
    )


@ray.remote
class EngineActor:
    """The owner of one SGLang server on its node."""

    def __init__(self, log: Path):
        _log_to(log)
        self._log = log
        self._server: SGLangServer | None = None

    def start(
        self, config: RunConfig, place: EnginePlace, model_dir: Path, device: str, deadline_s: float
    ) -> SGLangEngine:
        ip, gpu_ids = ray.util.get_node_ip_address(), [int(i) for i in ray.get_gpu_ids()]
        log = self._log.with_name(f"sglang-{place.index}.log")
        self._server = engine_server(config, place.index, model_dir, device, ip, log, gpu_ids)
        return self._server.start(deadline_s)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


class _Actors:
    """Named actors whose results are waited for together, with a deadline and a name for whoever fails."""

    def __init__(self, names: Sequence[str], logs: Sequence[Path], actors: Sequence[Any]):
        self._names, self._logs, self.actors = list(names), list(logs), list(actors)

    def gather(self, refs: list[Any], what: str, deadline_s: float) -> list[Any]:
        """Results in order. Raises RunError as soon as one actor fails or dies, or at the deadline."""
        pending, end = list(refs), time.monotonic() + deadline_s
        while pending:
            ready, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                late = [refs.index(ref) for ref in pending]
                names = ", ".join(self._names[i] for i in late)
                raise RunError(f"{names} did not {what} within {deadline_s:.0f}s; log: {self._logs[late[0]]}")
            self._check(refs.index(ready[0]), ready[0], what)
        return ray.get(refs)

    def _check(self, i: int, ref: Any, what: str) -> None:
        try:
            ray.get(ref)
        except RayTaskError as e:
            dead = self._first_dead()
            if dead is not None:  # the others' broken collectives follow from a death
                raise self._died(dead, what) from e
            cause = e.cause if isinstance(e.cause, Exception) else e
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[-1]
            raise RunError(f"{self._names[i]} failed to {what}: {reason}; log: {self._logs[i]}") from e
        except RayActorError as e:
            raise self._died(i, what) from e

    def _died(self, i: int, what: str) -> RunError:
        return RunError(f"{self._names[i]} died while asked to {what}; log: {self._logs[i]}")

    def _first_dead(self) -> int | None:
        """Which actor is dead, if one is: all are asked, with two seconds for news of a death to arrive."""
        pings = [a.__ray_ready__.remote() for a in self.actors]
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
    def __init__(self, config: RunConfig, attempt: Attempt, layout: Layout, model_dir: Path, transport: str):
        super().__init__(config, attempt.run, transport)
        places: Sequence[TrainerPlace] = layout.trainers
        env = _interface_env(config, layout.device)
        logs = [attempt.log("trainer", p.rank) for p in places]
        actors = [
            RankActor.options(name=f"trainer-{p.rank}", **_placement(p.node, 1, layout.device, env)).remote(
                config, model_dir, log
            )
            for p, log in zip(places, logs, strict=True)
        ]
        self._ranks = _Actors([f"trainer rank {p.rank} on node {p.node}" for p in places], logs, actors)
        deadline = config.training.start_deadline_s
        meet = self._ranks.gather([actors[0].address.remote()], "start", deadline)[0]
        self.address: str = meet[0]  # of rank 0
        setups = [
            a.setup.remote(p.rank, len(places), layout.device, meet)
            for a, p in zip(actors, places, strict=True)
        ]
        dp = self._ranks.gather(setups, "load the model", deadline)
        self._dp_ranks, self.dp_size = [rank for rank, _ in dp], dp[0][1]

    def train(self, groups: list[SampleGroup]) -> dict[str, float]:
        batches = self.plan(groups)
        if not batches:
            return {}
        shards = [ray.put([step[dp] for step in batches]) for dp in range(self.dp_size)]
        refs = [a.train.remote(shards[dp]) for a, dp in zip(self._ranks.actors, self._dp_ranks, strict=True)]
        results = self._ranks.gather(refs, "train", self.config.training.collective_deadline_s)
        steps, seconds = results[0]
        return metrics_row(steps, seconds)

    def close(self) -> None:
        for actor in self._ranks.actors:
            ray.kill(actor)

    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> None:
        refs = [a.call.remote(method, *args) for a in self._ranks.actors]
        self._ranks.gather(refs, what, deadline_s or self.config.training.collective_deadline_s)


class RayEngines:
    """The engine servers of a run, started side by side; `engines` are their HTTP clients."""

    def __init__(self, config: RunConfig, attempt: Attempt, layout: Layout, model_dir: Path):
        env = _interface_env(config, layout.device)
        places = layout.engines
        logs = [attempt.log("engine", p.index) for p in places]
        actors = [
            EngineActor.options(
                name=f"engine-{p.index}", **_placement(p.node, len(p.slots), layout.device, env)
            ).remote(log)
            for p, log in zip(places, logs, strict=True)
        ]
        self._actors = _Actors([f"engine {p.index} on node {p.node}" for p in places], logs, actors)
        self._deadline_s = config.rollout.start_deadline_s
        self._starting = [
            a.start.remote(config, p, model_dir, layout.device, self._deadline_s)
            for a, p in zip(actors, places, strict=True)
        ]

    def wait(self) -> list[SGLangEngine]:
        """The engines, once every server answers its health check."""
        return self._actors.gather(self._starting, "start its SGLang server", self._deadline_s + 30)

    def close(self) -> None:
        refs = [a.close.remote() for a in self._actors.actors]
        ray.wait(refs, num_returns=len(refs), timeout=20)
        for actor in self._actors.actors:
            ray.kill(actor)
