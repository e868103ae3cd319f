"""The files of recorded rollouts: texts and rewards.

    rollouts/step_<k>-<worker>.jsonl  .npz    samples of rollout k, by rollout worker

A submission looks at them too, so that this imports nothing of numpy.
"""

from dataclasses import replace
from pathlib import Path

from nanoslime.config.run import RunConfig
from nanoslime.types import RunError


def recorded_rollout(directory: Path, step: int, worker: int) -> Path:
    """The file with which a rollout worker's part of a rollout can be trained on."""
    return directory / f"step_{step}-{worker}.npz"


def with_recorded_rollouts(config: RunConfig) -> RunConfig:
    """The configuration with the absolute directory of the rollouts that it replays, if any.

    rollout.load_rollouts may be a run, or its rollouts/. Raises RunError where it does not
    hold rollouts 0 to num_rollout - 1.
    """
    directory = config.rollout.load_rollouts
    num_rollout = config.rollout.num_rollout
    if not directory:
        return config
    path = Path(directory).expanduser().absolute()
    if (path / "rollouts").is_dir():
        path = path / "rollouts"
    num_found = 0
    while num_found < num_rollout and recorded_rollout(path, num_found, worker=0).exists():
        num_found += 1
    if num_found < num_rollout:
        raise RunError(
            f"rollout.load_rollouts={directory!r} holds {num_found} rollouts "
            f"(step_<k>-0.npz, from 0 on), rollout.num_rollout={num_rollout} asks for more; "
            "lower it or record more"
        )
    return replace(config, rollout=replace(config.rollout, load_rollouts=str(path)))
