"""Checkpoints that exist whole or not at all.

They are written as step_<k>.partial, hashed, forced to disk, and renamed last.
"""

import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from nanoslime.storage import manifest
from nanoslime.storage.shared_files import sync_directory

logger = logging.getLogger(__name__)

_PARTIAL = ".partial"
_REMOVED = ".removed"
_STEP = re.compile(r"step_(\d+)")


def partial_path(final: Path) -> Path:
    """Where the directory that will become `final` is written."""
    return final.with_name(final.name + _PARTIAL)


def partial_dir(final: Path) -> Path:
    """A new empty directory at `partial_path(final)`; a leftover of that name is removed."""
    partial = partial_path(final)
    if partial.exists() and not _remove(partial):
        # What cannot be removed gives up its name.
        os.rename(partial, partial.with_name(f"{final.name}.{uuid.uuid4().hex}{_PARTIAL}"))
    partial.mkdir(parents=True)
    return partial


def commit(
    partial: Path,
    final: Path,
    known: Mapping[str, str] | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write the manifest of `partial`, force all of it to disk, and rename it to `final`.

    `known` are hashes of files, as `manifest.write` takes them. `check` is called right before
    the rename, and raises where it must not be.
    """
    manifest.write(partial, known)
    put_in_place(partial, final, check)


def put_in_place(partial: Path, final: Path, check: Callable[[], None] = lambda: None) -> None:
    """Force all of `partial` to disk and rename it to `final`, in place of what is there."""
    for folder, _, names in os.walk(partial):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(folder))
    check()
    replaced = _set_aside(final) if final.exists() else None
    os.rename(partial, final)
    sync_directory(final.parent)
    if replaced is not None:
        _remove(replaced)


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of every committed checkpoint, oldest first, damaged or not.

    `manifest.verify` tells whether one is damaged.
    """
    if not directory.is_dir():
        return []
    found = []
    for path in directory.iterdir():
        match = _STEP.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return sorted(found)


def complete_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of every committed checkpoint that has a manifest, oldest first."""
    return [
        (step, path) for step, path in checkpoints(directory) if (path / manifest.NAME).is_file()
    ]


def retain(
    directory: Path, keep_last: int, keep_every: int = 0, best: int | None = None
) -> list[int]:
    """Remove committed checkpoints that no rule keeps; returns their steps. Call it after
    a commit.

    Kept are the newest `keep_last` (at least one), multiples of `keep_every`, and step `best`.
    What cannot be removed is warned of, and tried again by the next call.
    """
    for path in sorted(directory.glob(f"*{_REMOVED}*{_PARTIAL}")):
        _remove(path)
    older = complete_checkpoints(directory)[: -max(1, keep_last)]
    removed = []
    for step, path in older:
        is_kept_multiple = keep_every and step % keep_every == 0
        if step == best or is_kept_multiple:
            continue
        try:
            aside = _set_aside(path)
        except OSError as error:
            logger.warning("%s cannot be removed now: %s", path, error)
            continue
        _remove(aside)
        removed.append(step)
    return removed


def remove_leftovers(directory: Path) -> list[Path]:
    """Remove what an interrupted write or removal left; returns the paths.

    What cannot be removed is warned of and stays. Call it when a run starts, before it writes.
    """
    if not directory.is_dir():
        return []
    return [path for path in sorted(directory.glob(f"*{_PARTIAL}")) if _remove(path)]


def _set_aside(path: Path) -> Path:
    """Move a committed directory to another name, so that half of it is no checkpoint."""
    aside = partial_dir(path.with_name(f"{path.name}{_REMOVED}"))
    os.replace(path, aside)  # an empty directory may be replaced
    return aside


def _remove(path: Path) -> bool:
    """Remove a directory that is no checkpoint; whether all of it is gone.

    NFS keeps a file that somebody has open as .nfs<number>, and its directory with it.
    """
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return not path.exists()
    except OSError as error:
        logger.warning("%s cannot be removed now: %s", path, error)
        return False
    return True
