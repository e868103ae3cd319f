"""A rehearsal starts by itself only where nothing of SLURM exists; each trace stops it."""

import time
from pathlib import Path

import pytest

from nanoslime.types import RunError
from tools.submit import where


@pytest.fixture
def machine(tmp_path):
    """An empty root directory with an empty PATH directory."""
    (tmp_path / "bin").mkdir()
    return tmp_path


def detect(machine: Path, environ=None, cluster_file=None) -> where.Where:
    return where.detect(str(machine / "bin"), environ or {}, machine, cluster_file)


def program(machine: Path, name: str, body: str) -> Path:
    path = machine / "bin" / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_without_any_trace_it_is_a_rehearsal(machine):
    found = detect(machine, {"PATH": "bin", "SLURMLESS": "1"})
    assert found.traces == ()
    assert not found.has_slurm(local=False)


TRACES = {
    "srun in PATH": lambda m: program(m, "srun", "true"),
    "squeue in PATH": lambda m: program(m, "squeue", "true"),
    "sinfo in PATH": lambda m: program(m, "sinfo", "true"),
    "scontrol in PATH": lambda m: program(m, "scontrol", "true"),
    "sbatch in PATH": lambda m: program(m, "sbatch", "exit 1"),
    "etc/slurm": lambda m: touch(m / "etc/slurm/slurm.conf"),
    "etc/slurm-llnl": lambda m: touch(m / "etc/slurm-llnl/slurm.conf"),
    "etc/slurm.conf": lambda m: touch(m / "etc/slurm.conf"),
    "/run/munge/munge.socket.2": lambda m: touch(m / "run/munge/munge.socket.2"),
    "var/run/munge/munge.socket.2": lambda m: touch(m / "var/run/munge/munge.socket.2"),
}


@pytest.mark.parametrize("trace", TRACES)
def test_every_trace_on_the_machine_stops_and_is_named(machine, trace):
    TRACES[trace](machine)
    with pytest.raises(RunError, match="no usable sbatch.*module load.*--local") as stopped:
        detect(machine).has_slurm(local=False)
    assert trace in str(stopped.value)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("name", ["SLURM_CONF", "SLURM_JOB_ID", "SLURM_CLUSTERS", "SBATCH_ACCOUNT"])
def test_every_variable_of_slurm_stops_and_is_named(machine, name):
    with pytest.raises(RunError, match=f"{name} is set"):
        detect(machine, {name: "x"}).has_slurm(local=False)


def test_a_cluster_file_stops_and_is_named(machine):
    with pytest.raises(RunError, match="a cluster file was given .*c.yaml"):
        detect(machine, cluster_file=Path("c.yaml")).has_slurm(local=False)


def test_local_rehearses_whatever_there_is(machine):
    program(machine, "sbatch", "echo slurm 22.05.8")
    assert not detect(machine, {"SLURM_CONF": "x"}).has_slurm(local=True)


def test_an_sbatch_that_answers_is_slurm(machine):
    path = program(machine, "sbatch", 'test "$1" = --version && echo slurm 22.05.8')
    found = detect(machine)
    assert found.sbatch == str(path)
    assert found.has_slurm(local=False)


def test_what_sbatch_complains_about_is_shown(machine):
    complaint = "echo error: first >&2; echo 'sbatch: fatal: no configuration' >&2; exit 1"
    program(machine, "sbatch", complaint)
    expected = r"no usable sbatch here \(sbatch: fatal: no configuration\)"
    with pytest.raises(RunError, match=expected):
        detect(machine).has_slurm(local=False)


def test_an_sbatch_that_hangs_is_given_up_on(machine, monkeypatch):
    monkeypatch.setattr(where, "_ANSWER_DEADLINE_S", 0.3)
    program(machine, "sbatch", "exec /bin/sleep 60")
    begin = time.monotonic()
    with pytest.raises(RunError, match="did not answer within 0.3 s"):
        detect(machine).has_slurm(local=False)
    assert time.monotonic() - begin < 30


def test_an_sbatch_of_another_architecture_is_unusable(machine):
    (machine / "bin/sbatch").write_bytes(b"\x7fELF nonsense")
    (machine / "bin/sbatch").chmod(0o755)
    with pytest.raises(RunError, match="no usable sbatch"):
        detect(machine).has_slurm(local=False)


def test_test_only_hands_over_the_script_and_its_refusal_is_an_error(machine):
    accepting = program(machine, "sbatch", 'test "$1" = --test-only && echo "ok: $(/bin/cat)" >&2')
    assert where.test_only(accepting, "#!/bin/bash") == "ok: #!/bin/bash"
    refusing = program(machine, "sbatch", "echo 'error: invalid partition' >&2; exit 1")
    with pytest.raises(RunError, match="refuses the job: error: invalid partition"):
        where.test_only(refusing, "x")
