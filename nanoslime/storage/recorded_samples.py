"""The files of recorded rollouts: texts and rewards, and what is known of each token.

    rollouts/step_<k>-<worker>.jsonl  .npz    samples, by rollout worker
    rollouts/gaps_<k>-<rank>.npz              how far trainer and engine were apart on each token,
                                              by data-parallel rank

A file of gaps finds its samples by their tokens: equal sequences have equal logprobs.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from nanoslime.config.run import RunConfig
from nanoslime.storage.array_file import write_tree
from nanoslime.types import RunError


def gaps_file(directory: Path, step: int, dp_rank: int) -> Path:
    return directory / f"gaps_{step}-{dp_rank}.npz"


def write_gaps(path: Path, sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Writes the gaps [T] of sequences of tokens [T], as float16."""
    tree = {tokens_key(token_ids): gaps.astype(np.float16) for token_ids, gaps in sequences}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tree(path, tree)


def tokens_key(token_ids: np.ndarray) -> str:
    """A hash of a sequence of tokens, whatever its integer type."""
    return xxhash.xxh3_128_hexdigest(token_ids.astype(np.int32).tobytes())


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
