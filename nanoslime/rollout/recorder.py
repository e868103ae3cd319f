"""Keeps each rollout's samples: one JSON line per sample for people, and one file with
all that training needs. Each rollout worker writes those of its own groups.

step_<k>-<worker>.jsonl   text, reward, status ... of each sample
step_<k>-<worker>.npz     the same of each sample, with its arrays, and how it was drawn
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Literal

from nanoslime.rollout.tasks import Sampling
from nanoslime.storage.array_file import read_tree, write_tree
from nanoslime.storage.recorded_samples import recorded_rollout
from nanoslime.storage.shared_files import json_line, publish
from nanoslime.types import RunError, Sample, SampleGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recording:
    """What a worker records, and where."""

    directory: Path
    settings: Sampling  # how the samples were drawn
    mode: Literal["none", "text", "full"] = "full"
    # The last so many rollouts are kept; 0: all.
    keep: int = 0
    worker: int = 0
    num_workers: int = 1


@dataclass(frozen=True, slots=True)
class _Part:
    """What the file of a worker has of a rollout."""

    settings: Sampling
    num_workers: int
    samples: list[Sample]


class Recorder:
    """Records in a thread of its own. What fails there is raised by the next call."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._failure: Exception | None = None
        self._seconds = 0.0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")

    def record(self, step: int, groups: list[SampleGroup]) -> None:
        """Records the worker's groups of rollout `step`; there may be none."""
        self.check()
        if self._recording.mode != "none":
            self._thread.submit(self._run, step, groups)

    def check(self) -> None:
        """Raises RunError where a rollout could not be recorded."""
        if self._failure is not None:
            raise RunError(
                f"a rollout could not be recorded in {self._recording.directory}: {self._failure}"
            ) from self._failure

    def take_seconds(self) -> float:
        """What recording has taken since this was asked the last time."""
        seconds = self._seconds
        self._seconds -= seconds
        return seconds

    def close(self) -> None:
        """Returns when all is written."""
        self._thread.shutdown()

    def _run(self, step: int, groups: list[SampleGroup]) -> None:
        begin = time.monotonic()
        try:
            record(self._recording, step, groups)
        except Exception as e:
            logger.exception("rollout %d could not be recorded", step)
            self._failure = e
        self._seconds += time.monotonic() - begin


def record(recording: Recording, step: int, groups: Sequence[SampleGroup]) -> None:
    """Writes the worker's part of rollout `step`, then removes what need not be kept.

    Each of the two files appears whole or not at all.
    """
    samples = [sample for group in groups for sample in group.samples]
    directory = recording.directory
    directory.mkdir(parents=True, exist_ok=True)
    arrays = recorded_rollout(directory, step, recording.worker)
    lines = arrays.with_suffix(".jsonl")
    written = {lines}
    publish(lines, b"".join(map(_line, samples)))
    if recording.mode == "full":
        write_tree(arrays, _Part(recording.settings, recording.num_workers, samples))
        written.add(arrays)
    _retain(recording, step, written)


def _retain(recording: Recording, step: int, written: set[Path]) -> None:
    """Removes rollouts that are too old, and what else there is of this one: an earlier start of
    the run may have had more workers, or recorded more. Each worker removes its own files, and
    its share of those whose worker this start has not.
    """
    for path in recording.directory.glob("step_*-*.*"):
        number, worker = map(int, path.stem.removeprefix("step_").split("-"))
        is_old = bool(recording.keep) and number <= step - recording.keep
        is_left_over = number == step and path not in written
        if worker % recording.num_workers == recording.worker and (is_old or is_left_over):
            path.unlink(missing_ok=True)


def load(directory: Path, step: int, **settings: float) -> list[SampleGroup]:
    """The groups that all workers recorded, equal to them where labels and metadata are JSON.

    They are in the order of their ids. Raises RunError for a file that is missing or damaged,
    and where the samples were drawn with another one of these `settings` of Sampling.
    """
    samples: list[Sample] = []
    num_workers = 1
    worker = 0
    while worker < num_workers:
        path = recorded_rollout(directory, step, worker)
        part = read_tree(path, "a recorded rollout", _Part)
        num_workers = part.num_workers
        samples += part.samples
        for name, value in settings.items():
            drawn_with = getattr(part.settings, name)
            if drawn_with != value:
                raise RunError(
                    f"{path} has samples of rollout.{name}={drawn_with}, not {value}; "
                    f"set rollout.{name}={drawn_with}"
                )
        worker += 1
    samples.sort(key=attrgetter("group_id"))
    by_group = groupby(samples, attrgetter("group_id"))
    return [SampleGroup(group_id, list(members)) for group_id, members in by_group]


def _line(sample: Sample) -> bytes:
    experts = sample.routed_experts
    entry = {
        "group": sample.group_id,
        "rollout": sample.rollout_id,
        "prompt": sample.metadata.get("prompt_id"),
        "text": sample.text,
        "label": sample.label,
        "reward": sample.reward,
        "reward_parts": sample.reward_parts,
        "advantage": sample.advantage,
        "tokens": [sample.num_tokens, sample.num_response_tokens],
        "experts": None if experts is None else len(experts),
        "status": sample.status,
        "error": sample.error,
        "versions": sample.policy_versions,
        "metadata": sample.metadata,
    }
    return json_line(entry)
