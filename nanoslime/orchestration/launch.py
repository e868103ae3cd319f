"""From a command line of `nanoslime.train` to a session: which run, which attempt, which way to run it."""

import argparse
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from nanoslime import layout
from nanoslime.config import RunConfig
from nanoslime.config.load import dump, load, read
from nanoslime.models.shape import ModelShape
from nanoslime.models.tiny import tiny_qwen3_config
from nanoslime.orchestration.rollout_manager import from_rank_0
from nanoslime.orchestration.session import Phase, Session, open_local, open_ray
from nanoslime.processes.ports import free_port
from nanoslime.run_dir import Attempt, RunDir, recorded_rollouts
from nanoslime.storage.hub import find_checkpoint
from nanoslime.training.backend import RankEnv, init_process_group
from nanoslime.types import RunError

MOCK_RECIPE = Path(__file__).parents[2] / "jobs" / "recipes" / "mock.yaml"


@dataclass(frozen=True, slots=True)
class Launch:
    attempt: Attempt
    open: Callable[[Phase], AbstractContextManager[Session]]
    leads: bool


def parse(argv: list[str]) -> Launch:
    """What the command line asks for. Raises RunError or ValueError in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m nanoslime.train", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path)
    parser.add_argument("--attempt", type=int)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--mock", action="store_true")
    known, rest = parser.parse_known_args(argv)
    if known.run:
        run = RunDir.open(known.run)
        attempt, config = run.attempt(known.attempt), read(run.config)
        plan = layout.Layout.from_json(run.plan.read_text())
        return Launch(
            attempt, lambda phase: open_ray(config, attempt, plan, phase, local=False), leads=True
        )
    if known.resume:
        run = RunDir.open(known.resume)
        return _on_this_machine(load(run.config, None, rest), run)
    recipe = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
    return _on_this_machine(load(MOCK_RECIPE if known.mock else recipe, None, rest), None)


def _with_local_checkpoint(config: RunConfig) -> tuple[RunConfig, ModelShape]:
    """The configuration with a checkpoint that is a whole local directory; a hub id is fetched."""
    if config.rehearsal.enabled:
        return config, ModelShape.from_config(tiny_qwen3_config())
    found = find_checkpoint(
        config.model.hf_checkpoint,
        config.model.revision,
        download=True,
        needs_tokenizer=not config.rollout.load_rollouts,
    )
    model = replace(config.model, hf_checkpoint=str(found.directory), revision=found.revision)
    return replace(config, model=model), ModelShape.read(found.directory)


def _on_this_machine(config: RunConfig, run: RunDir | None) -> Launch:
    """`run`: goes on with an existing run."""
    config, shape = _with_local_checkpoint(config)
    rollout = config.rollout
    if rollout.load_rollouts:
        recorded = recorded_rollouts(rollout.load_rollouts, rollout.num_rollout)
        config = replace(config, rollout=replace(rollout, load_rollouts=recorded))
    if rollout.rollout_only and "RANK" in os.environ:
        raise RunError("rollout.rollout_only has no trainer ranks; start it without torchrun")
    has_servers_only = rollout.rollout_only and rollout.takes_slots
    if has_servers_only or config.training.num_gpus and "RANK" not in os.environ:
        plan = layout.plan(config, shape)
        attempt = _new_attempt(config, run)
        attempt.run.plan.write_text(plan.to_json())
        return Launch(
            attempt, lambda phase: open_ray(config, attempt, plan, phase, local=True), leads=True
        )
    if config.cluster.device == "cuda" and rollout.takes_slots and not config.cluster.colocate:
        ways_out = "share the trainer's by --colocate, give both their own by --num-gpus N, or --engine embedded"
        raise RunError(
            f"rollout.engine=sglang has no GPU beside the trainer of this process: {ways_out}"
        )
    env = _rank_env(config)
    # the other ranks wait in a collective while rank 0 starts its engine, samples and evaluates
    longest = (
        config.training.collective_deadline_s
        + rollout.start_deadline_s
        + rollout.request_deadline_s
    )
    init_process_group(env, replace(config.training, collective_deadline_s=longest))
    attempt = from_rank_0(_new_attempt(config, run) if env.rank == 0 else None)
    return Launch(
        attempt, lambda phase: open_local(config, attempt, env, phase), leads=env.rank == 0
    )


def _rank_env(config: RunConfig) -> RankEnv:
    """From torchrun's variables where they are set, else the only rank."""
    defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    place = [int(os.environ.get(name, default)) for name, default in defaults.items()]
    meet_at = "env://" if "RANK" in os.environ else f"tcp://127.0.0.1:{free_port('127.0.0.1')}"
    return RankEnv(*place, config.cluster.device, meet_at)


def _new_attempt(config: RunConfig, run: RunDir | None) -> Attempt:
    run = run or RunDir.create(Path(config.cluster.run_root or "runs"), config.name)
    run.config.write_text(dump(config))
    return run.new_attempt()
