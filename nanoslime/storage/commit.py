"""Checkpoints that exist whole or not at all: written as step_<k>.partial, hashed, synced, renamed last."""

import os
import re
import shutil
from pathlib import Path

from nanoslime.storage import manifest
from nanoslime.storage.shared_files import sync_directory

_PARTIAL = ".partial"
_STEP = re.compile(r"step_(\d+)")


def partial_path(final: Path) -> Path:
    """Where what will become `final` is written."""
    return final.with_name(final.name + _PARTIAL)


def partial_dir(final: Path) -> Path:
    """A new empty directory at `partial_path(final)`; a leftover of that name goes."""
    partial = partial_path(final)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def commit(partial: Path, final: Path) -> None:
    """Write the manifest of `partial`, force all of it to disk, and rename it to `final`."""
    manifest.write(partial)
    put_in_place(partial, final)


def put_in_place(partial: Path, final: Path) -> None:
    """Force all of `partial` to disk and rename it to `final`; what is there already is replaced."""
    for folder, _, names in os.walk(partial):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(folder))
    doomed = _set_aside(final) if final.exists() else None
    os.rename(partial, final)
    sync_directory(final.parent)
    if doomed:
        shutil.rmtree(doomed)


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of what was committed, oldest first, damaged or not; manifest.verify tells."""
    if not directory.is_dir():
        return []
    named = [(_STEP.fullmatch(path.name), path) for path in directory.iterdir()]
    return sorted((int(m[1]), path) for m, path in named if m)


def complete_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Those of `checkpoints` that have a manifest."""
    return [
        (step, path) for step, path in checkpoints(directory) if (path / manifest.NAME).is_file()
    ]


def retain(
    directory: Path, keep_last: int, keep_every: int = 0, best: int | None = None
) -> list[int]:
    """Remove committed checkpoints that no rule keeps; returns their steps. Call it after a commit.

    Kept: the newest `keep_last` (at least one), multiples of `keep_every`, and step `best`.
    """
    older = complete_checkpoints(directory)[: -max(1, keep_last)]
    doomed = [(k, path) for k, path in older if k != best and (not keep_every or k % keep_every)]
    for _, path in doomed:
        shutil.rmtree(_set_aside(path))
    return [step for step, _ in doomed]


def remove_leftovers(directory: Path) -> list[Path]:
    """Remove what an interrupted write or removal left; call it when a run starts, before it writes."""
    leftovers = sorted(directory.glob(f"*{_PARTIAL}")) if directory.is_dir() else []
    for path in leftovers:
        shutil.rmtree(path)
    return leftovers


def _set_aside(path: Path) -> Path:
    """Move a committed directory to another name, so that half of it is never taken for a checkpoint."""
    doomed = partial_dir(path.with_name(f"{path.name}.removed"))
    os.replace(path, doomed)  # an empty directory may be replaced
    return doomed
