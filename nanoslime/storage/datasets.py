"""Finds the prompts of a run: files and directories."""

from dataclasses import replace
from pathlib import Path

from nanoslime.config import DataConfig


def with_local_prompts(data: DataConfig) -> DataConfig:
    """The configuration with absolute paths of all prompts, and a name for each source."""
    sources = [
        replace(source, prompts=_local(source.prompts), name=source.title)
        for source in data.sources
    ]
    return replace(
        data,
        prompts=_local(data.prompts),
        sources=sources,
        eval_prompts=_local(data.eval_prompts),
    )


def _local(name: str) -> str:
    return str(Path(name).expanduser().absolute()) if name else ""
