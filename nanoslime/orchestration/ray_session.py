"""Opens the session of a run whose trainer ranks and engines are actors of Ray."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from nanoslime.config import RunConfig
from nanoslime.engine_kind import resolve_transport
from nanoslime.layout import Layout
from nanoslime.orchestration.groups import NoTrainer, TrainGroup
from nanoslime.orchestration.ray import cluster
from nanoslime.orchestration.ray.actors import RunOnRay
from nanoslime.orchestration.ray.trainers import RayTrainGroup
from nanoslime.orchestration.ray.workers import RayEngines, RayWorker
from nanoslime.orchestration.session import (
    EngineHere,
    Phase,
    Session,
    Started,
    make_session,
    prepare_inputs,
    prepare_model,
)
from nanoslime.processes.signals import hold_back_from_this_process
from nanoslime.run_dir import Attempt
from nanoslime.storage.shared_files import read_json
from nanoslime.types import Engine
from nanoslime.weight_sync.engine_pool import Restart


@contextmanager
def open_ray(
    config: RunConfig, attempt: Attempt, layout: Layout, phase: Phase, *, local: bool
) -> Iterator[Session]:
    """Opens a session on Ray: on one of its own where `local`, else the agents'."""
    transport = resolve_transport(config, same_process=False)
    with ExitStack() as resources:
        phase("model")
        config, model_dir = prepare_model(config, attempt.run)
        phase("start")
        if local:
            cluster.start_local(layout.slots_per_node, layout.device, attempt.make_ray_token())
        else:
            head = read_json(attempt.head)
            cluster.connect(head, layout.num_nodes, config.cluster.node_join_deadline_s)
            hold_back_from_this_process()
        resources.callback(cluster.disconnect)

        run = RunOnRay(config, attempt, model_dir)
        colocate = config.cluster.colocate
        servers: RayEngines | None = None
        if layout.engines:
            servers = RayEngines(run, layout)
            resources.callback(servers.close)
            if not colocate:
                servers.start()  # they start while the trainers do

        trainer: TrainGroup
        if layout.trainers:
            actors = () if servers is None else servers.actors
            trainer = RayTrainGroup(run, layout, actors)
        else:
            trainer = NoTrainer(config, attempt.run, model_dir)
        resources.callback(trainer.close)
        inputs = prepare_inputs(config, model_dir)  # engines and trainers start meanwhile
        trainer.wait_for_places()
        if servers is not None and colocate:
            # An engine measures the free memory, so it starts before the trainers take
            # theirs.
            servers.start(trainer.gpu_ids)
            for engine in servers.wait():
                engine.release_memory()
        trainer.setup()

        engines: list[Engine] = []
        restarts: list[Restart] = []
        workers: list[RayWorker] | None = None
        home: dict[str, int] = {}
        if servers is not None:
            engines = servers.wait()
            restarts = [partial(servers.restart, index) for index in range(len(engines))]
            names = [engine.name for engine in engines]
            home = dict(zip(names, servers.workers_by_engine, strict=True))
            workers = servers.open_workers(engines)
        elif not config.rollout.load_rollouts:
            here = EngineHere(config, attempt, model_dir, "cpu", [])
            resources.callback(here.close)
            engines.append(here.start())
            restarts.append(here.start)
        ranks_by_engine = [layout.ranks_at(place) for place in layout.engines]
        started = Started(trainer, engines, ranks_by_engine, transport, restarts, workers, home)
        yield make_session(inputs, attempt, started, resources)
