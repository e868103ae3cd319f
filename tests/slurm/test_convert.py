"""Conversions as jobs of a real SLURM: submitted, requeued, completed, failed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import process_table
from tests.jobs.made_run import HOSTILE
from tests.slurm.cluster import SlurmCluster

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).parents[2]
_DEADLINE_S = 60.0


class Login:
    """A shell on the login node, in a directory with a hostile name."""

    def __init__(self, slurm: SlurmCluster, folder: Path):
        self.slurm = slurm
        self.folder = folder
        # The checkout from which is submitted.
        self.root = ROOT

    def type(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        program = str(self.root / "jobs/submit_convert.py")
        command = [sys.executable, program, *map(str, arguments), "--cpus", "2"]
        environ = dict(os.environ)
        environ["SLURM_CONF"] = str(self.slurm.config_file)
        environ["PYTHONPATH"] = str(self.root)
        return subprocess.run(
            command, cwd=self.folder, env=environ, capture_output=True, text=True, timeout=60
        )

    def submit(self, *arguments: str | Path) -> int:
        shown = self.type(*arguments)
        assert shown.returncode == 0, shown.stderr
        lines = shown.stdout.splitlines()
        (job,) = [line.split()[-1] for line in lines if line.startswith("submitted job")]
        return int(job)

    def log(self, job: int, name: str) -> str:
        file = self.folder / f"{name}.slurm-{job}.out"
        return file.read_text() if file.exists() else f"there is no {file}"


@pytest.fixture
def login(slurm_cluster: SlurmCluster, no_leftovers: None, tmp_path: Path) -> Login:
    folder = tmp_path / HOSTILE
    folder.mkdir()
    return Login(slurm_cluster, folder)


def test_conversions_there_and_back_and_their_comparison(login: Login, tiny_model: Path) -> None:
    mcore = "100% it's; mcore"
    back = "back"
    commands_by_log = {
        mcore: ("hf-to-megatron", tiny_model, mcore),
        back: ("megatron-to-hf", mcore, back),
        "verify-checkpoint": ("verify-checkpoint", tiny_model, back),
    }
    for name, arguments in commands_by_log.items():
        job = login.submit(*arguments)
        fields = login.slurm.wait_state(job, "COMPLETED", "FAILED", timeout_s=_DEADLINE_S)
        assert fields["JobState"] == "COMPLETED", login.log(job, name)
        assert fields["NumNodes"] == "1"
        assert fields["NumCPUs"] == "2"
        assert fields["Requeue"] == "1"
        assert "peak memory" in login.log(job, name)
    assert "equal, bit for bit" in login.log(job, "verify-checkpoint")
    assert (login.folder / mcore / "release" / ".metadata").is_file()
    original = (tiny_model / "model.safetensors").read_bytes()
    assert (login.folder / back / "model.safetensors").read_bytes() == original


def test_a_requeued_job_runs_the_same_command_again(login: Login, tiny_model: Path) -> None:
    began = login.folder / "began"
    is_second_life = '[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]'
    first_life_waits = f"{is_second_life} || {{ echo first; touch began; sleep 200; }}"
    (login.folder / "site.yaml").write_text(f"gpus_per_node: 0\nsetup: ['{first_life_waits}']")
    job = login.submit("hf-to-megatron", tiny_model, "out", "--cluster", "site.yaml")
    assert process_table.wait_for(began.exists, _DEADLINE_S), login.log(job, "out")
    login.slurm.run("scontrol", "requeue", str(job))

    def has_restarted() -> bool:
        return login.slurm.job(job)["Restarts"] == "1"

    assert process_table.wait_for(has_restarted, _DEADLINE_S)
    fields = login.slurm.wait_state(job, "COMPLETED", "FAILED", timeout_s=_DEADLINE_S)
    assert fields["JobState"] == "COMPLETED", login.log(job, "out")
    said = login.log(job, "out")
    assert said.startswith("first\n")
    assert "peak memory" in said
    outputs = sorted(path.name for path in login.folder.glob("out*"))
    assert outputs == ["out", f"out.slurm-{job}.out"]


def test_a_job_runs_the_code_with_which_it_was_submitted(login: Login, tiny_model: Path) -> None:
    """A checkout in which somebody breaks everything while the job waits."""
    checkout = login.folder / "checkout"
    for name in ("nanoslime", "jobs", "tools"):
        shutil.copytree(ROOT / name, checkout / name)
    login.root = checkout
    (login.folder / "site.yaml").write_text('gpus_per_node: 0\nextra_sbatch: {hold: ""}')
    job = login.submit("hf-to-megatron", tiny_model, "out", "--cluster", "site.yaml")
    shutil.rmtree(checkout)
    login.slurm.run("scontrol", "release", str(job))
    fields = login.slurm.wait_state(job, "COMPLETED", "FAILED", timeout_s=_DEADLINE_S)
    assert fields["JobState"] == "COMPLETED", login.log(job, "out")
    outputs = sorted(path.name for path in login.folder.glob("out*"))
    assert outputs == ["out", f"out.slurm-{job}.out"]


def test_a_source_that_goes_while_the_job_waits_fails_it_in_one_line(
    login: Login, tiny_model: Path
) -> None:
    (login.folder / "site.yaml").write_text('gpus_per_node: 0\nextra_sbatch: {hold: ""}')
    source = login.folder / "source"
    source.symlink_to(tiny_model)
    job = login.submit("hf-to-megatron", source, "out", "--cluster", "site.yaml")
    source.unlink()
    login.slurm.run("scontrol", "release", str(job))
    login.slurm.wait_state(job, "FAILED", timeout_s=_DEADLINE_S)
    said = login.log(job, "out")
    assert said.startswith("hf_to_megatron: ")
    assert said.count("\n") == 1
    assert not (login.folder / "out").exists()
    assert not (login.folder / "out.partial").exists()


def test_sbatch_refusing_is_one_line(login: Login, tiny_model: Path) -> None:
    shown = login.type("hf-to-megatron", tiny_model, "out", "--partition", "nowhere")
    assert shown.returncode == 2
    assert "invalid partition specified: nowhere" in shown.stderr
    assert shown.stderr.startswith("submit_convert: sbatch refused the job: ")
    assert shown.stderr.count("\n") == 1
