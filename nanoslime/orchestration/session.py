"""Puts the parts of a run together, for each way to start one, and ends them cleanly.

    submitted, rehearsed  node agents started Ray on every node; trainers and engines are actors
    --num-gpus N          the same on a Ray of our own, on this machine
    torchrun              N processes are trainer ranks; rank 0 also drives the run and its engine
    alone                 one process is the only rank; its engine is in it (embedded) or beside
                          it (SGLang)

A session that closes ends whatever it started, also when opening it fails half way. The first
two ways are in ray_session.py: the others do without Ray being installed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

from nanoslime import algorithms, rehearsal
from nanoslime.config import RunConfig
from nanoslime.engine_kind import EngineStart, RunEngine, engine_kind, resolve_transport
from nanoslime.orchestration.checkpoints import Checkpoints
from nanoslime.orchestration.groups import LocalTrainGroup, NoTrainer, TrainGroup
from nanoslime.orchestration.rollout_manager import Assignment, Replay, RolloutManager
from nanoslime.orchestration.torchrun_group import Ranks, TorchrunTrainGroup
from nanoslime.rollout import rewards
from nanoslime.rollout.producer import Serving
from nanoslime.rollout.prompts import RunPrompts
from nanoslime.rollout.tasks import Worker, WorkerSetup
from nanoslime.rollout.worker import RolloutWorker
from nanoslime.run_dir import Attempt, RunDir
from nanoslime.storage.commit import remove_leftovers
from nanoslime.training.backend import RankEnv
from nanoslime.types import Engine
from nanoslime.weight_sync.engine_pool import EnginePool, Restart
from nanoslime.weight_sync.probe import Probe
from nanoslime.weight_sync.session import SyncSession

Phase = Callable[[str], None]  # called with the name of the phase that starts


@dataclass(frozen=True, slots=True)
class Session:
    config: RunConfig
    attempt: Attempt
    trainer: TrainGroup
    rollout: RolloutManager | Replay
    weights: SyncSession
    engines: EnginePool
    checkpoints: Checkpoints


@dataclass(frozen=True, slots=True)
class Started:
    """The processes of a run, and how weights go from one kind to the other."""

    trainer: TrainGroup
    engines: list[Engine]
    # The trainer ranks on each engine's devices, where they share them.
    ranks_by_engine: list[list[int]]
    transport: str
    # What starts each engine again, in their order; without it they stay lost.
    restarts: Sequence[Restart] = ()
    # None: one in this process is enough.
    workers: Sequence[Worker] | None = None
    # The worker beside each engine, by the engine's name; all have those that are not in it.
    home: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run begins with: its configuration with the data's paths, model and prompts."""

    config: RunConfig
    model_dir: Path
    # None where recorded rollouts take their place.
    prompts: RunPrompts | None


def prepare_inputs(config: RunConfig, model_dir: Path) -> Inputs:
    """Reads all prompts and loads the user's own code, so that a fault of theirs ends the run
    early."""
    algorithms.make(config.algorithm)
    prompts = None
    if not config.rollout.load_rollouts:
        for data in config.prompt_sources:
            rewards.check(data)
        prompts = RunPrompts.load(config, model_dir)
    return Inputs(config, model_dir, prompts)


def prepare_model(config: RunConfig, run: RunDir) -> tuple[RunConfig, Path]:
    """The configuration and its model; a rehearsal makes its model and its data first."""
    if not config.rehearsal.enabled:
        return config, Path(config.model.hf_checkpoint)
    files = rehearsal.make(run.model, config.rehearsal)
    data = replace(config.data, prompts=str(files.train), eval_prompts=str(files.held_out))
    return replace(config, data=data), files.model


@contextmanager
def open_local(
    config: RunConfig, attempt: Attempt, env: RankEnv, phase: Phase
) -> Iterator[Session]:
    """Opens the session of a process that is itself a trainer rank, the first one."""
    transport = resolve_transport(config, same_process=env.world_size == 1)
    with ExitStack() as resources:
        ranks: Ranks | None = None
        if env.world_size > 1:
            phase("start")
            ranks = Ranks(env, config)
            resources.callback(ranks.close)
        phase("model")
        config, model_dir = prepare_model(config, attempt.run)
        inputs = prepare_inputs(config, model_dir)
        phase("start")
        engines: list[Engine] = []
        restarts: list[Restart] = []
        if not config.rollout.load_rollouts:
            gpu_ids = [env.local_rank] if env.device == "cuda" else []
            here = EngineHere(config, attempt, model_dir, env.device, gpu_ids)
            resources.callback(here.close)
            engines.append(here.start())
            restarts.append(here.start)
        if config.cluster.colocate:
            for engine in engines:
                engine.release_memory()

        trainer: TrainGroup
        if config.rollout.rollout_only:
            trainer = NoTrainer(config, attempt.run, model_dir)
        elif ranks is not None:
            trainer = TorchrunTrainGroup(config, attempt, model_dir, ranks)
        else:
            trainer = LocalTrainGroup(config, attempt.run, model_dir, env)
        resources.callback(trainer.close)
        trainer.setup()
        started = Started(trainer, engines, [[0]], transport, restarts)
        yield make_session(inputs, attempt, started, resources)


class EngineHere(RunEngine):
    """The only engine of a run: in this process, or owned by it."""

    def __init__(
        self,
        config: RunConfig,
        attempt: Attempt,
        model_dir: Path,
        device: str,
        gpu_ids: Sequence[int],
    ):
        log = attempt.log(engine_kind(config.rollout).name, 0)
        super().__init__(EngineStart(config, 0, model_dir, device, "127.0.0.1", log, gpu_ids))


def make_session(
    inputs: Inputs, attempt: Attempt, started: Started, resources: ExitStack
) -> Session:
    config = inputs.config
    run = attempt.run
    trainer = started.trainer
    colocate = config.cluster.colocate
    # An engine measures the free memory when it starts, which trainers on its devices share.
    max_restarts = 0 if colocate else config.rollout.engine_restarts
    pool = EnginePool(started.engines, started.restarts, max_restarts=max_restarts)
    resources.callback(pool.close)
    if colocate:
        trainer.share_devices(pool)
    weights = SyncSession(
        trainer,
        pool,
        trainer.devices,
        transport=started.transport,
        directory=run.weights,
        deadline_s=config.weight_sync.deadline_s,
        at_sync=config.rollout.at_sync,
        compare_every=config.weight_sync.compare_every,
        probe=_probe(inputs),
    )
    weights.open(started.ranks_by_engine)
    rollout: RolloutManager | Replay
    if inputs.prompts is None:
        rollout = Replay(config)
    else:
        workers = started.workers
        if workers is None:
            worker = RolloutWorker(WorkerSetup(config, inputs.model_dir, run.rollouts))
            resources.callback(worker.close)
            workers = [worker]
        assignment = Assignment(workers, started.home)
        pool.subscribe(assignment.set_engines, assignment.drain)

        def service() -> bool:
            weights.look_at_probe(wait_s=0.0)
            return pool.service(weights.join)

        serving = Serving(
            workers=workers, lost=pool.lost, service=service, must_stop=attempt.must_stop
        )
        rollout = RolloutManager(config, run, inputs.prompts, weights, serving)
        resources.callback(rollout.close)
    remove_leftovers(run.checkpoints)
    checkpoints = Checkpoints(config, attempt, trainer, rollout, weights)
    return Session(config, attempt, trainer, rollout, weights, pool, checkpoints)


def _probe(inputs: Inputs) -> Probe | None:
    """The tokens of the first prompts, one after the other; None without prompts, or where none
    are asked for."""
    sync = inputs.config.weight_sync
    if inputs.prompts is None or sync.probe_tokens < 2:
        return None
    sources = inputs.prompts.train.values()
    prompts = chain.from_iterable(source.prompts for source in sources)
    tokens = chain.from_iterable(prompt.token_ids for prompt in prompts)
    token_ids = [int(token) for token in islice(tokens, sync.probe_tokens)]
    if len(token_ids) < 2:
        return None
    max_gap = sync.max_logprob_gap
    if max_gap is None:
        max_gap = 0.01 if inputs.config.model.dtype == "float32" else 0.3
    # What engines have in hand goes on after a sync, and keeps the trainer waiting for nothing.
    wait_s = 0.5 if inputs.config.rollout.max_staleness == 0 else 0.0
    return Probe(token_ids, max_gap, wait_s)
