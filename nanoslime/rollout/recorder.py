"""Keeps each rollout's samples: one JSON line per sample for people, and one file with
all that training needs.

step_<k>.jsonl   text, reward, status ... of each sample
step_<k>.npz     the same lines as bytes (`samples`), JSON `settings`, and the per-token
                 arrays of all samples, end to end
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from nanoslime.config import RolloutConfig
from nanoslime.storage.shared_files import finite, publish
from nanoslime.types import RunError, Sample, SampleGroup, Status

# The fields of a sample with an entry per token.
_ARRAYS = ("token_ids", "loss_mask", "rollout_logprobs", "routed_experts")


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How the samples of a rollout were drawn; the names are RolloutConfig's."""

    n_samples_per_prompt: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int

    @classmethod
    def of(cls, config: RolloutConfig) -> SamplingSettings:
        return cls(
            n_samples_per_prompt=config.n_samples_per_prompt,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )


def record(
    directory: Path, step: int, groups: Sequence[SampleGroup], settings: SamplingSettings
) -> None:
    """Writes rollout `step`; each of its two files appears whole or not at all."""
    samples = [sample for group in groups for sample in group.samples]
    lines = "".join(_line(sample) for sample in samples).encode()
    settings_text = json.dumps(asdict(settings)).encode()
    arrays = {
        "samples": np.frombuffer(lines, np.uint8),
        "settings": np.frombuffer(settings_text, np.uint8),
    }
    for name in _ARRAYS:
        values = [getattr(sample, name) for sample in samples]
        present = [value for value in values if value is not None]
        if present:
            arrays[name] = np.concatenate(present)
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    directory.mkdir(parents=True, exist_ok=True)
    publish(directory / f"step_{step}.jsonl", lines)
    publish(directory / f"step_{step}.npz", packed.getvalue())


def load(
    directory: Path,
    step: int,
    *,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
) -> list[SampleGroup]:
    """The groups that `record` was given, equal to them where labels and metadata are JSON.

    Raises RunError for a file that is missing or damaged (each array has a CRC-32), and
    where the samples were drawn with another `temperature` or `max_new_tokens` than the
    given one.
    """
    path = directory / f"step_{step}.npz"
    try:
        with np.load(path) as file:
            arrays = dict(file)
        settings = json.loads(bytes(arrays.pop("settings")))
        # Of bytes, splitlines splits at line feeds only.
        lines = bytes(arrays.pop("samples")).splitlines()
        reader = _ArrayReader(arrays)
        samples = [_sample(json.loads(line), reader) for line in lines]
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as e:
        raise RunError(f"{path} is not a recorded rollout: {type(e).__name__}: {e}") from e
    expected = {"temperature": temperature, "max_new_tokens": max_new_tokens}
    for name, value in expected.items():
        drawn_with = settings.get(name)
        if value is not None and drawn_with != value:
            raise RunError(
                f"{path} has samples of rollout.{name}={drawn_with}, not {value}; "
                f"set rollout.{name}={drawn_with}"
            )
    by_group = groupby(samples, attrgetter("group_id"))
    return [SampleGroup(group_id, list(members)) for group_id, members in by_group]


def _line(sample: Sample) -> str:
    experts = sample.routed_experts
    entry = {
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
    return json.dumps(finite(entry), ensure_ascii=False, default=str) + "\n"


class _ArrayReader:
    """Hands out the arrays of all samples piece by piece, in the order of writing."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = arrays
        self._num_read = dict.fromkeys(_ARRAYS, 0)

    def read(self, name: str, size: int) -> np.ndarray:
        """The next `size` entries.

        Raises ValueError where fewer are left, KeyError where there is no such array.
        """
        first = self._num_read[name]
        values = self._arrays[name][first : first + size]
        if len(values) != size:
            raise ValueError(f"{name} ends too early")
        self._num_read[name] += size
        return values


def _sample(entry: dict[str, Any], reader: _ArrayReader) -> Sample:
    """The sample of a line, with the next piece of each array."""
    num_tokens, _ = entry["tokens"]
    num_routed = entry["experts"]
    routed_experts = None
    if num_routed is not None:
        routed_experts = reader.read("routed_experts", num_routed)
    return Sample(
        group_id=entry["group"],
        rollout_id=entry["rollout"],
        token_ids=reader.read("token_ids", num_tokens),
        loss_mask=reader.read("loss_mask", num_tokens),
        rollout_logprobs=reader.read("rollout_logprobs", num_tokens),
        routed_experts=routed_experts,
        text=entry["text"],
        label=entry["label"],
        reward=entry["reward"],
        advantage=entry["advantage"],
        status=Status(entry["status"]),
        error=entry["error"],
        metadata=entry["metadata"],
        policy_versions=[(first, version) for first, version in entry["versions"]],
    )
