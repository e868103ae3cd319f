"""The programs of jobs/ run by any Python, and the commands that we tell people to type."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.checkout import ROOT, made_by, stored_clusters, typed

PROGRAMS = ("init_site.py", "runs.py", "submit_convert.py", "submit_grpo.py")
MODULES = (
    "tools.site.command",
    "tools.watch.commands",
    "tools.conversion.job",
    "tools.submit.grpo",
)
OLDEST = (3, 8)


def version_of(python: Path) -> tuple[int, ...]:
    """Of one of pyenv's."""
    return tuple(int(number) for number in python.parts[-3].split("."))


_FOUND = Path(os.environ.get("HOME", "/")).glob(".pyenv/versions/3.*.*/bin/python")
_NEW_ENOUGH = sorted((path for path in _FOUND if version_of(path) >= OLDEST), key=version_of)
# This Python without its packages, and the oldest and the newest of pyenv's, if there are any.
PYTHONS = {"own": [sys.executable, "-S"]}
PYTHONS |= {path.parts[-3]: [str(path)] for path in _NEW_ENOUGH[:1] + _NEW_ENOUGH[-1:]}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The programs of this checkout, without any environment."""
    shutil.copytree(ROOT / "jobs", tmp_path / "check out/jobs")
    return tmp_path / "check out"


def run(checkout: Path, python: list[str], program: str, *words: str, **environ: str):
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(checkout), **environ}
    command = [*python, f"jobs/{program}", *words]
    return subprocess.run(
        command, cwd=checkout, env=clean, capture_output=True, text=True, timeout=30
    )


def with_environment(folder: Path) -> None:
    """An environment whose Python prints how it was started."""
    python = folder / "bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$PYTHONPATH"\nprintf "<%s>\\n" "$@"\n')
    python.chmod(0o755)
    (folder / ".nanoslime-target").touch()


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_without_an_environment_one_line_says_how_to_make_it(checkout, python, program):
    done = run(checkout, PYTHONS[python], program, "ps", "a b")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"{program}: this checkout has no environment yet")
    assert line.endswith(f"bash env/run.sh python jobs/{program} ps 'a b'")
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize(("program", "module"), list(zip(PROGRAMS, MODULES, strict=True)))
@pytest.mark.parametrize("python", PYTHONS)
def test_any_python_goes_on_in_the_environment(checkout, python, program, module):
    with_environment(checkout / ".venv/cpu")
    done = run(checkout, PYTHONS[python], program, "ps", "a b")
    assert done.stdout.splitlines() == [str(checkout), "<-m>", f"<{module}>", "<ps>", "<a b>"]


def test_an_environment_whose_set_up_has_not_ended_is_none(checkout):
    with_environment(checkout / ".venv/cpu")
    (checkout / ".venv/cpu/.nanoslime-target").unlink()
    assert "no environment yet" in run(checkout, PYTHONS["own"], "runs.py").stderr


def test_the_environment_of_a_stored_cluster_is_one_too(checkout, tmp_path):
    with_environment(tmp_path / "of the group")
    clusters = stored_clusters({"XDG_CONFIG_HOME": str(tmp_path / "config")})
    clusters.mkdir(parents=True)
    (clusters / "a.yaml").write_text("name: a\nvenv: /gone\n")
    (clusters / "b.yaml").write_text(f"name: b\nvenv: '{tmp_path}/of the group'  # shared\n")
    done = run(checkout, PYTHONS["own"], "runs.py", XDG_CONFIG_HOME=str(tmp_path / "config"))
    assert done.stdout.splitlines()[1:] == ["<-m>", "<tools.watch.commands>"]


def test_stored_clusters_lie_where_the_user_has_configuration():
    assert stored_clusters({"XDG_CONFIG_HOME": "/c"}) == Path("/c/nanoslime/clusters")
    # A relative one is to be ignored, says the XDG base directory specification.
    for environ in ({"HOME": "/h"}, {"HOME": "/h", "XDG_CONFIG_HOME": "c"}):
        assert stored_clusters(environ) == Path("/h/.config/nanoslime/clusters")


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_oldest_python_can_read_the_programs(program):
    for file in (f"jobs/{program}", "jobs/checkout.py", "jobs/__init__.py"):
        ast.parse((ROOT / file).read_text(), feature_version=OLDEST)


@pytest.mark.parametrize("directory", [ROOT, Path("/usr")])
def test_a_command_that_is_shown_works_where_it_is_typed(directory, monkeypatch):
    monkeypatch.chdir(directory)
    command = typed("jobs/runs.py", "ps", "--run-root", "/no such place")
    done = subprocess.run(
        ["sh", "-c", command],
        env={"PATH": "/usr/bin:/bin", "HOME": "/"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "/no such place holds no run; give another --run-root DIR\n"


def test_an_environment_is_made_by_a_command_that_names_its_script(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert made_by("cuda") == "bash env/run.sh --target cuda true"
    monkeypatch.chdir(tmp_path)
    assert made_by("cuda") == f"bash {ROOT}/env/run.sh --target cuda true"


def test_no_message_names_a_command_by_hand():
    """They come from jobs/checkout.py, which knows Python and directory. Docstrings may."""
    by_hand = []
    for file in [path for room in ("jobs", "tools") for path in (ROOT / room).rglob("*.py")]:
        tree = ast.parse(file.read_text())
        docstrings = {
            node.body[0].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if node not in docstrings and "python jobs/" in node.value:
                    by_hand.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not by_hand


def test_an_environment_without_our_packages_is_none(checkout, tmp_path):
    """It would start the program in itself for ever."""
    python = tmp_path / "config/nanoslime/clusters/bare/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    clusters = python.parents[2]
    (clusters / "a.yaml").write_text("name: a\nvenv: bare\n")
    (clusters / "gone.yaml").symlink_to("nowhere")
    done = run(checkout, PYTHONS["own"], "submit_grpo.py", XDG_CONFIG_HOME=str(tmp_path / "config"))
    [line] = done.stderr.splitlines()
    assert line.startswith("submit_grpo.py: this checkout has no environment yet")
    assert done.returncode == 1


@pytest.mark.parametrize("venv", ["../of the group", "~/of the group"])
def test_the_environment_of_a_stored_cluster_is_found_from_its_file_and_from_home(checkout, venv):
    clusters = checkout / "config/nanoslime/clusters"
    clusters.mkdir(parents=True)
    with_environment(clusters.parent / "of the group" if venv[0] == "." else checkout / venv[2:])
    (clusters / "a.yaml").write_text(f"name: a\nvenv: {venv}\n")
    done = run(checkout, PYTHONS["own"], "runs.py", XDG_CONFIG_HOME=str(checkout / "config"))
    assert done.stdout.splitlines()[1:] == ["<-m>", "<tools.watch.commands>"]
