"""A TMPDIR that is too long for sockets is replaced, once and audibly."""

import os
import socket
import tempfile
from pathlib import Path

import pytest

from nanoslime.processes import temp
from nanoslime.processes.temp import ensure_short_tmpdir
from nanoslime.types import RunError

# What Ray 2.60 puts below TMPDIR, with a process id of seven digits.
RAYS = "ray/session_2026-11-27_23-17-46_123456_4194304/sockets/plasma_store"


@pytest.fixture
def long_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / ("d" * 90)
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return directory


def test_a_long_tmpdir_is_replaced_and_said(long_tmpdir, caplog) -> None:
    ensure_short_tmpdir()
    ensure_short_tmpdir()
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == "/tmp"
    [warning] = caplog.messages
    assert warning.startswith(f"TMPDIR={long_tmpdir} is longer than 37 bytes")


@pytest.mark.parametrize(("num_bytes", "stays"), [(37, True), (38, False)])
def test_the_longest_tmpdir_that_stays_has_room_for_rays_sockets(
    num_bytes: int, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as root:
        directory = Path(root, "d" * (num_bytes - len(root) - 1))
        path = directory / RAYS
        path.parent.mkdir(parents=True)
        monkeypatch.setenv("TMPDIR", str(directory))
        monkeypatch.setattr(tempfile, "tempdir", None)
        ensure_short_tmpdir()
        assert (os.environ["TMPDIR"] == str(directory)) is stays
        if stays:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_directory_that_ray_would_make_is_replaced(name, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setenv(name, "/tmp/none/" + "d" * 90)
    monkeypatch.setattr(tempfile, "tempdir", None)
    ensure_short_tmpdir()
    assert os.environ[name] == "/tmp"


def test_without_a_short_directory_the_true_reason_is_told(long_tmpdir, monkeypatch) -> None:
    monkeypatch.setattr(temp, "_SHORT", (str(long_tmpdir / "none"),))
    with pytest.raises(RunError, match=r"TMPDIR=.* is longer than 37 bytes.*set a shorter TMPDIR"):
        ensure_short_tmpdir()
