"""A disk that is full: a file system of a few megabytes in memory."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB; the test is skipped where we may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "nanoslime-test", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


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
