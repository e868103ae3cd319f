"""Runs on a real SLURM are watched, entered and stopped from the login node."""

import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nanoslime.run_dir import STOPPED
from tests import process_table
from tests.jobs.made_run import HOSTILE, driver, make_run, make_venv_with_fake_ray
from tests.slurm.cluster import SlurmCluster
from tools.submit.slurm_submit import submit_sbatch
from tools.watch import commands

pytestmark = [pytest.mark.slurm, pytest.mark.matrix]


@pytest.fixture
def slurm(
    slurm_cluster: SlurmCluster, no_leftovers: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> SlurmCluster:
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.config_file))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return slurm_cluster


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def tell(*argv: object) -> str:
        capsys.readouterr()
        assert commands.main([str(word) for word in argv]) == 0
        return capsys.readouterr().out

    return tell


def test_a_job_is_watched_entered_and_stopped(
    slurm: SlurmCluster, tmp_path: Path, told: Callable[..., str]
) -> None:
    """One job that runs, and one that waits for its nodes."""
    venv = make_venv_with_fake_ray(tmp_path / "venv")
    made = make_run(tmp_path / HOSTILE / "runs", 4, venv=str(venv))
    waiting = make_run(tmp_path / HOSTILE / "waiting", 4, venv=str(venv))
    job_id = submit_sbatch(made.config, made.layout, made.run, driver("until-stop"))
    slurm.wait_state(int(job_id), "RUNNING", timeout_s=30)
    other = submit_sbatch(waiting.config, waiting.layout, waiting.run, driver("until-stop"))
    began = made.run.attempts / "1" / "driver_began"
    assert process_table.wait_for(began.exists, 60)

    page = told("status", made.run.path)
    assert "state     running" in page
    assert f"job       {job_id}  RUNNING  None" in page and "left on n[1-4]" in page
    state = told("ps", waiting.run.path)
    assert "PENDING (" in state and "never started" not in state

    attach = shlex.split(told("attach", made.run.path, "--print", "--node", "n3"))
    shell = attach.index("--pty")
    inside = slurm.run(*attach[:shell], "sh", "-c", "echo $SLURM_JOB_ID $SLURMD_NODENAME")
    assert inside.stdout.split() == [job_id, "n3"]

    assert f"scancel {other}: done" in told("stop", waiting.run.path)
    slurm.wait_state(int(other), "CANCELLED", timeout_s=30)

    begin = time.monotonic()
    text = told("stop", made.run.path)
    assert time.monotonic() - begin < 30
    assert "attempt 1: stopped" in text and f"scancel {job_id}" in text
    slurm.wait_state(int(job_id), "COMPLETED", "CANCELLED", timeout_s=30)
    code, reason = made.end
    assert code == STOPPED and reason.endswith("asked by runs.py stop")
    assert slurm.job(int(job_id))["Restarts"] == "0"
    assert "stopped" in told("ps", made.run.path)
