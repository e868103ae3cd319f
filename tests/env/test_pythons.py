"""Where Python 3.12, and a Python to install uv with, are found on machines of fake programs."""

import shlex
import sys
from pathlib import Path

import pytest

from tests.env.checkout import Checkout, uv_version, write_program, write_wheel

NOT_CHOSEN = "echo 'pyenv: command not found' >&2; exit 127"


def python_312(seen: Path) -> str:
    """A program that is this Python, and says in a file by which path it was called."""
    return f'echo "$0" >>{shlex.quote(str(seen))}\nexec {shlex.quote(sys.executable)} "$@"'


def python_311() -> str:
    """A program that is this Python, and says to those who ask that it is 3.11."""
    python = shlex.quote(sys.executable)
    return f"""
if [ "$1" = --version ]; then
    echo "Python 3.11.7"
elif [ "$2" = -c ]; then
    exec {python} -I -c "import sys; sys.version_info = (3, 11, 7, 'final', 0)
$3"
else
    exec {python} "$@"
fi"""


@pytest.fixture
def machine(checkout, tmp_path) -> Checkout:
    """A machine with two names of pyenv's on PATH, which fail, and without any version in pyenv."""
    checkout.set("NANOSLIME_PYTHON", None)
    checkout.set("PYENV_ROOT", tmp_path / "pyenv")
    checkout.program("python3.12", NOT_CHOSEN)
    checkout.program("python3", NOT_CHOSEN)
    return checkout


def in_pyenv(machine: Checkout, version: str) -> Path:
    return machine.folder / f"pyenv/versions/{version}/bin/python3.12"


def test_a_machine_whose_python3_is_older_takes_the_newest_312_of_pyenv(machine):
    """The names on PATH prove nothing: python3.12 is there and fails."""
    seen = machine.folder / "seen"
    machine.program("python3", python_311())
    for version in ("3.12.1", "3.12.9", "3.12.10"):
        write_program(in_pyenv(machine, version), python_312(seen))
    result = machine.run("python", "-c", "import sys; print(sys.version_info[:2])")
    assert (result.returncode, result.out) == (0, "(3, 12)\n"), result.err
    assert set(seen.read_text().splitlines()) == {str(in_pyenv(machine, "3.12.10"))}


def test_a_version_of_pyenv_that_does_not_run_is_passed_over(machine):
    seen = machine.folder / "seen"
    write_program(in_pyenv(machine, "3.12.10"), "exit 1")
    write_program(in_pyenv(machine, "3.12.1"), python_312(seen))
    assert machine.run("true").returncode == 0
    assert seen.exists()


def test_a_python3_on_path_that_is_312_is_taken(machine):
    seen = machine.folder / "seen"
    machine.program("python3", python_312(seen))
    assert machine.run("true").returncode == 0
    assert seen.exists()


def test_nanoslime_python_goes_before_all_others(machine):
    seen = machine.folder / "seen"
    chosen = machine.folder / "my python"
    write_program(chosen, python_312(seen))
    write_program(in_pyenv(machine, "3.12.1"), "touch wrongly-called")
    machine.set("NANOSLIME_PYTHON", chosen)
    assert machine.run("true").returncode == 0
    assert set(seen.read_text().splitlines()) == {str(chosen)}


def test_a_wrong_nanoslime_python_is_one_line(machine):
    old = machine.folder / "old python"
    write_program(old, '[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1')
    machine.set("NANOSLIME_PYTHON", old)
    result = machine.run("true")
    assert result.returncode == 1
    assert result.err.splitlines()[1:] == [
        f"env/run.sh: needs Python 3.12, but NANOSLIME_PYTHON={old} is Python 3.9.2"
    ]


def test_uv_fetches_a_python_where_there_is_none(machine):
    """A fake uv has the Python that the real one would download, and hands on all else."""
    real_uv = machine.uv.resolve() / "bin/uv"
    machine.uv.unlink()
    calls = machine.folder / "calls"
    write_program(
        machine.uv / "bin/uv",
        f"""
case "$1 $2" in
    "python install") echo "$UV_PYTHON_INSTALL_DIR $*" >>{shlex.quote(str(calls))} ;;
    "python find") echo {shlex.quote(sys.executable)} ;;
    *) exec {shlex.quote(str(real_uv))} "$@" ;;
esac""",
    )
    result = machine.run("echo", "ran")
    assert (result.returncode, result.out) == (0, "ran\n"), result.err
    assert calls.read_text() == f"{machine.root}/.venv/python python install --no-bin 3.12\n"


def test_where_nothing_gives_a_python_one_line_says_what_to_install(machine):
    machine.set("UV_OFFLINE", "1")
    result = machine.run("true")
    assert result.returncode == 1
    [said] = [line for line in result.err.splitlines() if "needs Python 3.12" in line]
    assert "uv could not fetch it" in said
    assert "apt-get install python3.12-dev" in said
    assert "pyenv install 3.12" in said
    assert "NANOSLIME_PYTHON" in said


def test_an_older_python_installs_uv_and_the_environment_is_of_312(machine):
    """The wheel of uv is a fake one, and its program calls the real uv. pip and venv are real."""
    real_uv = machine.uv.resolve() / "bin/uv"
    machine.uv.unlink()
    script = f'#!/bin/sh\nexec {shlex.quote(str(real_uv))} "$@"\n'
    write_wheel(machine.wheels, "uv", uv_version(), script=("uv", script))
    machine.program("python3", python_311())
    write_program(in_pyenv(machine, "3.12.1"), python_312(machine.folder / "seen"))
    result = machine.run("echo", "ran")
    assert (result.returncode, result.out) == (0, "ran\n"), result.err
    assert (machine.uv / "bin/uv").read_text() == script


def test_uv_that_could_not_be_installed_is_tried_again(machine):
    machine.uv.unlink()
    calls = machine.folder / "calls"
    broken = machine.folder / "python without pip"
    write_program(
        broken,
        f"""
if [ "$2" = -c ]; then
    echo "$0"
    exit 0
fi
echo call >>{shlex.quote(str(calls))}
echo "ensurepip is broken" >&2
exit 1
""",
    )
    machine.set("NANOSLIME_PYTHON", broken)
    for call in (1, 2):
        result = machine.run("true")
        assert result.returncode == 1
        assert "ensurepip is broken" in result.err
        assert f"could not install uv {uv_version()} with {broken}" in result.err
        assert not machine.uv.exists()
        assert len(calls.read_text().splitlines()) == call


def test_without_any_python_one_line_says_what_uv_needs(machine):
    machine.uv.unlink()
    result = machine.uv_program("--version")
    assert result.returncode == 1
    [said] = result.err.splitlines()
    assert f"needs a Python of 3.9 or newer with venv to install uv {uv_version()}" in said
    assert "apt-get install python3 python3-venv" in said
