"""Carries out a plan: every file once, several at a time, resumable; in place only when all is there.

OUT.partial/  files ...  progress.json: the files that are done, with their checksums
-> small files -> manifest.json -> fsync -> OUT
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from nanoslime.storage import manifest
from nanoslime.storage.commit import partial_path, put_in_place
from nanoslime.storage.shared_files import publish_json, read_json
from nanoslime.types import RunError
from tools.conversion.plan import Plan
from tools.conversion.tensor_copy import Fill, Progress, TargetFile, write

PROGRESS = "progress.json"


class _Stopped(Exception):
    """Another file failed."""


@dataclass(slots=True)
class _Journal:
    """Which files of the partial directory are whole, kept there for a rerun."""

    directory: Path
    plan: str
    done: dict[str, str | None] = field(default_factory=dict)  # file -> checksum
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, directory: Path, plan: str) -> _Journal:
        """That of an interrupted run of the same plan, or a new one in an empty directory."""
        if (directory / PROGRESS).exists() and (found := read_json(directory / PROGRESS))[
            "plan"
        ] == plan:
            return cls(directory, plan, found["done"])
        for path in directory.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return cls(directory, plan)

    def add(self, name: str, checksum: str | None) -> None:
        with self._lock:
            self.done[name] = checksum
            publish_json(self.directory / PROGRESS, {"plan": self.plan, "done": self.done})


def run(
    plan: Plan, out: Path, force: bool, *, threads: int, checksums: bool, progress: Progress
) -> None:
    """Write `plan` to `out`, with a manifest unless `checksums` is off.

    Raises RunError where `out` exists without `force`, another conversion writes it, or the disk is full.
    Whatever fails ends everything, leaves `out` and the source as they were; running it again continues.
    """
    check_output(plan, out := out.resolve(), force)
    partial = partial_path(out)
    partial.mkdir(parents=True, exist_ok=True)
    with _alone(partial):
        journal = _Journal.open(partial, _fingerprint(plan, checksums))
        todo = []
        for file in plan.files:
            path = partial / file.name
            if (
                file.name in journal.done
                and path.is_file()
                and path.stat().st_size == file.num_bytes
            ):
                progress(file.num_bytes)
            else:
                path.unlink(missing_ok=True)  # its space is free
                todo.append(file)
        _check_space(sum(file.num_bytes for file in todo), partial)
        for folder in {(partial / file.name).parent for file in plan.files}:
            folder.mkdir(exist_ok=True)
        try:
            _write_all(todo, journal, threads, checksums, progress)
            plan.finish(partial)
            (partial / PROGRESS).unlink(missing_ok=True)
            if checksums:
                manifest.write(
                    partial, {name: digest for name, digest in journal.done.items() if digest}
                )
            check_output(plan, out, force)  # somebody may have made it meanwhile
            put_in_place(partial, out)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RunError(
                f"{partial}: no space left; free some and run the same command again"
            ) from error


def check_output(plan: Plan, out: Path, force: bool) -> None:
    """RunError where `out` exists and `force` is not given, and where it or its partial directory is, holds,
    or is in, something that the plan reads."""
    if out.exists() and not (force and out.is_dir()):
        how = "or replace it with --force" if out.is_dir() else "it is no directory"
        raise RunError(f"{out} exists; choose another output, {how}")
    source, mine = plan.source, out.resolve()
    for read in {source.path, source.side, source.manifest or source.path}:
        theirs = read.resolve()
        for path in (mine, partial_path(mine)):
            if path == theirs or path in theirs.parents or theirs in path.parents:
                raise RunError(f"{path} overlaps the source {read}; choose another output")


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Holds a lock that ends with the process."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"{directory} is being written by another conversion") from error
    try:
        yield
    finally:
        os.close(descriptor)


def _write_all(
    todo: list[TargetFile], journal: _Journal, threads: int, checksums: bool, progress: Progress
) -> None:
    failed = threading.Event()

    def watched(count: int) -> None:
        if failed.is_set():
            raise _Stopped
        progress(count)

    def one(file: TargetFile) -> None:
        try:
            watched(0)
            journal.add(
                file.name, write(file, journal.directory, checksum=checksums, progress=watched)
            )
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(one, file) for file in todo]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            failed.set()
            pool.shutdown(cancel_futures=True)
    errors = [f.exception() for f in futures if not f.cancelled()]
    for error in sorted((e for e in errors if e), key=lambda e: isinstance(e, _Stopped)):
        raise error


def _check_space(num_bytes: int, directory: Path) -> None:
    if (free := shutil.disk_usage(directory).free) < num_bytes:
        wanted = f"{num_bytes / 1e9:.2f} GB are to be written"
        raise RunError(f"{directory}: {wanted}, {free / 1e9:.2f} GB are free")


def _fingerprint(plan: Plan, checksums: bool) -> str:
    """Names the plan and the very files it reads: a rerun continues only what would become the same."""
    state, files = xxhash.xxh3_128(str(checksums).encode()), set[Path]()
    for file in plan.files:
        state.update(file.name.encode())
        for item in file.content:
            if isinstance(item, Fill):
                files |= {source.chunk.file for source in item.sources}
                state.update(repr((item.dtype, item.shape, item.sources)).encode())
            else:
                state.update(item)
    for path in sorted(files):
        known = path.stat()
        state.update(
            f"{path.resolve()} {known.st_size} {known.st_mtime_ns} {known.st_ino}".encode()
        )
    return state.hexdigest()
