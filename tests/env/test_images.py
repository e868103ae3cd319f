"""The images for GPU nodes, which nobody has built yet: their text is linted here.

hadolint and shellcheck have no complaint either; they are not among the packages of the lock.
"""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "env" / "Dockerfile"
DEFINITION = ROOT / "env" / "nanoslime.def"
BUILD = ROOT / "env" / "build_image.sbatch"
SECTIONS = {"files", "post", "environment", "test", "help"}


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, each on one line, with what stands behind it."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = []
    for line in filter(None, joined.splitlines()):
        name, _, rest = line.partition(" ")
        found.append((name, rest))
    return found


def sections() -> dict[str, str]:
    """The sections of the Apptainer definition; its head is called ''."""
    found = {"": ""}
    name = ""
    for line in DEFINITION.read_text().splitlines():
        if line.startswith("%"):
            name = line[1:].split()[0]
            found[name] = ""
        elif not line.startswith("#"):
            found[name] += line.removesuffix("\\") + ("" if line.endswith("\\") else "\n")
    return found


def packages(script: str) -> set[str]:
    """What the only apt-get install of a script installs."""
    (rest,) = re.findall(r"apt-get install ([^\n&]+)", script)
    words = rest.split()
    assert {"--yes", "--no-install-recommends"} <= set(words)
    return {word for word in words if not word.startswith("--")}


def check_shell(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("file", [DOCKERFILE, DEFINITION, BUILD], ids=lambda file: file.name)
def test_an_image_that_nobody_has_built_says_so(file):
    comment = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith("# UNBUILT: nobody has reported a build") for line in comment)


def test_the_dockerfile_has_no_fault_that_a_linter_knows():
    found = instructions()
    names = [name for name, _ in found]
    assert set(names) <= {"FROM", "SHELL", "RUN", "WORKDIR", "COPY", "ARG", "ENV", "CMD"}
    assert names[:2] == ["FROM", "SHELL"]
    assert re.fullmatch(r"[a-z]+:[0-9]+\.[0-9]+", found[0][1])
    assert "pipefail" in found[1][1]
    for name, rest in found:
        if name == "RUN":
            check_shell(rest)
            assert ("apt-get update" in rest) == ("rm -rf /var/lib/apt/lists/*" in rest)
        if name == "COPY":
            source, target = rest.split()
            assert (ROOT / source).exists()
            assert target in ("./", source)
    ignored = (ROOT / "env" / "Dockerfile.dockerignore").read_text().splitlines()
    copied = {rest.split()[0] for name, rest in found if name == "COPY"}
    assert {line[1:] for line in ignored if line.startswith("!")} == copied


def test_both_images_are_made_of_the_same():
    found = instructions()
    parts = sections()
    assert set(parts) == {"", *SECTIONS}
    assert f"From: {found[0][1]}\n" in parts[""]
    runs = "\n".join(rest for name, rest in found if name == "RUN")
    assert packages(runs) == packages(parts["post"])
    assert "python3.12-dev" in packages(runs)  # env/check_cuda.sh asks for the headers
    copied = {rest.split()[0] for name, rest in found if name == "COPY"}
    assert {line.split()[0] for line in parts["files"].splitlines() if line} == copied
    for made in (runs, parts["post"]):
        assert "bash env/run.sh --target cuda true" in made
    for name in ("post", "environment", "test"):
        check_shell(parts[name])


def build(folder: Path, bin_: Path) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": f"{bin_}:/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "7"}
    command = ["bash", str(BUILD), "it's.sif"]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)


def test_an_image_is_there_whole_or_not_at_all(tmp_path):
    """With a stand-in for apptainer."""
    check_shell(BUILD.read_text())
    lines = [line for line in BUILD.read_text().splitlines() if line.strip()]
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    assert "is not the root of nanoslime" in build(tmp_path, bin_).stderr
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "nanoslime.def").touch()
    assert "no apptainer on" in build(tmp_path, bin_).stderr
    apptainer = bin_ / "apptainer"
    apptainer.write_text('#!/bin/sh\necho "$MAX_JOBS $*" > "$4"\ntest -e good\n')
    apptainer.chmod(0o755)
    assert build(tmp_path, bin_).returncode == 1
    assert not (tmp_path / "it's.sif").exists()
    (tmp_path / "good").touch()
    assert build(tmp_path, bin_).returncode == 0
    said = shlex.split((tmp_path / "it's.sif").read_text().replace("'", "\\'"))
    assert said == ["7", *"build --force --fakeroot it's.sif.new env/nanoslime.def".split()]
