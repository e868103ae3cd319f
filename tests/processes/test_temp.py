"""Processes have a temporary directory of their own, with room for sockets; all of it goes."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanoslime.processes import temp
from nanoslime.processes.temp import private_tmpdir
from nanoslime.types import RunError

# What Ray 2.60 puts below TMPDIR, with a process id of seven digits.
RAYS = "ray/session_2026-11-27_23-17-46_123456_4194304/sockets/plasma_store"


@pytest.fixture(autouse=True)
def own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short path."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as root:
        yield Path(root)


def test_what_libraries_leave_goes_and_nobody_else_enters(short, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with private_tmpdir():
        own = Path(os.environ["TMPDIR"])
        assert own.parent == short and str(own) == tempfile.gettempdir()
        assert own.stat().st_mode & 0o777 == 0o700
        (own / "ray").mkdir()
        (own / "ray").chmod(0o777)
        tempfile.NamedTemporaryFile(delete=False).close()  # as SGLang does
        subprocess.run([sys.executable, "-c", "import tempfile; tempfile.mkdtemp()"], check=True)
        assert len(list(own.iterdir())) == 3 + 1  # its owner's lock
    assert list(short.iterdir()) == []
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(short)


OWNER = """
import os, time
from nanoslime.processes.temp import private_tmpdir
with private_tmpdir():
    open(os.environ["TMPDIR"] + "/left", "w").close()
    print(os.environ["TMPDIR"], flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_has_left_goes_with_the_next_one(short, monkeypatch, no_leftovers):
    """That of one that lives stays, and so does what is another user's, or has no owner."""
    environ = {**os.environ, "TMPDIR": str(short)}
    command = [sys.executable, "-c", OWNER]
    owners = [
        subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    left, lives, other = [Path(owner.stdout.readline().strip()) for owner in owners]
    for killed in (owners[0], owners[2]):
        killed.kill()
        killed.wait()
    (short / "ns-42-0-0123abcd").mkdir()
    os.chown(other, 65534, -1)
    trap = short / "ns-trap"
    trap.mkdir()
    os.mkfifo(trap / "owner")
    os.chown(trap, 65534, -1)
    monkeypatch.setenv("TMPDIR", str(short))
    with private_tmpdir():
        assert not left.exists()
        assert (lives / "left").exists() and (other / "left").exists()
        assert (short / "ns-42-0-0123abcd").exists()
    owners[1].kill()
    owners[1].wait()
    for owner in owners:
        owner.stdout.close()


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_directory_that_is_too_long_is_replaced_and_said(
    name, tmp_path, monkeypatch, caplog
) -> None:
    long = tmp_path / ("d" * 90)
    long.mkdir()
    monkeypatch.setenv(name, str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with private_tmpdir():
        assert Path(os.environ[name]).parent == Path("/tmp")
    assert os.environ[name] == str(long)
    [warning] = caplog.messages
    assert warning.startswith(f"TMPDIR={long} is longer than 25 bytes")


@pytest.mark.parametrize(("num_bytes", "stays"), [(25, True), (26, False)])
def test_the_longest_tmpdir_that_stays_has_room_for_rays_sockets(
    short: Path, num_bytes: int, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = short / ("d" * (num_bytes - len(str(short)) - 1))
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    with private_tmpdir():
        own = Path(os.environ["TMPDIR"])
        assert (own.parent == directory) is stays
        path = own / RAYS
        path.parent.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))


@pytest.mark.parametrize(("mode", "stays"), [(0o700, True), (0o755, False)])
def test_a_private_one_without_room_for_another_level_stays(
    short: Path, mode: int, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver has that of its node's agent."""
    directory = short / ("d" * (37 - len(str(short)) - 1))
    directory.mkdir()
    directory.chmod(mode)
    monkeypatch.setenv("TMPDIR", str(directory))
    with private_tmpdir():
        assert (os.environ["TMPDIR"] == str(directory)) is stays
    assert directory.is_dir()


def test_without_a_short_directory_the_true_reason_is_told(tmp_path, monkeypatch) -> None:
    long = tmp_path / ("d" * 90)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(temp, "_SHORT", (str(long / "none"),))
    with (
        pytest.raises(RunError, match=r"TMPDIR=.* is longer than 25 bytes.*set a shorter TMPDIR"),
        private_tmpdir(),
    ):
        raise AssertionError("there is no such directory")
