"""`env/run.sh --target cuda` refuses a machine that cannot serve, before anything is downloaded."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.env.checkout import Checkout, write_program, write_wheel

NVCC = "echo 'Cuda compilation tools, release {release}, V{release}.88'"
NVIDIA_SMI = "echo '| NVIDIA-SMI 580.65.06   Driver Version: 580.65.06   CUDA Version: {cuda}  |'"


def write_python(path: Path, headers: Path) -> None:
    """Write a program that is this Python, and looks for its C headers in this folder."""
    write_program(
        path,
        f"""
if [ "$2" = -c ]; then
    exec {shlex.quote(sys.executable)} -I -c "import sysconfig
sysconfig.get_path = lambda name: '{headers}'
$3"
fi
exec {shlex.quote(sys.executable)} "$@"
""",
    )


def link_programs(folder: Path, names: list[str]) -> None:
    for name in names:
        found = shutil.which(name)
        assert found, name
        (folder / name).symlink_to(found)


@pytest.fixture
def machine(checkout, tmp_path) -> Checkout:
    """A machine on which the CUDA environment can be made: each test changes one thing."""
    checkout.lock("tiny==1.0", "cuda-toolkit==13.0.3.0", name="cuda.lock")
    write_wheel(checkout.wheels, "cuda_toolkit", "13.0.3.0")
    headers = tmp_path / "headers"
    headers.mkdir()
    (headers / "Python.h").touch()
    write_python(tmp_path / "python", headers)
    checkout.set("NANOSLIME_PYTHON", tmp_path / "python")
    checkout.program("uname", "echo x86_64")
    checkout.program("getconf", "echo glibc 2.36")
    checkout.program("c++", "exit 0")
    checkout.program("nvcc", NVCC.format(release="13.0"))
    checkout.program("nvidia-smi", NVIDIA_SMI.format(cuda="13.0"))
    return checkout


def refusal(machine: Checkout) -> str:
    """What a refusal says. Nothing was downloaded before it: a fake uv would have left a file."""
    machine.uv.unlink()
    write_program(machine.uv / "bin/uv", f"touch {shlex.quote(str(machine.folder / 'downloaded'))}")
    result = machine.run("--target", "cuda", "true")
    assert result.returncode == 1, result.err
    assert not (machine.folder / "downloaded").exists()
    assert not (machine.root / ".venv/cuda").exists()
    refused = [line for line in result.err.splitlines() if "--target cuda: " in line]
    return "\n".join(refused)


def test_a_fit_machine_gets_its_environment_without_a_word_more(machine):
    result = machine.run("--target", "cuda", "python", "-c", "import tiny; print(tiny.version)")
    assert (result.returncode, result.out) == (0, "1.0\n"), result.err
    assert "--target cuda:" not in result.err
    assert (machine.root / ".venv/cuda/.nanoslime-target").read_text().startswith("target=cuda\n")


def test_the_machine_is_not_asked_again_once_the_environment_is_there(machine):
    assert machine.run("--target", "cuda", "true").returncode == 0
    machine.program("getconf", "echo glibc 2.17")
    assert machine.run("--target", "cuda", "true").returncode == 0


def test_an_old_glibc_is_refused(machine):
    machine.program("getconf", "echo glibc 2.31")
    said = refusal(machine)
    assert "glibc is 2.31, and the wheels of env/cuda.lock need 2.34" in said
    assert "build on a newer system" in said


def test_a_newer_glibc_is_compared_by_its_numbers(machine):
    """2.100 is newer than 2.34."""
    machine.program("getconf", "echo glibc 2.100")
    assert machine.run("--target", "cuda", "true").returncode == 0


def test_a_system_without_glibc_is_refused(machine):
    machine.program("getconf", "echo 'getconf: GNU_LIBC_VERSION: unknown variable' >&2; exit 1")
    assert "this system has no glibc" in refusal(machine)


def test_another_processor_is_refused(machine):
    machine.program("uname", "echo aarch64")
    assert "the processor is aarch64, but env/cuda.lock is resolved for x86_64" in refusal(machine)


def test_a_python_without_headers_is_refused(machine, tmp_path):
    write_python(tmp_path / "python", tmp_path / "nothing")
    said = refusal(machine)
    assert f"Python 3.12 is here without its headers ({tmp_path}/nothing/Python.h)" in said
    assert "apt-get install python3.12-dev" in said


def test_a_wrong_python_is_refused(machine, tmp_path):
    write_program(tmp_path / "python", "exit 1")
    machine.uv.unlink()
    result = machine.run("--target", "cuda", "true")
    assert result.returncode == 1
    assert "needs Python 3.12, but NANOSLIME_PYTHON=" in result.err
    assert not machine.uv.exists()


def test_a_missing_compiler_is_refused(machine):
    machine.set("CXX", "no-such-compiler")
    said = refusal(machine)
    assert "there is no C++ compiler (no-such-compiler)" in said
    assert "apt-get install g++" in said


def test_an_nvcc_of_another_cuda_is_refused(machine):
    machine.program("nvcc", NVCC.format(release="12.4"))
    said = refusal(machine)
    assert "nvcc is of CUDA 12.4, and torch of env/cuda.lock is built for CUDA 13.0" in said
    assert "load a CUDA 13 toolkit, or none" in said


def test_an_nvcc_of_the_same_major_release_is_taken(machine):
    machine.program("nvcc", NVCC.format(release="13.2"))
    assert machine.run("--target", "cuda", "true").returncode == 0


def test_the_nvcc_of_cuda_home_is_the_one_that_counts(machine, tmp_path):
    write_program(tmp_path / "cuda-12/bin/nvcc", NVCC.format(release="12.8"))
    machine.set("CUDA_HOME", tmp_path / "cuda-12")
    assert f"{tmp_path}/cuda-12/bin/nvcc is of CUDA 12.8" in refusal(machine)


def test_an_nvcc_that_does_not_run_is_refused(machine, tmp_path):
    machine.set("CUDA_HOME", tmp_path / "nothing")
    assert f"{tmp_path}/nothing/bin/nvcc does not say its release" in refusal(machine)


@pytest.mark.parametrize(
    "header", [NVIDIA_SMI, "echo '| NVIDIA-SMI 599.1  CUDA UMD Version: {cuda} |'"]
)
def test_an_old_driver_is_refused(machine, header):
    machine.program("nvidia-smi", header.format(cuda="12.8"))
    said = refusal(machine)
    assert "the NVIDIA driver runs CUDA 12.8 at most" in said
    assert "update the driver, or build on a machine without a GPU" in said


def test_a_newer_driver_is_taken(machine):
    machine.program("nvidia-smi", NVIDIA_SMI.format(cuda="14.1"))
    assert machine.run("--target", "cuda", "true").returncode == 0


def test_a_driver_that_says_nothing_of_cuda_is_refused(machine):
    machine.program("nvidia-smi", "echo hello")
    assert "nvidia-smi does not say which CUDA its driver runs" in refusal(machine)


def test_a_build_machine_without_a_driver_says_so_and_goes_on(machine):
    machine.program("nvidia-smi", "echo 'NVIDIA-SMI has failed: no driver'; echo more; exit 9")
    result = machine.run("--target", "cuda", "true")
    assert result.returncode == 0, result.err
    assert (
        "nvidia-smi reaches no driver here (NVIDIA-SMI has failed: no driver): "
        "GPU nodes need one that runs CUDA 13.0" in result.err
    )


def test_all_that_is_wrong_is_said_at_once(machine):
    machine.program("getconf", "echo glibc 2.31")
    machine.program("nvcc", NVCC.format(release="12.4"))
    machine.program("nvidia-smi", NVIDIA_SMI.format(cuda="12.4"))
    assert len(refusal(machine).splitlines()) == 3


def test_a_bare_build_machine_says_what_gpu_nodes_need(machine, tmp_path):
    """PATH holds the few programs that the scripts call, and neither nvcc nor nvidia-smi."""
    for name in ("nvcc", "nvidia-smi"):
        (machine.programs / name).unlink()
    needed = "bash cat cut dirname env flock grep mkdir mv rm sed sha256sum sort tail true"
    link_programs(machine.programs, needed.split())
    machine.set("PATH", machine.programs)
    result = machine.run("--target", "cuda", "true")
    assert result.returncode == 0, result.err
    assert "no nvcc here: the one of env/cuda.lock is used" in result.err
    assert "no NVIDIA driver here: GPU nodes need one that runs CUDA 13.0" in result.err
