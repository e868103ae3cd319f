"""What tests of the commands that watch runs share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nanoslime.run_dir import RunDir
from tests.tools.watch.watched import lived_run
from tools.watch import commands


@pytest.fixture(scope="session")
def lived(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> RunDir:
    """A real run: an attempt that failed, one that was stopped, one that ended."""
    return lived_run(tmp_path_factory.mktemp("lived"), tiny_model)


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path) -> Callable[..., str]:
    """What a command of runs.py prints; it has to succeed. Its cache is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def tell(*argv: object) -> str:
        capsys.readouterr()
        code = commands.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    return tell


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path) -> Callable[..., str]:
    """The one line in which a command of runs.py says why it does nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def tell(*argv: object) -> str:
        capsys.readouterr()
        assert commands.main([str(word) for word in argv]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return tell


@pytest.fixture
def programs(tmp_path: Path, monkeypatch) -> Path:
    """The folder before all others in PATH."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder
