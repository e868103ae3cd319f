"""The README's first command to its end: three seeds learn, and a control without a learning rate does not.

Four runs of about five minutes; the rows printed at the end belong into tests/RESULTS.md.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanoslime.run_dir import RunDir

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1200)]
ROWS: list[str] = []


def main_job(root: Path, name: str, *flags: str) -> tuple[dict, RunDir]:
    """Runs it as a user would; its summary, and a row of the results table."""
    command = [
        sys.executable,
        "jobs/submit_grpo.py",
        "--nodes",
        "4",
        "--local",
        "--run-root",
        str(root),
    ]
    begin = time.monotonic()
    done = subprocess.run(
        [*command, "--name", name, *flags], cwd=ROOT, capture_output=True, text=True, timeout=1100
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    run = RunDir.open(root / name)
    summary = json.loads(run.summary.read_text())
    rewards = [
        json.loads(line)["rollout/reward_mean"] for line in run.metrics.read_text().splitlines()
    ]
    curve = [rewards[0], *rewards[9:-1:10], rewards[-1]]
    phases = ", ".join(f"{phase} {s:.0f}" for phase, s in summary["phase_s"].items())
    ROWS.append(
        f"| {name} | {summary['reward_before']:.3f} | {summary['reward_after']:.3f} "
        f"| {' '.join(f'{r:.2f}' for r in curve)} | {summary['logprob_gap_max']:.1e} "
        f"| {time.monotonic() - begin:.0f} | {phases} |"
    )
    print("\n".join(["", *ROWS]), file=sys.__stdout__, flush=True)
    return summary, run


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_grpo_learns_the_task(tmp_path, seed):
    summary, run = main_job(
        tmp_path, f"seed-{seed}", "--seed", str(seed), "--rehearsal.seed", str(seed)
    )
    assert 0.2 <= summary["reward_before"] <= 0.6
    assert summary["reward_after"] >= max(0.85, summary["reward_before"] + 0.3)
    assert summary["seconds"] < 900
    gaps = [
        json.loads(line)["train/logprob_gap_mean"] for line in run.metrics.read_text().splitlines()
    ]
    # the largest of 200,000 single tokens is rounding of an unlikely one: 1e-4 was seen
    assert max(gaps) < 1e-5 and summary["logprob_gap_max"] < 1e-3
    train, held_out = (
        {json.loads(line)["prompt"] for line in (run.model / name).read_text().splitlines()}
        for name in ("train.jsonl", "held_out.jsonl")
    )
    assert len(train | held_out) >= 1000 and len(held_out) >= 200 and not train & held_out


def test_without_a_learning_rate_nothing_is_learned(tmp_path):
    summary, _ = main_job(tmp_path, "control", "--lr", "0")
    assert abs(summary["reward_after"] - summary["reward_before"]) <= 0.05
