"""Checks a run's inputs before submission: checkpoint, prompt files, environment."""

import hashlib
import os
import sys
from dataclasses import replace
from pathlib import Path

from jobs.checkout import ROOT, made_by
from nanoslime.config import RunConfig
from nanoslime.config.algorithm import CustomConfig
from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.model import REWARDS
from nanoslime.config.rollout import ENVIRONMENTS
from nanoslime.models.local_checkpoint import with_local_checkpoint
from nanoslime.models.shape import ModelShape
from nanoslime.run_dir import RunDir
from nanoslime.storage.datasets import with_local_prompts
from nanoslime.storage.recorded_samples import with_recorded_rollouts
from nanoslime.types import RunError
from tools.staging.environment import venv_of
from tools.submit import lead, where
from tools.submit.checked_prompts import checked_prompts
from tools.submit.plugins import check_importable
from tools.submit.tokenizer_files import has_tokenizer_files

# env/run.sh writes into an environment for which target and from which locks it was made.
_STAMP = ".nanoslime-target"
_CUDA_LOCKS = ("cuda.lock", "cuda.pinned.txt")


def resolve(config: RunConfig, *, download: bool) -> tuple[RunConfig, ModelShape, list[str]]:
    """Finds and checks the inputs of a run: the configuration with every path absolute and found,
    the model's shape, and of each source how many prompts it has and how many rows are left out.

    download: a hub id is fetched whole; otherwise only its config.json. Raises RunError
    for what is missing.
    """
    config = _with_absolute_paths(config)
    _check_plugins(config)
    config = with_recorded_rollouts(config)
    config, shape = with_local_checkpoint(config, download=download)
    if config.rollout.load_rollouts or config.rehearsal.enabled:
        return config, shape, []
    if not (config.data.prompts or config.data.sources):
        raise RunError(
            "data.prompts is not set: give --prompts FILE (.jsonl or .parquet), or OWNER/NAME of a "
            "data set of the hub"
        )
    directory = Path(config.model.hf_checkpoint)
    tokenizer = directory if has_tokenizer_files(directory) else None
    config = with_local_prompts(config)
    return config, shape, _check_sources(config, tokenizer)


def _check_plugins(config: RunConfig) -> None:
    """Refuses a reward, an environment or an algorithm of the user's own whose module the job
    would not find.

    The job starts where the submission does, with the environment of cluster.venv.
    """
    installed = Path(config.cluster.venv or sys.prefix).glob("lib/python3.*/site-packages")
    search = [str(Path.cwd()), *map(str, installed)]
    for data in config.prompt_sources:
        for reward in data.reward_weights(data.reward):
            check_importable(reward, REWARDS, "data.reward", search)
    check_importable(config.rollout.environment, ENVIRONMENTS, "rollout.environment", search)
    if isinstance(config.algorithm, CustomConfig):
        check_importable(config.algorithm.name, {}, "algorithm.name", search)


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    run_root = _absolute(config.cluster.run_root or "runs")
    venv = config.cluster.venv and _absolute(config.cluster.venv)
    cluster = replace(config.cluster, run_root=run_root, venv=venv)
    return replace(config, cluster=cluster)


def _check_sources(config: RunConfig, tokenizer: Path | None) -> list[str]:
    """What the job will use of each source of prompts; `tokenizer` holds its files."""
    lines = []
    for own in config.prompt_sources:
        lines.append(f"{own.prompts}: {checked_prompts(Path(own.prompts), own, tokenizer)}")
    return lines


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def check_run_root(config: RunConfig) -> None:
    """Raises RunError where no run's directory can be made."""
    run_root = Path(config.cluster.run_root)
    there = next(path for path in (run_root, *run_root.parents) if path.exists())
    fault = "" if there.is_dir() else "is a file"
    if not fault and not os.access(there, os.W_OK | os.X_OK):
        fault = "may not be written"
    if fault:
        raise RunError(
            f"cluster.run_root={config.cluster.run_root!r}: {there} {fault}; name a directory of "
            "your own that all nodes see"
        )


def check_resume(run: RunDir, config: RunConfig) -> None:
    """RunError where the run lives, or `config` cannot go on with what it has done."""
    is_over = where.refuse_if_job_lives(run)
    if not is_over:
        run.refuse_if_alive()
    run.check_resumed(config)


def check_times(cluster: ClusterConfig) -> None:
    """Refuses a job that would be told to stop before it could do anything, or too late."""
    limit_s = cluster.time_limit_min * 60
    needed_s = cluster.signal_lead_s + cluster.drain_s
    if limit_s <= needed_s:
        raise RunError(
            f"cluster.time_limit_min={cluster.time_limit_min} ends the job after {limit_s} s; with "
            f"cluster.signal_lead_s={cluster.signal_lead_s} it is told to stop so long before, and "
            f"takes up to {cluster.drain_s:g} s to commit, so that no time is left to train: set a "
            f"limit of more than {needed_s / 60:.0f} min, or a shorter lead"
        )
    lead.check_grace(cluster)


def check_environment(config: RunConfig, repository: Path = ROOT) -> None:
    """Refuse GPU nodes whose environment does not come from this checkout's CUDA lock, and one that
    cannot be staged.
    """
    cluster = config.cluster
    if cluster.stage_environment:
        venv_of(config)
    # What an image or a conda environment holds cannot be seen from here.
    if cluster.device != "cuda" or cluster.conda or cluster.container != "none":
        return
    venv = Path(config.cluster.venv or sys.prefix)
    made = _read_stamp(venv / _STAMP)
    is_of_lock = made.get("lock_sha256") == _cuda_lock_sha256(repository)
    if made.get("target") == "cuda" and is_of_lock:
        return
    if not venv.is_dir():
        fault = "does not exist"
    elif not made:
        fault = "was not made by env/run.sh"
    elif made.get("target") == "cuda":
        fault = "was made from env/cuda.lock as it was before"
    else:
        fault = f"was made from env/{made.get('target')}.lock"
    place = "cluster.venv" if config.cluster.venv else "the environment that submits"
    raise RunError(
        f"cluster {config.cluster.name!r} has GPUs, but {place} ({venv}) {fault}. Make it with\n"
        f"    {made_by('cuda')}\n"
        "on a machine that builds for the GPU nodes, "
        f"and set cluster.venv to {repository}/.venv/cuda"
    )


def _read_stamp(stamp: Path) -> dict[str, str]:
    """The NAME=VALUE lines of an environment's stamp; empty where it has none."""
    if not stamp.is_file():
        return {}
    lines = stamp.read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def _cuda_lock_sha256(repository: Path) -> str:
    """The checksum of the CUDA locks as env/run.sh takes it."""
    digest = hashlib.sha256()
    for name in _CUDA_LOCKS:
        lock = repository / "env" / name
        if lock.is_file():
            digest.update(lock.read_bytes())
    return digest.hexdigest()
