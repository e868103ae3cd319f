"""An environment on a node's own disk: packed once, one reader a node, and usable in its place."""

import json
import os
import subprocess
import sys
import venv as venvs
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.checkout import ROOT
from jobs.staging import Copy, NodeStaging, packed_environment
from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.load import dump
from nanoslime.storage.shared_files import read_json
from nanoslime.types import MachineFailure, RunError
from tests import process_table
from tests.jobs.made_run import MadeRun, make_run, make_venv_with_fake_ray
from tools.staging import environment

_DEADLINE_S = 60.0
SCRIPT = "import sys, greeting; print(sys.prefix, greeting.__file__, sys.argv[1:])"


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A virtual environment with a package, whose second file lies elsewhere, and its script."""
    venv = tmp_path / "shared" / "it's a venv"
    venvs.create(venv, symlinks=True)
    [packages] = venv.glob("lib/python3.*/site-packages")
    (packages / "greeting").mkdir()
    (packages / "greeting" / "__init__.py").write_text("from greeting.words import HELLO\n")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "words.py").write_text("HELLO = 'hello'\n")
    (packages / "greeting" / "words.py").symlink_to(tmp_path / "cache" / "words.py")
    (packages / "own.pth").write_text(f"{venv}/lib\n")
    script = venv / "bin" / "greet"
    script.write_text(f"#!/bin/sh\n'''exec' \"{venv}/bin/python\" \"$0\" \"$@\"\n' '''\n{SCRIPT}\n")
    script.chmod(0o755)
    (venv / "bin" / "absolute").symlink_to(script)
    subprocess.run([venv / "bin/python", "-m", "compileall", "-q", packages], check=True)
    return venv


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node's disk; /tmp may be in memory here."""
    monkeypatch.setattr("jobs.staging._IN_MEMORY", ())
    return tmp_path / "disk"


def run_with(root: Path, venv: Path, disk: Path) -> MadeRun:
    made = make_run(
        root,
        2,
        local_storage=str(disk),
        stage_environment=True,
        venv=str(venv),
        run_root=str(venv.parent),
    )
    environment.record(made.config, made.run)
    made.run.new_attempt("42-0")
    return made


def stage(made: MadeRun, node: int = 0) -> tuple[Path | None, dict[str, Any]]:
    """The copy that the agent of a node uses, and what was said of it. The agent leaves then."""
    attempt = made.run.attempt(1)
    staging = NodeStaging(attempt, made.config, node)
    assert process_table.wait_for(staging.is_done, _DEADLINE_S)
    for held in staging._stagings:
        os.close(held._lock)
    return staging.venv(), read_json(attempt.path / "environments" / f"{node}.json")


def output(*command: object) -> str:
    environ = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_copy_is_used_in_its_place_and_needs_nothing_of_the_shared_one(
    tmp_path: Path, venv: Path, disk: Path
) -> None:
    copy, said = stage(run_with(tmp_path / "a", venv, disk))
    assert copy is not None and copy.is_relative_to(disk) and said["note"] == ""
    bytecode = {file: file.stat().st_mtime_ns for file in copy.rglob("*.pyc")}
    assert bytecode
    venv.rename(venv.with_name("gone"))
    (tmp_path / "cache").rename(tmp_path / "gone")
    [packages] = copy.glob("lib/python3.*/site-packages")
    told = f"{copy} {packages}/greeting/__init__.py ['x y']"
    assert output(copy / "bin" / "greet", "x y") == told
    assert output(copy / "bin" / "absolute", "x y") == told
    assert str(venv) not in (copy / "bin" / "activate").read_text()
    assert (packages / "own.pth").read_text() == f"{copy}/lib\n"
    # The bytecode is that of the copied sources: Python has compiled nothing anew.
    assert {file: file.stat().st_mtime_ns for file in copy.rglob("*.pyc")} == bytecode


def test_a_second_run_reads_the_copy_and_mends_what_has_changed_in_it(
    tmp_path: Path, venv: Path, disk: Path
) -> None:
    copy, first = stage(run_with(tmp_path / "a", venv, disk))
    assert copy is not None and first["copied_bytes"] > 0
    assert stage(run_with(tmp_path / "b", venv, disk)) == (copy, {**first, "copied_bytes": 0})
    [words] = copy.rglob("words.py")
    words.write_text("HELLO = 'other'\n")
    assert stage(run_with(tmp_path / "c", venv, disk)) == (copy, first)
    assert words.read_text() == "HELLO = 'hello'\n"


def test_an_environment_that_has_changed_is_another_one_and_few_of_its_states_are_kept(
    tmp_path: Path, venv: Path, disk: Path
) -> None:
    copies = set()
    for number in range(environment._NUM_KEPT + 1):
        (venv / "new").write_text("n" * number)
        made = run_with(tmp_path / str(number), venv, disk)
        copies.add(Copy.of_environment(packed_environment(made.run), disk).path)
    assert len(copies) == environment._NUM_KEPT + 1
    packed = sorted(file.suffix for file in (venv.parent / environment.FOLDER).iterdir())
    assert packed == [".json"] * environment._NUM_KEPT + [".tar"] * environment._NUM_KEPT


def test_a_job_whose_packed_environment_is_gone_uses_the_shared_one(
    tmp_path: Path, venv: Path, disk: Path
) -> None:
    made = run_with(tmp_path / "a", venv, disk)
    Path(read_json(packed_environment(made.run))["tar"]).unlink()
    copy, said = stage(made)
    assert copy is None and said["path"] == str(venv)
    assert "No such file" in said["note"]


def test_a_copy_whose_python_does_not_start_is_not_used(
    tmp_path: Path, venv: Path, disk: Path
) -> None:
    for name in ("python", "python3"):
        (venv / "bin" / name).unlink(missing_ok=True)
    (venv / "bin" / "python").symlink_to("/nowhere/python")
    copy, said = stage(run_with(tmp_path / "a", venv, disk))
    assert copy is None and "/bin/python" in said["note"]
    assert list(disk.glob("nanoslime-*/*/")) == []


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_packed_environment_that_is_damaged_is_not_taken(
    tmp_path: Path, venv: Path, disk: Path, damage: str
) -> None:
    made = run_with(tmp_path / "a", venv, disk)
    tar = Path(read_json(packed_environment(made.run))["tar"])
    content = tar.read_bytes()
    if damage == "cut":
        tar.write_bytes(content[: len(content) // 2])
    else:
        tar.write_bytes(content.replace(b"HELLO = 'hello'", b"HELLO = 'hallo'"))
    says = {"cut": f"{tar} is damaged", "changed": f"{tar} was read twice"}[damage]
    with pytest.raises(MachineFailure, match=says):
        stage(made)
    assert list(disk.glob("nanoslime-*/*/")) == []


STAGE = """
import sys, time
from pathlib import Path
from jobs.staging import NodeStaging
from nanoslime.config.load import read
from nanoslime.run_dir import RunDir

runs = [RunDir.open(Path(path)) for path in sys.argv[1:]]
nodes = [NodeStaging(run.attempt(1), read(run.config), node) for node, run in enumerate(runs)]
while not all([node.is_done() for node in nodes]):
    time.sleep(0.05)
for line in Path("/proc/self/io").read_text().splitlines():
    print(line)
"""


def test_two_nodes_read_the_packed_environment_once_each_and_need_no_network(
    tmp_path: Path, venv: Path, disk: Path
) -> None:
    """Each node's disk is a directory, as if it were on the node."""
    isolated = ["unshare", "-n"] if os.getuid() == 0 else []
    read = []
    for size in (0, 64 * 2**20):
        (venv / "large").write_bytes(os.urandom(size))
        runs = []
        for node in range(2):
            made = run_with(tmp_path / f"{size}-{node}", venv, disk / str(node))
            made.run.config.write_text(dump(made.config))
            runs.append(made.run)
        command = [*isolated, sys.executable, "-c", STAGE, *(str(run.path) for run in runs)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        for node, run in enumerate(runs):
            said = read_json(run.attempt(1).path / "environments" / f"{node}.json")
            assert said["note"] == "" and said["copied_bytes"] >= size
        # The kernel adds those of a child when it has been waited for.
        read.append(int(dict(line.split(": ") for line in done.stdout.splitlines())["rchar"]))
    # Python and its modules are read in both cases. Nothing reads the copies.
    assert 0.99 <= (read[1] - read[0]) / (2 * 64 * 2**20) <= 1.05


def test_an_agent_starts_ray_and_the_driver_from_the_copy(
    tmp_path: Path, disk: Path, no_leftovers: None
) -> None:
    venv = make_venv_with_fake_ray(tmp_path / "shared" / "venv")
    made = run_with(tmp_path / "runs", venv, disk)
    made.run.config.write_text(dump(made.config))
    made.run.plan.write_text(make_run(tmp_path / "plan", 1).layout.to_json())
    shows = [
        sys.executable,
        "-c",
        "import os; print(os.environ['VIRTUAL_ENV'], os.environ['PATH'])",
    ]
    command = [venv / "bin/python", "-m", "jobs.node", made.run.path, "--attempt", "1"]
    command += ["--local-node", "0", "--driver", " ".join(f'"{word}"' for word in shows)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    copy = Copy.of_environment(packed_environment(made.run), disk).path
    assert f"starting: {copy}/bin/ray start" in done.stderr, done.stderr
    shown = made.run.attempt(1).log("driver", 0).read_text()
    assert shown.startswith(f"{copy} {copy}/bin:"), shown


def test_what_cannot_be_staged_is_refused(tmp_path: Path, venv: Path, disk: Path) -> None:
    with pytest.raises(ValueError, match="copies the environment to cluster.local_storage"):
        ClusterConfig(stage_environment=True)
    for other in ({"conda": "base"}, {"container": "pyxis", "container_image": "a.sqsh"}):
        with pytest.raises(ValueError, match="and not one of conda or of a container"):
            ClusterConfig(stage_environment=True, local_storage="/local", **other)
    made = run_with(tmp_path / "a", venv, disk)
    (venv / "pyvenv.cfg").unlink()
    with pytest.raises(RunError, match="is no virtual environment: it has no pyvenv.cfg"):
        environment.record(made.config, made.run)
    # Nothing is left over from a submission that had one.
    off = replace(made.config, cluster=replace(made.config.cluster, stage_environment=False))
    environment.record(off, made.run)
    assert not packed_environment(made.run).exists()


def test_a_script_whose_first_line_is_too_long_is_started_by_a_shell(tmp_path: Path) -> None:
    new = tmp_path / ("long" * 40)
    (new / "bin").mkdir(parents=True)
    (new / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (new / "bin" / "python").symlink_to(sys.executable)
    script = new / "bin" / "show"
    script.write_text("#!/old/venv/bin/python\nimport sys\nprint(sys.argv[1:], '/old/venv-2')\n")
    script.chmod(0o755)
    assert environment.move(new, Path("/old/venv"), new) == ["bin/show"]
    assert output(script, "a b") == "['a b'] /old/venv-2"


def test_the_facts_of_a_packed_environment_name_no_secret(
    tmp_path: Path, venv: Path, disk: Path
) -> None:
    made = run_with(tmp_path / "a", venv, disk)
    facts = json.loads(packed_environment(made.run).read_text())
    assert set(facts) == {"venv", "key", "tar", "xxh3_128", "num_bytes"}
    assert Path(facts["tar"]).stat().st_mode & 0o077 == 0
