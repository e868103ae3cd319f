"""A disk that is full, and a directory that is busy: a small file system in memory."""

import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(directory: Path) -> Iterator[None]:
    """A file system of 3 MiB at `directory`, which may be moved while it is there.

    The test is skipped where we may not mount one.
    """
    name = f"nanoslime-{uuid.uuid4().hex}"
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", name, str(directory)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        yield
    finally:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        [place] = [place for device, place, *_ in mounts if device == name]
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    with mounted(disk):
        yield disk


def fill(disk: Path, leave_bytes: int = 0) -> None:
    """Write until so many bytes are left."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        for size in (65_536, 4096, 1):
            try:
                while file.write(b"b" * size):
                    pass
            except OSError:
                continue
        file.truncate(file.tell() - leave_bytes)
