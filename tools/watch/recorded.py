"""Recorded rollouts as a person reads them: each sample's line, its tokens and their gaps."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanoslime.storage.array_file import read_tree
from nanoslime.storage.token_gaps import tokens_key
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
