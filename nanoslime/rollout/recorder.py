"""Keeps each rollout's samples for people: one JSON line per sample."""

import json
from collections.abc import Sequence
from pathlib import Path

from nanoslime.storage.shared_files import publish
from nanoslime.types import SampleGroup


def record(path: Path, groups: Sequence[SampleGroup]) -> None:
    """Write the samples to `path` (rollouts/step_<k>.jsonl), whole or not at all."""
    entries = [
        {
            "group": sample.group_id, "prompt": sample.metadata.get("prompt_id"),
            "text": sample.text, "label": sample.label,
            "reward": sample.reward, "advantage": sample.advantage,
            "tokens": [sample.num_tokens, sample.num_response_tokens],
            "status": sample.status, "error": sample.error,
            "versions": [version for _, version in sample.policy_versions],
        }
        for group in groups
        for sample in group.samples
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(entry, ensure_ascii=False, default=str) + "\n" for entry in entries)
    publish(path, "".join(lines).encode())
