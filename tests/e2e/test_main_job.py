"""The README's first command to its end: three seeds learn, and a control without a learning
rate does not.

Four runs of about five minutes; the rows printed at the end belong into tests/RESULTS.md.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nanoslime.run_dir import RunDir

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1200)]
ROWS: list[str] = []


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main_job(root: Path, name: str, *flags: str) -> tuple[dict[str, Any], RunDir]:
    """Runs it as a user would; returns its summary and prints a row of the results table."""
    command = [sys.executable, "jobs/submit_grpo.py", "--nodes", "4", "--local"]
    command += ["--run-root", str(root), "--name", name, *flags]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1100)
    seconds = time.monotonic() - begin
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    run = RunDir.open(root / name)
    summary = json.loads(run.summary.read_text())
    rewards = [row["rollout/reward_mean"] for row in json_lines(run.metrics)]
    curve = [rewards[0], *rewards[9:-1:10], rewards[-1]]
    columns = [
        name,
        f"{summary['reward_before']:.3f}",
        f"{summary['reward_after']:.3f}",
        " ".join(f"{reward:.2f}" for reward in curve),
        f"{summary['logprob_gap_max']:.1e}",
        f"{seconds:.0f}",
        ", ".join(f"{phase} {s:.0f}" for phase, s in summary["phase_s"].items()),
    ]
    ROWS.append(f"| {' | '.join(columns)} |")
    print("\n".join(["", *ROWS]), file=sys.__stdout__, flush=True)
    return summary, run


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_grpo_learns_the_task(tmp_path, seed):
    flags = ["--seed", str(seed), "--rehearsal.seed", str(seed)]
    summary, run = main_job(tmp_path, f"seed-{seed}", *flags)
    assert 0.2 <= summary["reward_before"] <= 0.6
    assert summary["reward_after"] >= max(0.85, summary["reward_before"] + 0.3)
    assert summary["seconds"] < 900
    mean_gaps = [row["train/logprob_gap_mean"] for row in json_lines(run.metrics)]
    # the largest of 200,000 single tokens is rounding of an unlikely one: 1e-4 was seen
    assert max(mean_gaps) < 1e-5 and summary["logprob_gap_max"] < 1e-3
    train = {row["prompt"] for row in json_lines(run.model / "train.jsonl")}
    held_out = {row["prompt"] for row in json_lines(run.model / "held_out.jsonl")}
    assert len(train | held_out) >= 1000 and len(held_out) >= 200 and not train & held_out


def test_without_a_learning_rate_nothing_is_learned(tmp_path):
    summary, _ = main_job(tmp_path, "control", "--lr", "0")
    assert abs(summary["reward_after"] - summary["reward_before"]) <= 0.05
