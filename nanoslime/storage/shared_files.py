"""Small files through which processes on different nodes speak, on a filesystem that may
be slow.

A file is published by writing it aside and renaming it, so a reader sees all of it or
nothing. A network filesystem may still cache "no such file"; listing the directory renews
that.
"""

import errno
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from nanoslime.types import RunError

_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


def publish(path: Path, data: bytes, mode: int = 0o644, *, durable: bool = True) -> None:
    """Write `data` aside and rename it to `path`; `mode` holds from the first byte.

    What is not `durable` may be lost, and the file be cut short, where the machine loses power.
    """
    with written_aside(path, mode, durable=durable) as file:
        file.write(data)


@contextmanager
def written_aside(
    path: Path, mode: int = 0o644, *, durable: bool = True
) -> Iterator[BufferedWriter]:
    """A new file, which gets the name `path` when all is written; see `publish`."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with _created(aside, mode, durable=durable) as file:
            yield file
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def publish_once(path: Path, data: bytes, mode: int = 0o644) -> bool:
    """Publish `data` unless `path` exists; whether it was this call that made it.

    Of several that publish at the same time, on whatever nodes, one makes it.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with _created(aside, mode) as file:
            file.write(data)
        os.link(aside, path)
        return True
    except FileExistsError:
        # NFS may send a request twice, and refuse the second.
        return os.path.samefile(aside, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
    finally:
        aside.unlink(missing_ok=True)
    try:
        with _created(path, mode) as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


@contextmanager
def _created(path: Path, mode: int, *, durable: bool = True) -> Iterator[BufferedWriter]:
    """A new file, which reaches the disk where it is durable.

    Raises FileExistsError where there is one.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        yield file
        if durable:
            file.flush()
            os.fsync(file.fileno())


def publish_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write `value` as JSON, as `publish` does."""
    publish(path, as_json(value), durable=durable)


def as_json(value: Any) -> bytes:
    """What `publish_json` writes."""
    return to_json(value, indent=1, inf_nan_mode="null") + b"\n"


def json_line(value: Any) -> bytes:
    """`value` as a line of JSON, which has no nan and no inf: they are null there. What JSON
    does not know is written as its text."""
    return to_json(value, inf_nan_mode="null", bytes_mode="base64", fallback=str) + b"\n"


def read_json(path: Path, deadline_s: float = 5.0) -> Any:
    """The parsed file. A file that is cut short is read again until `deadline_s` has passed.

    Raises RunError for a file that is still no JSON then, and FileNotFoundError at once
    for a file that does not exist.
    """
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            return json.loads(path.read_bytes())
        except ValueError as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"{path} is still not JSON after {deadline_s:g} s: {error}"
                ) from error
            time.sleep(0.1)


def read_json_lines(path: Path) -> list[Any]:
    """The parsed lines of a file; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def seen(path: Path) -> bool:
    """Whether `path` exists, by listing its directory: network filesystems may cache an
    absence.
    """
    try:
        return path.name in os.listdir(path.parent)
    except FileNotFoundError:
        return False


def sync_directory(path: Path) -> None:
    """Force a directory's entries to disk, as renames and new names in it need."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
