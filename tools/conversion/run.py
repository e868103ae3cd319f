"""Carries out a conversion plan: every file once, several at a time, resumable.

The output is written aside and takes its place only when all of it is there:

    OUT.partial/  files ..., and progress.json: the files that are done, with their checksums
    -> small files -> manifest.json -> fsync -> OUT
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from nanoslime.storage import manifest
from nanoslime.storage.commit import partial_path, put_in_place
from nanoslime.storage.shared_files import publish_json, read_json
from nanoslime.types import RunError
from tools.conversion.plan import ConversionPlan
from tools.conversion.tensor_copy import Fill, Progress, TargetFile, write

PROGRESS = "progress.json"


class _Stopped(Exception):
    """A file is not finished because another one failed."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a plan is carried out.

    `force` replaces an existing output. `threads` files are written at a time.
    `checksums` are computed on the way and written as a manifest.
    """

    force: bool
    threads: int
    checksums: bool


@dataclass(slots=True)
class _Journal:
    """Which files of the partial directory are whole; it is kept there for a rerun.

    `done` maps a file's name to its checksum, if checksums are computed.
    """

    directory: Path
    fingerprint: str
    done: dict[str, str | None] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, directory: Path, fingerprint: str) -> _Journal:
        """The journal of an interrupted run of the same plan, or a new one in an emptied
        directory.
        """
        if (directory / PROGRESS).exists():
            found = read_json(directory / PROGRESS)
            if found["plan"] == fingerprint:
                return cls(directory, fingerprint, found["done"])
        for path in directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        return cls(directory, fingerprint)

    def holds(self, file: TargetFile) -> bool:
        """Whether the file is there and whole."""
        path = self.directory / file.name
        if file.name not in self.done or not path.is_file():
            return False
        return path.stat().st_size == file.num_bytes

    def add(self, name: str, checksum: str | None) -> None:
        with self._lock:
            self.done[name] = checksum
            values = {"plan": self.fingerprint, "done": self.done}
            publish_json(self.directory / PROGRESS, values)

    def remove(self) -> None:
        (self.directory / PROGRESS).unlink(missing_ok=True)

    def checksums(self) -> dict[str, str]:
        return {name: checksum for name, checksum in self.done.items() if checksum}


def run(plan: ConversionPlan, out: Path, options: Options, progress: Progress) -> None:
    """Write `plan` to `out`, with a manifest unless checksums are off.

    Raises RunError where `out` exists without `force`, another conversion writes it, or
    the disk is full. Whatever fails ends everything and leaves `out` and the source as
    they are; running it again continues.
    """
    out = out.resolve()
    check_output(plan, out, options.force)
    partial = partial_path(out)
    partial.mkdir(parents=True, exist_ok=True)
    with _alone(partial):
        journal = _Journal.open(partial, _fingerprint(plan, options.checksums))
        todo = _missing_files(plan, journal, progress)
        _check_space(sum(file.num_bytes for file in todo), partial)
        for file in plan.files:
            (partial / file.name).parent.mkdir(exist_ok=True)
        try:
            _write_all(todo, journal, options, progress)
            plan.finish(partial)
            journal.remove()
            if options.checksums:
                manifest.write(partial, journal.checksums())
            check_output(plan, out, options.force)  # somebody may have made it meanwhile
            put_in_place(partial, out)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RunError(
                f"{partial}: no space left; free some and run the same command again"
            ) from error


def check_output(plan: ConversionPlan, out: Path, force: bool) -> None:
    """Raises RunError where `out` may not be written.

    It may not exist without `force`. Neither it nor its partial directory may be, hold,
    or be in something that the plan reads.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} exists; choose another output, it is no directory")
    if out.exists() and not force:
        raise RunError(f"{out} exists; choose another output, or replace it with --force")
    source = plan.source
    places_read = {source.path, source.metadata_dir, source.manifest_dir or source.path}
    written = out.resolve()
    for place in places_read:
        resolved = place.resolve()
        for path in (written, partial_path(written)):
            if path == resolved or path in resolved.parents or resolved in path.parents:
                raise RunError(f"{path} overlaps the source {place}; choose another output")


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Holds a lock that ends with the process."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise RunError(f"{directory} is being written by another conversion") from error
    try:
        yield
    finally:
        os.close(descriptor)


def _missing_files(plan: ConversionPlan, journal: _Journal, progress: Progress) -> list[TargetFile]:
    """The files that are still to be written; what an interrupted run left of them is
    removed.
    """
    todo = []
    for file in plan.files:
        if journal.holds(file):
            progress(file.num_bytes)
        else:
            (journal.directory / file.name).unlink(missing_ok=True)  # frees its space
            todo.append(file)
    return todo


def _write_all(
    todo: list[TargetFile], journal: _Journal, options: Options, progress: Progress
) -> None:
    """Write the files, `options.threads` at a time; the first failure ends all of them."""
    failed = threading.Event()

    def stop_after_a_failure(num_bytes: int) -> None:
        if failed.is_set():
            raise _Stopped
        progress(num_bytes)

    def write_one(file: TargetFile) -> None:
        try:
            stop_after_a_failure(0)
            checksum = write(
                file,
                journal.directory,
                checksum=options.checksums,
                progress=stop_after_a_failure,
            )
            journal.add(file.name, checksum)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(options.threads) as pool:
        futures = [pool.submit(write_one, file) for file in todo]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            failed.set()
            pool.shutdown(cancel_futures=True)
    _raise_failure(futures)


def _raise_failure(futures: list[Future[None]]) -> None:
    """Raises what went wrong in a file; that files were stopped is only its consequence."""
    errors = [future.exception() for future in futures if not future.cancelled()]
    stopped = None
    for error in errors:
        if isinstance(error, _Stopped):
            stopped = error
        elif error is not None:
            raise error
    if stopped is not None:
        raise stopped


def _check_space(num_bytes: int, directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise RunError(
            f"{directory}: {num_bytes / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free"
        )


def _fingerprint(plan: ConversionPlan, checksums: bool) -> str:
    """Names the plan and the very files it reads: a rerun continues only what would
    become the same.
    """
    digest = xxhash.xxh3_128(str(checksums).encode())
    files_read: set[Path] = set()
    for file in plan.files:
        digest.update(file.name.encode())
        for item in file.content:
            if isinstance(item, Fill):
                files_read |= {source.chunk.file for source in item.sources}
                digest.update(repr((item.dtype, item.shape, item.sources)).encode())
            else:
                digest.update(item)
    for path in sorted(files_read):
        state = path.stat()
        identity = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ino}"
        digest.update(identity.encode())
    return digest.hexdigest()
