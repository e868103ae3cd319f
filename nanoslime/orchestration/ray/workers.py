"""The nodes with engines: an actor on each owns the servers there and runs a rollout worker."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

from nanoslime.config.deadlines import Deadline
from nanoslime.engine_kind import EngineStart, RunEngine, engine_kind
from nanoslime.failures import told_in_one_line
from nanoslime.layout import EnginePlace, Layout
from nanoslime.orchestration.ray.actors import ActorPlace, Actors, ActorSetup, RunOnRay
from nanoslime.plugins import resolve
from nanoslime.processes.signals import hold_back_from_this_process
from nanoslime.rollout.tasks import (
    FinishedGroup,
    GroupTask,
    RestoredGroup,
    WorkerGone,
    WorkerNews,
    WorkerSetup,
)
from nanoslime.types import Engine, MachineFailure, RunError

if TYPE_CHECKING:
    from nanoslime.rollout.worker import RolloutWorker

logger = logging.getLogger(__name__)

# A worker that lives answers a call within this time; a save may wait for its disk.
_ANSWER_S = 120.0
_SAVE_S = 600.0
# It asks so often for a worker that is lost, and waits so long for an answer.
_LOOK_S = 1.0
_OPEN_S = 10.0
# Engines start beside one another, and a worker answers meanwhile.
_MAX_CONCURRENCY = 64
# What a worker is told it does one after another, so that nobody has to wait for it.
_IN_ORDER = "in_order"
# It imports transformers, for which the engines need not wait.
_WORKER = "nanoslime.rollout.worker:RolloutWorker"


@ray.remote(concurrency_groups={_IN_ORDER: 1}, max_restarts=-1)
class WorkerActor:
    """Owns the engines of its node, and runs the rollout worker beside them.

    Where it dies, Ray starts it again without them, as soon as its node is there.
    """

    def __init__(self, setup: ActorSetup):
        setup.enter()
        hold_back_from_this_process()
        self._setup = setup
        self._engines: dict[int, RunEngine] = {}
        self._worker: RolloutWorker | None = None

    def start_engine(self, index: int, gpus: list[str] | slice) -> Engine:
        """Starts an engine; one that it owned under this index is ended first.

        `gpus` are the engine's, by number or UUID, or its part of those that Ray gave to the
        node's engines together.
        """
        setup = self._setup
        if isinstance(gpus, slice):
            gpus = [str(gpu_id) for gpu_id in ray.get_gpu_ids()[gpus]]
        host = ray.util.get_node_ip_address()
        log = setup.log.with_name(f"{engine_kind(setup.config.rollout).name}-{index}.log")
        start = EngineStart(setup.config, index, setup.model_dir, setup.device, host, log, gpus)
        engine = self._engines.setdefault(index, RunEngine(start))
        with told_in_one_line(logger, f"start engine {index}"):
            return engine.start()

    @ray.method(concurrency_group=_IN_ORDER)
    def open_worker(self, setup: WorkerSetup) -> None:
        """Opens the rollout worker, unless it is open."""
        if self._worker is not None:
            return
        with told_in_one_line(logger, "open the rollout worker"):
            make_worker = resolve(_WORKER, {}, "the rollout worker")
            self._worker = make_worker(setup, keeps_arrays=True)
        logger.info("%s, pid %d", self._worker.name, os.getpid())

    @ray.method(concurrency_group=_IN_ORDER)
    def call_worker(self, method: str, *args: Any) -> Any:
        """A method of the rollout worker, by name; those of one caller run in their order."""
        with told_in_one_line(logger, method):
            return getattr(self._worker, method)(*args)

    def poll_worker(self, timeout_s: float) -> WorkerNews:
        """It may wait, beside what runs in order."""
        with told_in_one_line(logger, "poll"):
            return self._worker.poll(timeout_s)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        for engine in list(self._engines.values()):
            engine.close()


class RayWorker:
    """A `Worker` whose work is done by the actor `number`. RunError names it and its log.

    What it is told without an answer is sent and not waited for: `poll` raises what became of
    it, and that an actor is gone or hangs.
    """

    def __init__(self, actors: Actors, number: int, engines: Sequence[str] = ()):
        """`engines` are the names of those that its actor owns."""
        self.name = f"rollout worker {number}"
        self._actors = actors
        self._number = number
        self._engines = engines
        # Why it has no actor, from the loss of one until another one has an engine; empty else.
        self.loss = ""
        # Calls that nobody waits for, by method, in their order.
        self._told: deque[tuple[str, Any]] = deque()

    def start(self, tasks: Sequence[GroupTask]) -> None:
        self._tell("start", list(tasks))

    def poll(self, timeout_s: float) -> WorkerNews:
        if self.loss:
            self._told.clear()
            time.sleep(timeout_s)
        self._require_actor()
        while self._told and ray.wait([self._told[0][1]], timeout=0)[0]:
            method, ref = self._told.popleft()
            self._answer(method, ref)
        ref = self._actor.poll_worker.remote(timeout_s)
        return self._answer("poll", ref, timeout_s + _ANSWER_S)

    def cancel(self, group_ids: Sequence[int]) -> None:
        self._tell("cancel", list(group_ids))

    def finish_step(self, step: int, groups: Sequence[FinishedGroup]) -> None:
        self._tell("finish_step", step, list(groups))

    def set_engines(self, engines: Sequence[Engine]) -> None:
        self._tell("set_engines", list(engines))

    def drain(self) -> None:
        self._tell("drain")

    def save(self, path: Path) -> None:
        self._call("save", path, deadline_s=_SAVE_S)

    def load(self, path: Path) -> list[RestoredGroup]:
        return self._call("load", path, deadline_s=_SAVE_S)

    def metrics(self) -> dict[str, float]:
        return self._call("metrics")

    @property
    def _actor(self) -> Any:
        return self._actors.actors[self._number]

    def _require_actor(self) -> None:
        if self.loss:
            raise WorkerGone(self.loss, self._engines)

    def _tell(self, method: str, *args: Any) -> None:
        if not self.loss:
            self._told.append((method, self._actor.call_worker.remote(method, *args)))

    def _call(self, method: str, *args: Any, deadline_s: float = _ANSWER_S) -> Any:
        self._require_actor()
        ref = self._actor.call_worker.remote(method, *args)
        return self._answer(method, ref, deadline_s)

    def _answer(self, method: str, ref: Any, deadline_s: float = _ANSWER_S) -> Any:
        deadline = Deadline(deadline_s, "the time for an answer")
        try:
            [answer] = self._actors.gather([ref], f"answer to {method}", deadline, [self._number])
        except MachineFailure as failure:
            if not isinstance(failure.__cause__, RayActorError):
                raise
            # One that was out of reach for a moment only begins anew like one that has died.
            ray.kill(self._actor, no_restart=False)
            self.loss = str(failure)
            self._require_actor()
        return answer


class RayEngines:
    """The engine servers of a run and the rollout workers beside them. `start` starts the
    servers side by side; `wait` returns their clients once all are up.
    """

    def __init__(self, run: RunOnRay, layout: Layout):
        rollout = run.config.rollout
        self._run = run
        self._layout = layout
        self._deadline = Deadline(rollout.start_deadline_s, "rollout.start_deadline_s")
        self._title = engine_kind(rollout).title
        self._starting: list[Any] = []
        self._opening: list[Any] = []
        self._gpus_by_rank: Sequence[str] = ()
        self._workers: list[RayWorker] = []
        self._closed = threading.Event()
        nodes = sorted({place.node for place in layout.engines})
        # The worker of each engine.
        self.workers_by_engine = [nodes.index(place.node) for place in layout.engines]
        places = [
            ActorPlace(number, node, self._num_slots(node)) for number, node in enumerate(nodes)
        ]
        self._actors = Actors(
            WorkerActor, "rollout worker", "worker", places, run, _MAX_CONCURRENCY
        )

    @property
    def actors(self) -> Sequence[Any]:
        """The actors of the rollout workers, in the order of their numbers."""
        return self._actors.actors

    def start(self, gpus_by_rank: Sequence[str] = ()) -> None:
        """Starts every server, and meanwhile the workers. `gpus_by_rank` are the trainers' GPUs,
        where the engines share them; without it the engines have their own.
        """
        self._gpus_by_rank = gpus_by_rank
        self._starting = [self._start(place) for place in self._layout.engines]
        self._opening = [self._open(number) for number in range(len(self.actors))]

    def wait(self) -> list[Engine]:
        what = f"start its {self._title} servers"
        return self._actors.gather(
            self._starting, what, self._late_deadline, self.workers_by_engine
        )

    def restart(self, index: int) -> Engine:
        """Ends an engine, whatever has become of it, and starts it again where it was.

        Waits for its worker, and so for its node, to come back where that was lost. The worker
        takes part again once it has an engine.
        """
        number = self.workers_by_engine[index]
        self._reopen(number)
        ref = self._start(self._layout.engines[index])
        what = f"start engine {index} again"
        [engine] = self._actors.gather([ref], what, self._late_deadline, [number])
        self._workers[number].loss = ""
        return engine

    def open_workers(self, engines: Sequence[Engine]) -> list[RayWorker]:
        """A rollout worker on each node with some of these engines, which are in their order."""
        self._actors.gather(self._opening, "open its rollout worker", self._late_deadline)
        for number in range(len(self.actors)):
            by_engine = zip(engines, self.workers_by_engine, strict=True)
            own = [engine.name for engine, worker in by_engine if worker == number]
            self._workers.append(RayWorker(self._actors, number, own))
        return self._workers

    def _open(self, number: int) -> Any:
        setup = WorkerSetup(
            self._run.config,
            self._run.model_dir,
            self._run.attempt.run.rollouts,
            index=number,
            num_workers=len(self.actors),
            num_engines=self.workers_by_engine.count(number),
        )
        return self.actors[number].open_worker.remote(setup)

    def _reopen(self, number: int) -> None:
        """Waits for the actor, and opens its worker where Ray has started it again."""
        while not self._closed.wait(_LOOK_S):
            with suppress(ActorUnavailableError, GetTimeoutError):
                ray.get(self._open(number), timeout=_OPEN_S)
                return
        raise RunError(f"{self._workers[number].name} is not started again: the run ends")

    def close(self) -> None:
        self._closed.set()
        refs = self._actors.start_on_each("close")
        # They record the last rollout first.
        ray.wait(refs, num_returns=len(refs), timeout=_ANSWER_S)
        self._actors.kill()

    @property
    def _late_deadline(self) -> Deadline:
        """An engine that is late says so itself, a little earlier."""
        return replace(self._deadline, seconds=self._deadline.seconds + 30)

    def _num_slots(self, node: int) -> int:
        """What the actor of a node reserves; colocated, the trainers hold the slots."""
        if self._run.config.cluster.colocate:
            return 0
        return sum(len(place.slots) for place in self._layout.engines if place.node == node)

    def _start(self, place: EnginePlace) -> Any:
        worker = self.workers_by_engine[place.index]
        actor = self._actors.actors[worker]
        return actor.start_engine.remote(place.index, self._gpus_of(place, worker))

    def _gpus_of(self, place: EnginePlace, worker: int) -> list[str] | slice:
        if self._gpus_by_rank:
            return [self._gpus_by_rank[rank] for rank in self._layout.ranks_at(place)]
        size = len(place.slots)
        before = self.workers_by_engine[: place.index].count(worker)
        return slice(before * size, (before + 1) * size)
