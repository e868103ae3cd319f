"""Recorded rollouts as a person reads them: texts and rewards, and what is known of each token.

    rollouts/step_<k>-<worker>.jsonl  .npz    samples, by rollout worker
    rollouts/gaps_<k>-<rank>.npz              how far trainer and engine were apart on each token,
                                              by data-parallel rank

A file of gaps finds its samples by their tokens: equal sequences have equal logprobs.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from nanoslime.config.run import RunConfig
from nanoslime.storage.array_file import read_tree, write_tree
from nanoslime.types import RunError


@dataclass(frozen=True, slots=True)
class RecordedSample:
    """A sample of a recorded rollout. Arrays are [T], and None where they were not recorded."""

    # The sample's line in step_<k>-<worker>.jsonl.
    line: dict[str, Any]
    token_ids: np.ndarray | None = None
    loss_mask: np.ndarray | None = None
    # Trainer's less engine's logprob; NaN outside the loss. None without training on the sample.
    gaps: np.ndarray | None = None

    @property
    def largest_gap(self) -> float:
        """By absolute value; 0 where there are none."""
        if self.gaps is None:
            return 0.0
        return float(np.nan_to_num(np.abs(self.gaps)).max(initial=0.0))


def recorded_steps(directory: Path) -> list[int]:
    """The rollouts that were recorded in `directory`, in order."""
    stems = (path.stem for path in directory.glob("step_*-*.jsonl"))
    return sorted({int(stem.removeprefix("step_").split("-")[0]) for stem in stems})


def read_samples(directory: Path, step: int) -> list[RecordedSample]:
    """The samples of rollout `step`, in the order of their groups.

    Raises RunError where there is no such rollout, or where a file of it is damaged.
    """
    files = sorted(directory.glob(f"step_{step}-*.jsonl"))
    if not files:
        steps = recorded_steps(directory)
        known = f"{steps[0]} to {steps[-1]}" if steps else "none"
        raise RunError(f"{directory} has no samples of step {step}; it has those of: {known}")
    gaps: dict[str, np.ndarray] = {}
    for path in directory.glob(f"gaps_{step}-*.npz"):
        gaps |= read_tree(path, "a file of logprob gaps", dict[str, np.ndarray])
    samples: list[RecordedSample] = []
    for path in files:
        try:
            samples += _of_worker(path, gaps)
        except (ValueError, KeyError, TypeError) as e:
            raise RunError(f"{path} is not a recorded rollout: {type(e).__name__}: {e}") from e
    return sorted(samples, key=lambda sample: (sample.line["group"], sample.line["rollout"]))


def _of_worker(path: Path, gaps: dict[str, np.ndarray]) -> Iterator[RecordedSample]:
    # Of bytes, splitlines splits at line feeds only.
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    arrays = path.with_suffix(".npz")
    if not arrays.exists():
        yield from map(RecordedSample, lines)
        return
    recorded = read_tree(arrays, "a recorded rollout", dict[str, Any])
    for line, sample in zip(lines, recorded["samples"], strict=True):
        token_ids = sample["token_ids"]
        yield RecordedSample(line, token_ids, sample["loss_mask"], gaps.get(tokens_key(token_ids)))


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
