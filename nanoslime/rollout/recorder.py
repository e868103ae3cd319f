"""Keeps each rollout's samples: one JSON line per sample for people, and all that training needs in one file.

step_<k>.jsonl   text, reward, status ... of each sample
step_<k>.npz     the same lines as bytes (`samples`), JSON `settings`, and the per-token arrays, end to end
"""

import io
import json
import zipfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from nanoslime.storage.shared_files import publish
from nanoslime.types import RunError, Sample, SampleGroup, Status

_ARRAYS = ("token_ids", "loss_mask", "rollout_logprobs", "routed_experts")


def record(directory: Path, step: int, groups: Sequence[SampleGroup], **settings: Any) -> None:
    """Writes rollout `step` with `settings` of its RolloutConfig; each file whole or not at all."""
    samples = [sample for group in groups for sample in group.samples]
    lines = "".join(
        json.dumps(_entry(s), ensure_ascii=False, default=str) + "\n" for s in samples
    ).encode()
    texts = {"samples": lines, "settings": json.dumps(settings, default=str).encode()}
    arrays: dict[str, Any] = {name: np.frombuffer(text, np.uint8) for name, text in texts.items()}
    for name in _ARRAYS:
        if parts := [part for s in samples if (part := getattr(s, name)) is not None]:
            arrays[name] = np.concatenate(parts)
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    directory.mkdir(parents=True, exist_ok=True)
    publish(directory / f"step_{step}.jsonl", lines)
    publish(directory / f"step_{step}.npz", packed.getvalue())


def load(directory: Path, step: int, **settings: Any) -> list[SampleGroup]:
    """The groups that `record` was given, equal to them where labels and metadata are JSON.

    Raises RunError for a file that is missing, damaged (each array has a CRC-32), or of other `settings`.
    """
    path = directory / f"step_{step}.npz"
    try:
        with np.load(path) as file:
            arrays = dict(file)
        recorded = json.loads(bytes(arrays.pop("settings")))
        lines = bytes(arrays.pop("samples")).splitlines()  # of bytes: at line feeds only
        used = dict.fromkeys(arrays, 0)
        samples = [_sample(json.loads(line), arrays, used) for line in lines]
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as e:
        raise RunError(f"{path} is not a recorded rollout: {type(e).__name__}: {e}") from e
    for name, value in settings.items():
        if (theirs := recorded.get(name)) != value:
            raise RunError(
                f"{path} has samples of rollout.{name}={theirs}, not {value}; set the former"
            )
    return [
        SampleGroup(group_id, list(s)) for group_id, s in groupby(samples, lambda s: s.group_id)
    ]


def _entry(sample: Sample) -> dict[str, Any]:
    experts = sample.routed_experts
    return {
        "group": sample.group_id,
        "rollout": sample.rollout_id,
        "prompt": sample.metadata.get("prompt_id"),
        "text": sample.text,
        "label": sample.label,
        "reward": sample.reward,
        "advantage": sample.advantage,
        "tokens": [sample.num_tokens, sample.num_response_tokens],
        "experts": None if experts is None else len(experts),
        "status": sample.status,
        "error": sample.error,
        "versions": sample.policy_versions,
        "metadata": sample.metadata,
    }


def _sample(entry: dict[str, Any], arrays: dict[str, np.ndarray], used: dict[str, int]) -> Sample:
    """The sample of a line, with its share of each array; `used`: what the samples before it took."""
    rows = dict.fromkeys(_ARRAYS, entry["tokens"][0]) | {"routed_experts": entry["experts"]}
    own = {}
    for name, size in rows.items():
        if size is not None:
            used[name] += size
            own[name] = arrays[name][used[name] - size : used[name]]
            if len(own[name]) != size:
                raise ValueError(f"{name} ends too early")
    return Sample(
        group_id=entry["group"],
        rollout_id=entry["rollout"],
        text=entry["text"],
        label=entry["label"],
        reward=entry["reward"],
        advantage=entry["advantage"],
        status=Status(entry["status"]),
        error=entry["error"],
        metadata=entry["metadata"],
        policy_versions=[(first, version) for first, version in entry["versions"]],
        **own,
    )
