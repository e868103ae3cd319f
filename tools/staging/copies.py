"""Copies on a node's own disk: made by one process at a time, hashed, reused, and the oldest ones
that nobody uses removed where there is no room.

Which copies there are, and their locks, is said in jobs/staging.py.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from io import BufferedWriter
from pathlib import Path

import xxhash

from jobs.staging import Copy, Staged
from nanoslime.processes.logs import FORMAT
from nanoslime.storage.shared_files import publish_json, read_json
from nanoslime.types import RunError

logger = logging.getLogger(__name__)

BLOCK_BYTES = 8 * 2**20
MANIFEST = ".manifest.json"
# A filesystem that is nearly full is slow, and others use it too.
_ROOM_FACTOR = 1.05

# Writes the files of a copy into a new directory, and returns the hash of each by its name there.
Fill = Callable[[Path], dict[str, str]]
# The name of a file that is not what it has to be, by the hashes of all; empty without one.
Differing = Callable[[dict[str, str]], str]


def stage(copy: Copy, fill: Fill, differing: Differing, lock: int) -> Staged:
    """The copy on this node, and the lock held shared. `fill` writes its files.

    RunError where what was read twice is not what it has to be.
    """
    copied_bytes = 0
    fcntl.flock(lock, fcntl.LOCK_SH)
    found = _hash_all(copy.path)
    for _ in range(2):
        if found is None:
            # Another one may have copied it before this one is alone.
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _hash_all(copy.path)
        if found is None:
            note = _make_room(copy)
            if note:
                return Staged(str(copy.source), note=note)
            found = _copy(copy, fill)
            copied_bytes += copy.num_bytes
        wrong = differing(found)
        if not wrong:
            fcntl.flock(lock, fcntl.LOCK_SH)
            os.utime(copy.path)
            return Staged(str(copy.path), copied_bytes)
        logger.warning("%s of %s is not what the run's other nodes have", wrong, copy.path)
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(copy.path)
        found = None
    raise RunError(
        f"{copy.source / wrong} was read twice on {os.uname().nodename}, and is not what the "
        "other nodes have read; the shared filesystem or the node's memory or disk is broken"
    )


def _hash_all(folder: Path) -> dict[str, str] | None:
    """The hashes of a copy's files; None where there is none, or it is not what it was."""
    if not (folder / MANIFEST).exists():
        return None
    kept = read_json(folder / MANIFEST)
    found = {name: hashed(folder / name) for name in kept if (folder / name).exists()}
    return found if found == kept else None


def _copy(copy: Copy, fill: Fill) -> dict[str, str]:
    """Has all files written, and returns their hashes. RunError where one is no whole file."""
    aside = copy.storage / f".{copy.key}"
    aside.mkdir(mode=0o700)
    try:
        hashes = fill(aside)
        publish_json(aside / MANIFEST, hashes)
        os.rename(aside, copy.path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return hashes


def hashed(source: Path, target: BufferedWriter | None = None) -> str:
    """The hash of a file, which is written to the target as it is read."""
    digest = xxhash.xxh3_128()
    with source.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            if target is not None:
                target.write(block)
    return digest.hexdigest()


def _make_room(copy: Copy) -> str:
    """Removes what is left of this copy, all halves that nobody goes on with, and as far as needed
    the oldest copies that nobody uses; says where that is too few.
    """
    needed = copy.num_bytes * _ROOM_FACTOR
    for own in (copy.path, copy.storage / f".{copy.key}"):
        shutil.rmtree(own, ignore_errors=True)
    folders = [folder for folder in copy.storage.iterdir() if folder.is_dir()]
    halves = [folder for folder in folders if folder.name[0] == "."]
    whole = [folder for folder in folders if (folder / MANIFEST).exists()]
    oldest = sorted(set(whole) - set(halves), key=lambda folder: folder.stat().st_mtime)
    for folder in [*halves, *oldest]:
        if folder in oldest and shutil.disk_usage(copy.storage).free >= needed:
            break
        lock_file = copy.storage / f"{folder.name.removeprefix('.')}.lock"
        with lock_file.open("a") as lock, suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            logger.info("%s makes room for %s", folder, copy.key)
            shutil.rmtree(folder)
    free = shutil.disk_usage(copy.storage).free
    if free >= needed:
        return ""
    return (
        f"{copy.storage} has {free / 2**30:.1f} GiB free, and a copy of {copy.source} "
        f"takes {needed / 2**30:.1f} GiB"
    )


def run(copy: Copy, fill: Fill, differing: Differing, result: Path, lock: int) -> int:
    """The body of a program that makes a copy for an agent: its exit code, and its result."""
    logging.basicConfig(level=logging.INFO, format=FORMAT)
    try:
        staged = stage(copy, fill, differing, lock)
    except OSError as error:
        staged = Staged(str(copy.source), note=f"the copy in {copy.storage} failed: {error}")
    except RunError as error:
        logger.error("%s", error)
        return 1
    if staged.note:
        fcntl.flock(lock, fcntl.LOCK_UN)
    publish_json(result, asdict(staged))
    return 0
