"""The groups of a rollout worker in a checkpoint, partial samples included."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanoslime.rollout.policy import Call
from nanoslime.rollout.tasks import GroupTask
from nanoslime.storage.array_file import read_tree, write_tree
from nanoslime.types import Sample


@dataclass(frozen=True, slots=True)
class SavedRollout:
    """What a rollout has so far: requests until its samples are scored, then these."""

    transcript: list[Call]
    samples: list[Sample] | None


@dataclass(frozen=True, slots=True)
class SavedGroup:
    task: GroupTask
    rollouts: list[SavedRollout]


def write(path: Path, groups: list[SavedGroup]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tree(path, groups)


def read(path: Path) -> list[SavedGroup]:
    """Raises RunError for a file that is missing or damaged."""
    return read_tree(path, "the state of a rollout worker", list[SavedGroup])
