"""The main job on a real SLURM: preempted and requeued; a small one, handed over by a person."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.checkout import ROOT
from nanoslime.run_dir import DONE, STOPPED, RunDir
from tests import process_table
from tests.slurm.cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.ray, pytest.mark.sglang, pytest.mark.megatron]
FLAGS = ["--num-rollout", "3", "--eval.max-prompts", "50", "--eval.n-samples-per-prompt", "1"]


@pytest.fixture
def slurm(
    slurm_cluster: SlurmCluster, no_leftovers: None, monkeypatch: pytest.MonkeyPatch
) -> SlurmCluster:
    monkeypatch.setenv("SLURM_CONF", str(slurm_cluster.config_file))
    monkeypatch.chdir(ROOT)
    return slurm_cluster


def tails(run: RunDir) -> str:
    files = sorted(run.path.rglob("*.log")) + sorted(run.path.rglob("*.out"))
    return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-1500:]}" for file in files)


def check_outcome(run: RunDir, attempts: int, trainers: list[str], engines: list[str]) -> None:
    """Three steps, each once and in order.

    Trainer ranks and engines ran on the nodes of these addresses.
    """
    steps = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
    assert steps == [0, 1, 2], tails(run)
    summary = json.loads(run.summary.read_text())
    assert summary["steps"] == 3
    assert summary["logprob_gap_max"] < 1e-4
    assert 0 < summary["reward_before"] < 1
    assert Path(summary["hf_export"], "model.safetensors").is_file()
    last = run.attempt(attempts)
    assert last.ended() == (DONE, ""), tails(run)
    for rank, address in enumerate(trainers):
        log = last.log("trainer", rank).read_text()
        assert f"trainer rank {rank} of {len(trainers)} on {address}" in log
    for index, address in enumerate(engines):
        assert f"http://{address}:" in last.log("sglang", index).read_text()


@pytest.mark.timeout(600)
def test_a_submitted_job_is_preempted_requeued_and_completes_at_the_right_step(slurm, tmp_path):
    sizes = ["--nodes", "2", "--tp-size", "2", "--pp-size", "1"]
    command = [sys.executable, "jobs/submit_grpo.py", *sizes, "--run-root", str(tmp_path), *FLAGS]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    (job_id,) = [line.split()[-1] for line in lines if line.startswith("submitted job")]
    run = RunDir.open(tmp_path / "rehearsal")

    def first_step_or_failure() -> bool:
        return run.metrics.exists() or run.status().get("phase") == "failed"

    assert process_table.wait_for(first_step_or_failure, 280, 0.2)
    # SLURM sends this signal before the time limit and a preemption.
    slurm.run("scancel", "--signal=USR2", job_id)
    slurm.wait_state(int(job_id), "COMPLETED", timeout_s=280)
    code, reason = run.attempt(1).ended() or (None, "")
    assert code == STOPPED, tails(run)
    assert reason.startswith("SIGUSR2"), tails(run)
    assert slurm.job(int(job_id))["Restarts"] == "1"
    evaluated = [json.loads(line)["step"] for line in run.evals.read_text().splitlines()]
    assert evaluated[0] == -1
    assert evaluated[-1] == 2
    assert "resumed after" in run.attempt(2).log("driver", 0).read_text()
    check_outcome(run, 2, trainers=["127.0.1.1"] * 2, engines=["127.0.1.2"])


@pytest.mark.timeout(400)
def test_a_prepared_job_runs_the_code_of_its_submission_whatever_is_edited(
    slurm, tmp_path, monkeypatch
):
    """With a trainer rank on each of two nodes, and an engine in the driver.

    The job waits in a checkout that is spoiled meanwhile, and has a reward of the user's own there.
    """
    checkout = tmp_path / "checkout"
    for folder in ("nanoslime", "jobs", "tools"):
        without = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, checkout / folder, ignore=without)
    reward = "from nanoslime.rollout.rewards.exact_match import reward as mine\n"
    (checkout / "my_rewards.py").write_text(reward)
    monkeypatch.chdir(checkout)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    sizes = ["--cluster.slots-per-node", "1", "--tp-size", "1", "--engine", "embedded"]
    command = [sys.executable, "jobs/submit_grpo.py", "--nodes", "2", "--prepare", *sizes, *FLAGS]
    command += ["--run-root", str(tmp_path / "runs"), "--reward", "my_rewards:mine"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    run = RunDir.open(Path(shown.stdout.removesuffix("\n")))
    job_id = slurm.sbatch("--hold", str(run.batch_script))
    for package in ("nanoslime", "jobs", "tools"):
        (checkout / package / "__init__.py").write_text("raise SystemExit('edited')\n")
    slurm.run("scontrol", "release", str(job_id))
    slurm.wait_state(job_id, "COMPLETED", timeout_s=280)
    check_outcome(run, 1, trainers=["127.0.1.1", "127.0.1.2"], engines=[])
