"""env/run.sh, on a checkout with a lock of one package: a real virtual environment and real pip, offline."""

import shutil
import subprocess
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A build backend of a few lines stands where setuptools would have to be downloaded.
BACKEND = """
import zipfile
def build_editable(directory, config_settings=None, metadata_directory=None):
    name = "project-1.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{directory}/{name}", "w") as wheel:
        info = "project-1.0.dist-info/"
        wheel.writestr("project_marker.py", "")
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: project\\nVersion: 1.0\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return name
"""
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


def write_wheel(directory: Path, name: str, version: str) -> None:
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        info = f"{name}-{version}.dist-info/"
        wheel.writestr(f"{name}.py", f"version = '{version}'\n")
        wheel.writestr(
            info + "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(info + "RECORD", "")


class Checkout:
    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wheels = tmp_path / "wheels"
        wheels.mkdir()
        for version in ("1.0", "2.0"):
            write_wheel(wheels, "tiny", version)
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
        self.root = tmp_path / "a'; echo foo"
        (self.root / "env").mkdir(parents=True)
        shutil.copy(ROOT / "env/run.sh", self.root / "env")
        (self.root / "backend.py").write_text(BACKEND)
        (self.root / "pyproject.toml").write_text(PYPROJECT)
        self.lock("tiny==1.0")

    @property
    def stamp(self) -> Path:
        return self.root / ".venv/cpu/.nanoslime-target"

    def lock(self, text: str) -> None:
        (self.root / "env/cpu.lock").write_text(text + "\n")

    def start(self, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        command = ["bash", str(self.root / "env/run.sh"), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=cwd or self.root, stdout=pipe, stderr=pipe, text=True)

    def run(self, *arguments: str, cwd: Path | None = None) -> tuple[int, str, str]:
        process = self.start(*arguments, cwd=cwd)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Checkout:
    return Checkout(tmp_path, monkeypatch)


def test_set_up_once_then_again_only_for_what_changed(checkout, tmp_path, monkeypatch):
    both = [checkout.start("echo", "ran") for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [out for out, _ in outputs] == ["ran\n", "ran\n"]
    assert sum("ready after" in err for _, err in outputs) == 1
    assert sum("waiting for another set-up" in err for _, err in outputs) == 1
    assert checkout.stamp.read_text().splitlines()[0] == "target=cpu"

    assert checkout.run("bash", "-c", "exit 7") == (7, "", "")

    (checkout.root / "pyproject.toml").write_text(PYPROJECT + "# a new entry point\n")
    code = "import os, sys, tiny, project_marker; print(sys.prefix, os.getcwd(), tiny.version, sys.argv[1])"
    argument = """it's "quoted" $HOME"""
    returncode, out, err = checkout.run("python", "-c", code, argument, cwd=tmp_path)
    assert (returncode, out) == (0, f"{checkout.root}/.venv/cpu {tmp_path} 1.0 {argument}\n"), err
    assert "nanoslime itself" in err and "virtual environment" not in err

    checkout.lock("tiny==2.0")
    monkeypatch.setenv("NANOSLIME_PYTHON", "/nonexistent")  # wanted only to make an environment
    assert checkout.run("echo", "ran")[:2] == (1, "")


def test_a_failed_set_up_names_its_log_and_is_redone(checkout):
    checkout.lock("tiny==3.0")
    returncode, out, err = checkout.run("echo", "ran")
    assert (returncode, out) == (1, "")
    assert "failed: 3/4 1 packages" in err and str(checkout.root / ".venv/cpu.log") in err
    assert "tiny==3.0" in err, "the cause stands in the output"
    assert not checkout.stamp.exists()
    checkout.lock("tiny==2.0")
    assert checkout.run("python", "-c", "import tiny; print(tiny.version)")[:2] == (0, "2.0\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "gpu", "true"], "--target is 'gpu'; choose cpu or cuda"),
        (["--target"], "--target is ''; choose cpu or cuda"),
        (["--frobnicate", "true"], "unknown option --frobnicate"),
        ([], "usage: bash env/run.sh"),
    ],
)
def test_a_wrong_call_says_what_is_right(checkout, arguments, message):
    returncode, out, err = checkout.run(*arguments)
    assert returncode == 2 and message in err and out == ""


def test_help_names_both_targets_and_the_default(checkout):
    returncode, out, _ = checkout.run("--help")
    assert returncode == 0 and "--target cpu    (default)" in out and "--target cuda" in out


def test_a_wrong_python_is_one_line(checkout, tmp_path, monkeypatch):
    old = tmp_path / "old python"
    old.write_text(
        textwrap.dedent("""\
        #!/bin/sh
        [ "$1" = --version ] && echo "Python 3.9.2" && exit 0
        exit 1
        """)
    )
    old.chmod(0o755)
    monkeypatch.setenv("NANOSLIME_PYTHON", str(old))
    returncode, _, err = checkout.run("true")
    needed = [line for line in err.splitlines() if "needs Python 3.11" in line]
    assert returncode == 1
    assert err.count("\n") == 1 and len(needed) == 1, err
    assert f"{old} is Python 3.9.2" in err
