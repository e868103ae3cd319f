"""A small checkout with the scripts of env/ in it, on a machine whose programs the tests choose.

Virtual environments, pip and uv are real. Nothing is downloaded: packages of a few lines lie in
a folder of wheels.
"""

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ["run.sh", "make.sh", "uv.sh", "pythons.sh", "check_cuda.sh"]

# A build backend of a few lines stands where setuptools would have to be downloaded.
PROJECT_BACKEND = """
import zipfile


def build_editable(directory, config_settings=None, metadata_directory=None):
    name = "project-1.0-py3-none-any.whl"
    info = "project-1.0.dist-info/"
    wheel_text = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    with zipfile.ZipFile(f"{directory}/{name}", "w") as wheel:
        wheel.writestr("project_marker.py", "")
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: project\\nVersion: 1.0\\n")
        wheel.writestr(info + "WHEEL", wheel_text)
        wheel.writestr(info + "RECORD", "")
    return name
"""

# This one says in a file that it has begun, and builds when another file is there.
SLOW_BACKEND = """
import pathlib
import time
import zipfile

FOLDER = pathlib.Path({folder!r})


def build_wheel(directory, config_settings=None, metadata_directory=None):
    (FOLDER / "build-begun").touch()
    while not (FOLDER / "build-may-end").exists():
        time.sleep(0.02)
    name = "slow-1.0-py3-none-any.whl"
    info = "slow-1.0.dist-info/"
    wheel_text = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    with zipfile.ZipFile(f"{{directory}}/{{name}}", "w") as wheel:
        wheel.writestr("slow.py", "version = '1.0'")
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: slow\\nVersion: 1.0\\n")
        wheel.writestr(info + "WHEEL", wheel_text)
        wheel.writestr(info + "RECORD", "")
    return name
"""

BACKEND_IN_TREE = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


@dataclass(frozen=True)
class Result:
    """What a command came to."""

    returncode: int
    out: str
    err: str


def write_program(path: Path, text: str) -> None:
    """Write a fake program: a shell script, by its text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def write_wheel(
    folder: Path, name: str, version: str, script: tuple[str, str] | None = None
) -> None:
    """Write a wheel with a module that knows its version, and a script (name, text) if given."""
    info = f"{name}-{version}.dist-info/"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = '{version}'\n")
        wheel.writestr(
            info + "METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        )
        wheel.writestr(
            info + "WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        if script is not None:
            script_name, script_text = script
            member = zipfile.ZipInfo(f"{name}-{version}.data/scripts/{script_name}")
            member.external_attr = 0o100755 << 16
            wheel.writestr(member, script_text)
        wheel.writestr(info + "RECORD", "")


def write_source_package(folder: Path, name: str, version: str, backend: str) -> None:
    """Write a package that has to be built, with its build backend inside."""
    files = {
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "pyproject.toml": BACKEND_IN_TREE,
        "backend.py": backend,
    }
    with tarfile.open(folder / f"{name}-{version}.tar.gz", "w:gz") as archive:
        for file, text in files.items():
            content = text.encode()
            member = tarfile.TarInfo(f"{name}-{version}/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def real_uv() -> Path:
    """The environment of the pinned uv in this repository, which installs it if it is missing."""
    command = ["bash", str(ROOT / "env/uv.sh"), "--version"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=240)
    return ROOT / f".venv/uv-{uv_version()}"


def uv_version() -> str:
    """The version that env/uv.sh pins."""
    lines = (ROOT / "env/uv.sh").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("version=")]
    return line.removeprefix("version=")


class Checkout:
    """A checkout whose lock is one small package; uv is there, and this Python is the 3.12."""

    def __init__(self, folder: Path, uv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.root = folder / "a'; echo foo"
        self.wheels = folder / "wheels"
        self.programs = folder / "programs"
        self.uv = self.root / f".venv/uv-{uv_version()}"
        self._monkeypatch = monkeypatch
        self._make_machine()
        self._make_checkout(uv)

    def _make_machine(self) -> None:
        self.wheels.mkdir()
        self.programs.mkdir()
        for version in ("1.0", "2.0"):
            write_wheel(self.wheels, "tiny", version)
        settings = self.folder / "uv.toml"
        settings.write_text(f'no-index = true\nfind-links = ["{self.wheels}"]\n')
        for name in list(os.environ):
            if name.startswith(("UV_", "PIP_")):
                self._monkeypatch.delenv(name)
        self._monkeypatch.delenv("CUDA_HOME", raising=False)
        self._monkeypatch.delenv("CXX", raising=False)
        self._monkeypatch.setenv("UV_CONFIG_FILE", str(settings))
        self._monkeypatch.setenv("UV_CACHE_DIR", str(self.folder / "uv-cache"))
        self._monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        self._monkeypatch.setenv("PIP_NO_INDEX", "1")
        self._monkeypatch.setenv("PIP_FIND_LINKS", str(self.wheels))
        self._monkeypatch.setenv("PATH", f"{self.programs}:{os.environ['PATH']}")
        self._monkeypatch.setenv("NANOSLIME_PYTHON", sys.executable)

    def _make_checkout(self, uv: Path) -> None:
        (self.root / "env").mkdir(parents=True)
        (self.root / ".venv").mkdir()
        for script in SCRIPTS:
            shutil.copy(ROOT / "env" / script, self.root / "env")
        (self.root / "backend.py").write_text(PROJECT_BACKEND)
        (self.root / "pyproject.toml").write_text(BACKEND_IN_TREE)
        self.uv.symlink_to(uv)
        self.lock("tiny==1.0")

    def lock(self, *lines: str, name: str = "cpu.lock") -> None:
        """Write a lock, or another file of requirements in env/."""
        (self.root / "env" / name).write_text("\n".join(lines) + "\n")

    def program(self, name: str, text: str) -> None:
        """Put a fake program before all others on PATH."""
        write_program(self.programs / name, text)

    def set(self, name: str, value: str | Path | None) -> None:
        """Set a variable of the environment, or unset it with None."""
        if value is None:
            self._monkeypatch.delenv(name, raising=False)
        else:
            self._monkeypatch.setenv(name, str(value))

    def slow_package(self) -> None:
        """Add slow==1.0, whose build creates `build_begun` and waits for `let_build_end`."""
        backend = SLOW_BACKEND.format(folder=str(self.folder))
        write_source_package(self.wheels, "slow", "1.0", backend)

    @property
    def build_begun(self) -> Path:
        return self.folder / "build-begun"

    def let_build_end(self) -> None:
        (self.folder / "build-may-end").touch()

    def start(self, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        """Start env/run.sh, in a process group of its own."""
        return self._start("run.sh", *arguments, cwd=cwd or self.root)

    def _start(self, script: str, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.root / "env" / script), *arguments],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, cwd: Path | None = None) -> Result:
        """Run env/run.sh to its end."""
        return finish(self.start(*arguments, cwd=cwd))

    def uv_program(self, *arguments: str) -> Result:
        """Run env/uv.sh to its end."""
        return finish(self._start("uv.sh", *arguments, cwd=self.root))


def finish(process: subprocess.Popen[str]) -> Result:
    """Wait for a command that was started."""
    out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, err)


def kill_group(process: subprocess.Popen[str]) -> None:
    """End a command and all that it started, as a lost machine would."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
