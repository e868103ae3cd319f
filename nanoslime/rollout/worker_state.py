"""The groups of a rollout worker in a checkpoint, partial samples included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanoslime.rollout.policy import Call
from nanoslime.rollout.recorder import sample_entry, sample_of
from nanoslime.rollout.tasks import GroupTask, Sampling
from nanoslime.storage.array_file import ArrayFile, ArrayWriter
from nanoslime.types import Generation, Prompt, Sample, Status


@dataclass(frozen=True, slots=True)
class SavedRollout:
    """What a rollout has so far: requests until its samples are scored, then these."""

    transcript: list[Call]
    samples: list[Sample] | None


@dataclass(frozen=True, slots=True)
class SavedGroup:
    task: GroupTask
    rollouts: list[SavedRollout]


def encode(groups: Sequence[SavedGroup]) -> tuple[ArrayWriter, Any]:
    """The arrays of these groups, and the tree that goes with them into a file."""
    writer = ArrayWriter()
    return writer, [_group_entry(group, writer) for group in groups]


def read(path: Path) -> list[SavedGroup]:
    """Raises RunError for a file that is missing or damaged."""
    file = ArrayFile(path, "the state of a rollout worker")
    try:
        return [_group_of(entry, file) for entry in file.tree]
    except (ValueError, KeyError, TypeError) as e:
        raise file.error(e) from e


def _group_entry(group: SavedGroup, writer: ArrayWriter) -> dict[str, Any]:
    task = group.task
    prompt = {name: getattr(task.prompt, name) for name in Prompt.__dataclass_fields__}
    return {
        "group_id": task.group_id,
        "sampling": asdict(task.sampling),
        "seed": task.seed,
        "reward": task.reward,
        "prompt": prompt | {"token_ids": writer.add(task.prompt.token_ids)},
        "rollouts": [_rollout_entry(rollout, writer) for rollout in group.rollouts],
    }


def _rollout_entry(rollout: SavedRollout, writer: ArrayWriter) -> dict[str, Any]:
    samples = rollout.samples
    if samples is not None:
        samples = [sample_entry(sample, writer) for sample in samples]
    calls = [_call_entry(call, writer) for call in rollout.transcript]
    return {"samples": samples, "transcript": calls}


def _call_entry(call: Call, writer: ArrayWriter) -> dict[str, Any]:
    generation = call.generation
    return {
        "prompt": writer.add(np.array(call.token_ids, np.int32)),
        "token_ids": writer.add(np.array(generation.token_ids, np.int32)),
        "logprobs": writer.add(np.array(generation.logprobs, np.float64)),
        "status": generation.status,
        "versions": generation.versions,
        "error": generation.error,
        "routed_experts": writer.add(generation.routed_experts),
    }


def _group_of(entry: dict[str, Any], file: ArrayFile) -> SavedGroup:
    prompt = dict(entry["prompt"])
    prompt["token_ids"] = file.get(prompt["token_ids"])
    sampling = dict(entry["sampling"])
    for name in ("stop", "stop_token_ids"):
        sampling[name] = tuple(sampling[name])
    task = GroupTask(
        group_id=entry["group_id"],
        prompt=Prompt(**prompt),
        sampling=Sampling(**sampling),
        seed=entry["seed"],
        reward=entry["reward"],
    )
    return SavedGroup(task, [_rollout_of(rollout, file) for rollout in entry["rollouts"]])


def _rollout_of(entry: dict[str, Any], file: ArrayFile) -> SavedRollout:
    samples = entry["samples"]
    if samples is not None:
        samples = [sample_of(sample, file) for sample in samples]
    return SavedRollout([_call_of(call, file) for call in entry["transcript"]], samples)


def _call_of(entry: dict[str, Any], file: ArrayFile) -> Call:
    generation = Generation(
        token_ids=_list(file.get(entry["token_ids"])),
        logprobs=_list(file.get(entry["logprobs"])),
        status=Status(entry["status"]),
        versions=[(first, version) for first, version in entry["versions"]],
        error=entry["error"],
        routed_experts=file.get(entry["routed_experts"]),
    )
    return Call(_list(file.get(entry["prompt"])), generation)


def _list(array: np.ndarray | None) -> list[Any]:
    return [] if array is None else array.tolist()
