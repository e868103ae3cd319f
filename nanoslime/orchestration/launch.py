"""Finds out what a command line of `nanoslime.train` asks for: which run, which
attempt, and how to open its session.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile

from nanoslime import layout
from nanoslime.config import RunConfig
from nanoslime.config.load import dump, load, read
from nanoslime.engine_kind import takes_slots
from nanoslime.models.local_checkpoint import with_local_checkpoint
from nanoslime.orchestration import torchrun_group
from nanoslime.orchestration.rank_environment import interface_names
from nanoslime.orchestration.session import Phase, Session, open_local
from nanoslime.plugins import resolve
from nanoslime.processes.logs import set_level
from nanoslime.processes.ports import free_port
from nanoslime.run_dir import DONE, FAILED, Attempt, RunDir
from nanoslime.storage.datasets import with_local_prompts
from nanoslime.storage.recorded_samples import with_recorded_rollouts
from nanoslime.training.backend import RankEnv
from nanoslime.types import RunError

# Ray is imported only for a run that needs it.
OPEN_RAY = "nanoslime.orchestration.ray_session:open_ray"
ROOT = Path(__file__).parents[2]
MOCK_RECIPE = ROOT / "jobs" / "recipes" / "mock.yaml"


@dataclass(frozen=True, slots=True)
class Launch:
    attempt: Attempt
    open: Callable[[Phase], AbstractContextManager[Session]]
    # The driver's log, unless its output goes there already.
    log: Path | None = None

    def accept(self) -> None:
        """A checkpoint has taken the configuration that a resumed run goes on with."""
        self.attempt.run.accepted_config.unlink(missing_ok=True)


def parse(argv: list[str]) -> Launch:
    """What the command line asks for. Raises RunError or ValueError in one line."""
    asked = _asked(argv)
    if asked.run:
        return _submitted(RunDir.open(asked.run), asked.attempt)
    return _on_this_machine(_config(asked), RunDir.open(asked.resume) if asked.resume else None)


def serves_rank_0() -> bool:
    """Whether this process is a rank of torchrun that does not drive the run."""
    return int(os.environ.get("RANK", 0)) > 0


def serve_rank_0(argv: list[str]) -> int:
    """Takes part in the run that torchrun's rank 0 drives, until its end."""
    config = _config(_asked(argv))
    set_level(config.log_level)
    _check_torchrun(config)
    # A hub id is fetched before the ranks meet, as on rank 0: their deadline is shorter.
    config, shape = with_local_checkpoint(config, download=True)
    went_well = torchrun_group.serve(_rank_env(config), config, shape.num_parameters)
    return DONE if went_well else FAILED


def _asked(argv: list[str]) -> argparse.Namespace:
    """`run` is a submitted run, `resume` one of this machine; `rest` are a recipe, and flags of the
    configuration.
    """
    parser = argparse.ArgumentParser(
        prog="python -m nanoslime.train",
        usage="%(prog)s [RECIPE.yaml] [--mock] [--resume DIR] [--any-field VALUE]",
        description="Trains on one machine. `jobs/submit_grpo.py --help all` shows all fields.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", type=Path)
    parser.add_argument("--attempt", type=int)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--mock", action="store_true")
    asked, rest = parser.parse_known_args(argv)
    asked.rest = rest
    return asked


def _config(asked: argparse.Namespace) -> RunConfig:
    """The configuration of a run on this machine."""
    flags = list(asked.rest)
    if asked.resume:
        return load(RunDir.open(asked.resume).config_to_resume(), None, flags, resumes=True)
    recipe = MOCK_RECIPE if asked.mock else None
    if flags and not flags[0].startswith("-"):
        given = Path(flags.pop(0))
        recipe = recipe or given
    return load(recipe, None, flags)


def _submitted(run: RunDir, number: int) -> Launch:
    """A run that a node agent starts: its directory holds everything."""
    attempt = run.attempt(number)
    config = read(run.config)
    set_level(config.log_level)
    open_ray = resolve(OPEN_RAY, {}, "a submitted run")
    return Launch(attempt, partial(open_ray, config, attempt, attempt.layout, local=False))


def _on_this_machine(config: RunConfig, run: RunDir | None) -> Launch:
    """`run` is an existing run to go on with; None makes a new one."""
    set_level(config.log_level)
    config, shape = with_local_checkpoint(config, download=True)
    config = with_local_prompts(config)
    if run is not None:
        run.refuse_if_alive()
        run.check_resumed(config)
    config = with_recorded_rollouts(config)
    rollout = config.rollout
    _check_torchrun(config)
    has_servers_only = rollout.rollout_only and takes_slots(rollout)
    has_ranks_of_ray = config.training.num_gpus is not None and "RANK" not in os.environ
    on_ray = has_servers_only or has_ranks_of_ray
    needs_gpu = takes_slots(rollout) and not config.cluster.colocate
    if config.cluster.device == "cuda" and needs_gpu and not on_ray:
        raise RunError(
            f"rollout.engine={rollout.engine} has no GPU beside the trainer of this process: share "
            "the trainer's by --colocate, give both their own by --num-gpus N, or --engine embedded"
        )
    plan = layout.plan(config, shape) if on_ray else None
    if on_ray:
        _check_memory(config)
    cluster = config.cluster
    run = run or RunDir.create(Path(cluster.run_root or "runs"), config.name, cluster.share)
    run.write_config(config, plan)
    attempt = run.new_attempt()
    if on_ray:
        open_ray = resolve(OPEN_RAY, {}, "training.num_gpus")
        open_session = partial(open_ray, config, attempt, plan, local=True)
    else:
        open_session = partial(open_local, config, attempt, _rank_env(config))
    return Launch(attempt, open_session, attempt.log("driver", 0))


def _check_memory(config: RunConfig) -> None:
    """Raises RunError for a run that cannot fit. A process finds out: no part of a run needs it."""
    if config.cluster.device == "cpu" and not config.cluster.memory_per_node:
        return
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    with NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(dump(config))
        file.flush()
        command = [sys.executable, "-P", "-m", "tools.memory.command", file.name]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(done.stderr.strip().rpartition("\n")[2])


def _check_torchrun(config: RunConfig) -> None:
    if config.rollout.rollout_only and "RANK" in os.environ:
        raise RunError("rollout.rollout_only has no trainer ranks; start it without torchrun")


def _rank_env(config: RunConfig) -> RankEnv:
    """From torchrun's variables where they are set, else the only rank. On one machine, gloo and
    NCCL listen at the loopback interface."""
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    interface = config.cluster.network_interface or ("lo" if is_one_machine else "")
    os.environ.update(interface_names(os.environ, interface))
    device = config.cluster.device
    if "RANK" not in os.environ:
        return RankEnv(0, 1, 0, device, f"tcp://127.0.0.1:{free_port('127.0.0.1')}")
    return RankEnv(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        device=device,
        init_method="env://",
    )
