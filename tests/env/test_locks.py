"""The files in env/ that say what is installed: exact, complete for what they name, and with reasons."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ENV = Path(__file__).parents[2] / "env"


def requirements(name: str) -> list[str]:
    lines = (ENV / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pins(name: str) -> dict[str, str]:
    """{canonical name: version} of the lines `name==version` of a file."""
    pairs = (line.split("==") for line in requirements(name) if "==" in line)
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in pairs}


@pytest.mark.parametrize("name", ["cpu.lock", "cuda.lock", "cuda.pinned.txt"])
def test_every_line_is_one_exact_public_version(name):
    lines = requirements(name)
    assert [
        line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*", line)
    ] == []
    assert len(pins(name)) == len(lines), "a package stands there twice"


def test_the_locks_agree_on_what_defines_the_control_flow():
    cpu, cuda = pins("cpu.lock"), pins("cuda.lock")
    for (
        package
    ) in "sglang sglang-router transformers megatron-core ray submitit pydantic tyro".split():
        assert cpu[package] == cuda[package], package


def test_what_is_asked_for_is_locked():
    cuda = pins("cuda.lock")
    for package, version in pins("cuda.in").items():
        assert cuda[package] == version
    asked = {re.split(r"[=<>]", line)[0].lower() for line in requirements("cuda.in")}
    assert asked <= set(cuda)


def test_the_packages_pinned_by_hand_match_their_siblings():
    pinned, cuda = pins("cuda.pinned.txt"), pins("cuda.lock")
    assert (
        pinned["transformer-engine-torch"]
        == cuda["transformer-engine"]
        == cuda["transformer-engine-cu13"]
    )


@pytest.mark.parametrize("name", ["overrides.txt", "cuda.pinned.txt", "cpu.exceptions.txt"])
def test_every_exception_has_its_reason(name):
    """A group of lines begins with a comment: the reason of each line in it."""
    reasons = [block.strip().startswith("#") for block in (ENV / name).read_text().split("\n\n")]
    assert reasons and all(reasons)


def test_the_slurm_installer_is_a_no_op_where_slurm_is_installed(tmp_path):
    """Every command that it looks for is there, apt-get is not: it has to end without wanting it."""
    for command in ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "munge"):
        (tmp_path / command).write_text("#!/bin/sh\necho slurm-wlm 22.05.8\n")
        (tmp_path / command).chmod(0o755)
    result = install_slurm(tmp_path)
    assert result.returncode == 0 and "SLURM is installed: slurm-wlm 22.05.8" in result.stderr


def test_the_slurm_installer_says_what_to_do_without_apt_get(tmp_path):
    result = install_slurm(tmp_path)
    assert result.returncode == 1 and "no apt-get here; install SLURM" in result.stderr


def install_slurm(path: Path) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash
    script = [bash, str(ENV / "install_slurm.sh")]
    return subprocess.run(
        script, env={"PATH": str(path)}, capture_output=True, text=True, timeout=30
    )
