"""The files in env/ say what is installed: exactly, wholly for what they name, and with reasons."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ENV = Path(__file__).parents[2] / "env"

SLURM_COMMANDS = (
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "munged",
    "munge",
    "slurmdbd",
    "mariadbd",
    "mariadb-install-db",
)

# Packages of the CUDA toolkit that nvcc reads or is part of when it compiles a kernel.
COMPILER_PACKAGES = [
    "nvidia-cuda-cccl",
    "nvidia-cuda-crt",
    "nvidia-cuda-nvcc",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-runtime",
    "nvidia-nvvm",
]

# What the two targets may not differ in, because it defines the flow of control.
SAME_IN_BOTH = [
    "latex2sympy2-extended",
    "math-verify",
    "megatron-core",
    "pydantic",
    "ray",
    "sglang",
    "sglang-router",
    "submitit",
    "transformers",
]


def requirements(name: str) -> list[str]:
    """The lines of a file in env/ that are neither empty nor comments."""
    lines = (ENV / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def canonical(package: str) -> str:
    """A package's name as in PEP 503, without its extras."""
    name = package.split("[")[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name: str) -> dict[str, str]:
    """{canonical name: version} of the lines `name==version` of a file."""
    versions = {}
    for line in requirements(name):
        if "==" in line:
            package, version = line.split("==")
            versions[canonical(package)] = version
    return versions


@pytest.mark.parametrize("name", ["cpu.lock", "cuda.lock", "cuda.pinned.txt"])
def test_every_line_is_one_exact_public_version(name):
    lines = requirements(name)
    exact = re.compile(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*")
    assert [line for line in lines if not exact.fullmatch(line)] == []
    assert len(pins(name)) == len(lines), "a package stands there twice"


@pytest.mark.parametrize("package", SAME_IN_BOTH)
def test_the_locks_agree_on_what_defines_the_control_flow(package):
    assert pins("cpu.lock")[package] == pins("cuda.lock")[package]


def test_what_is_asked_for_is_locked():
    cuda = pins("cuda.lock")
    for package, version in pins("cuda.in").items():
        assert cuda[package] == version
    asked = {canonical(re.split(r"[=<>]", line)[0]) for line in requirements("cuda.in")}
    assert asked <= set(cuda)


def test_the_packages_pinned_by_hand_match_their_siblings():
    cuda = pins("cuda.lock")
    version = pins("cuda.pinned.txt")["transformer-engine-torch"]
    assert cuda["transformer-engine"] == version
    assert cuda["transformer-engine-cu13"] == version


@pytest.mark.parametrize("package", COMPILER_PACKAGES)
def test_the_locked_compiler_is_of_the_cuda_release_of_torchs_headers(package):
    """CCCL refuses every kernel whose nvcc is of another release than cuda_runtime.h."""
    cuda = pins("cuda.lock")
    release = cuda["cuda-toolkit"].split(".")[:2]
    assert cuda[package].split(".")[:2] == release


@pytest.mark.parametrize("name", ["overrides.txt", "cuda.pinned.txt", "cpu.exceptions.txt"])
def test_every_exception_has_its_reason(name):
    """A group of lines begins with a comment, the reason of each line in it."""
    groups = (ENV / name).read_text().split("\n\n")
    without_reason = [group for group in groups if not group.strip().startswith("#")]
    assert groups
    assert without_reason == []


def test_the_slurm_installer_is_a_no_op_where_slurm_is_installed(tmp_path):
    """Each command that it looks for is there and apt-get is not: it has to end without it."""
    for command in SLURM_COMMANDS:
        program = tmp_path / command
        program.write_text("#!/bin/sh\necho slurm-wlm 22.05.8\n")
        program.chmod(0o755)
    result = install_slurm(tmp_path)
    assert result.returncode == 0
    assert "SLURM is installed: slurm-wlm 22.05.8" in result.stderr


def test_the_slurm_installer_says_what_to_do_without_apt_get(tmp_path):
    result = install_slurm(tmp_path)
    assert result.returncode == 1
    assert "no apt-get here; install SLURM" in result.stderr


def install_slurm(path: Path) -> subprocess.CompletedProcess[str]:
    """Run env/install_slurm.sh with this folder as PATH."""
    bash = shutil.which("bash")
    assert bash
    return subprocess.run(
        [bash, str(ENV / "install_slurm.sh")],
        env={"PATH": str(path)},
        capture_output=True,
        text=True,
        timeout=30,
    )
