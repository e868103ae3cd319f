"""Puts the parts of a run together for each way to start one: all that the loop needs, and its clean end.

    submitted or rehearsed  the node agents started Ray on every node; trainers and engines are actors on it
    --num-gpus N            a Ray of our own on this machine, otherwise the same
    torchrun                N processes, each a trainer rank; rank 0 also drives the run and owns the engine
    alone                   one process is the only rank, the engine in it (embedded) or beside it (SGLang)

Whatever was started is ended when the session closes, also when opening it fails half way.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from nanoslime import rehearsal
from nanoslime.config import RunConfig
from nanoslime.engine_kind import EngineStart, engine_kind
from nanoslime.layout import Layout
from nanoslime.orchestration import ray_group
from nanoslime.orchestration.checkpoints import Checkpoints
from nanoslime.orchestration.groups import NoTrainer, TrainGroup, resolve_transport
from nanoslime.orchestration.local_group import LocalTrainGroup
from nanoslime.orchestration.rollout_manager import Replay, RolloutManager
from nanoslime.orchestration.torchrun_group import Ranks, TorchrunTrainGroup
from nanoslime.run_dir import Attempt, RunDir
from nanoslime.storage.commit import remove_leftovers
from nanoslime.storage.shared_files import read_json
from nanoslime.training.backend import RankEnv
from nanoslime.types import Engine

Phase = Callable[[str], None]  # called with the name of the phase that starts


@dataclass(frozen=True, slots=True)
class Session:
    config: RunConfig
    attempt: Attempt
    trainer: TrainGroup
    rollout: RolloutManager | Replay
    checkpoints: Checkpoints


def prepare_model(config: RunConfig, run: RunDir) -> tuple[RunConfig, Path]:
    """The configuration with its data paths, and the model's directory; a rehearsal makes its own first."""
    if not config.rehearsal.enabled:
        return config, Path(config.model.hf_checkpoint)
    files = rehearsal.make(run.model, config.rehearsal)
    data = replace(config.data, prompts=str(files.train), eval_prompts=str(files.held_out))
    return replace(config, data=data), files.model


@contextmanager
def open_ray(
    config: RunConfig, attempt: Attempt, layout: Layout, phase: Phase, *, local: bool
) -> Iterator[Session]:
    """The driver's session on Ray; `local`: on a Ray of its own rather than the node agents'."""
    with ExitStack() as resources:
        phase("model")
        config, model_dir = prepare_model(config, attempt.run)
        phase("start")
        if local:
            ray_group.start_local(layout.slots_per_node, layout.device)
        else:
            head = read_json(attempt.head)
            ray_group.connect(head, layout.num_nodes, config.cluster.node_join_deadline_s)
        resources.callback(ray_group.disconnect)

        colocate = config.cluster.colocate
        servers: ray_group.RayEngines | None = None
        if layout.engines:
            servers = ray_group.RayEngines(config, attempt, layout, model_dir)
            resources.callback(servers.close)
            if not colocate:
                servers.start()  # they start while the trainers do

        transport = resolve_transport(config, same_process=False)
        trainer: TrainGroup
        if layout.trainers:
            trainer = ray_group.RayTrainGroup(config, attempt, layout, model_dir, transport)
        else:
            trainer = NoTrainer(config, attempt.run, model_dir, transport)
        resources.callback(trainer.close)
        if servers is not None and colocate:
            # An engine measures the memory that is free, so it starts before the trainers take theirs.
            servers.start(trainer.gpu_ids)
            for engine in servers.wait():
                engine.release_memory()
        trainer.setup()

        engines: list[Engine] = []
        if servers is not None:
            engines = list(servers.wait())
            ranks_by_engine = [layout.ranks_at(place) for place in layout.engines]
            trainer.connect(engines, trainer.address, ranks_by_engine)
        elif not config.rollout.load_rollouts:
            engines.append(_engine_here(config, attempt, model_dir, "cpu", [], resources))
        yield _session(config, attempt, model_dir, trainer, engines, resources)


@contextmanager
def open_local(
    config: RunConfig, attempt: Attempt, env: RankEnv, phase: Phase
) -> Iterator[Session]:
    """The session of a process that is itself a trainer rank: the only one, or rank 0 of torchrun's."""
    with ExitStack() as resources:
        ranks: Ranks | None = None
        if env.world_size > 1:
            phase("start")
            ranks = Ranks(env, config)
            resources.callback(ranks.close)
        phase("model")
        config, model_dir = prepare_model(config, attempt.run)
        phase("start")
        engines: list[Engine] = []
        if not config.rollout.load_rollouts:
            gpu_ids = [env.local_rank] if env.device == "cuda" else []
            engines.append(_engine_here(config, attempt, model_dir, env.device, gpu_ids, resources))
        if config.cluster.colocate:
            for engine in engines:
                engine.release_memory()

        run = attempt.run
        transport = resolve_transport(config, same_process=env.world_size == 1)
        trainer: TrainGroup
        if config.rollout.rollout_only:
            trainer = NoTrainer(config, run, model_dir, transport)
        elif ranks is not None:
            trainer = TorchrunTrainGroup(config, run, model_dir, transport, ranks)
        else:
            trainer = LocalTrainGroup(config, run, model_dir, transport, env, engines)
        resources.callback(trainer.close)
        trainer.setup()
        trainer.connect(engines, trainer.address, [[0]])
        yield _session(config, attempt, model_dir, trainer, engines, resources)


def _engine_here(
    config: RunConfig,
    attempt: Attempt,
    model_dir: Path,
    device: str,
    gpu_ids: list[int],
    resources: ExitStack,
) -> Engine:
    """The only engine of a run: in this process, or owned by it."""
    kind = engine_kind(config.rollout)
    start = EngineStart(
        config=config,
        index=0,
        model_dir=model_dir,
        device=device,
        host="127.0.0.1",
        log=attempt.log(kind.name, 0),
        gpu_ids=gpu_ids,
    )
    owner = kind.make_owner(start)
    resources.callback(owner.close)
    return owner.start(config.rollout.start_deadline_s)


def _session(
    config: RunConfig,
    attempt: Attempt,
    model_dir: Path,
    trainer: TrainGroup,
    engines: list[Engine],
    resources: ExitStack,
) -> Session:
    run = attempt.run
    rollout: RolloutManager | Replay
    if config.rollout.load_rollouts:
        rollout = Replay(config)
    else:
        rollout = RolloutManager(config, run, model_dir, engines)
    resources.callback(rollout.close)
    remove_leftovers(run.checkpoints)
    return Session(config, attempt, trainer, rollout, Checkpoints(config, run, trainer, rollout))
