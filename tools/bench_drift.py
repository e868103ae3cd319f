"""Whether engine and trainer drift apart over many weight syncs in bfloat16.

    python tools/bench_drift.py [--rollouts 200] [--window 20] [--run-root DIR] [FLAG ...]

Each case is a whole run of the mock recipe (the tiny model, half taught) as a process of its
own, with real SGLang and real weight syncs: `python -m nanoslime.train --mock --engine sglang
--dtype bfloat16`. The cases are the recipe's learning rate, with which the model learns its
task, a learning rate of 0, and both without SGLang's float32 output layer
(enable_fp32_lm_head), which nanoslime sets. Further flags go to all runs.

Groups with equal rewards stay in training (filter_zero_std false), so that a gap is of all
sampled tokens: of the others, the tokens that the model is unsure of would be left at the end,
where most groups are solved, and their gap is larger.

The table has train/logprob_gap_mean over the first and over the last rollouts of a run, their
ratio, and beside them the entropy, on which a gap depends: a sure policy has a small one.
Exits with 1 where a ratio of a case with the float32 output layer is above 1.2, or of the one
with learning rate 0 below 1 / 1.2.
"""

import json
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

LIMIT = 1.2
HALF_HEAD = ("--rollout.sglang", '{"enable_fp32_lm_head": false}')


@dataclass(frozen=True)
class Case:
    title: str
    name: str  # of the run
    flags: tuple[str, ...]
    float32_head: bool
    learns: bool


CASES = (
    Case("learns", "learns", (), float32_head=True, learns=True),
    Case("lr 0", "lr-0", ("--lr", "0"), float32_head=True, learns=False),
    Case("learns, bfloat16 head", "half-head", HALF_HEAD, float32_head=False, learns=True),
    Case(
        "lr 0, bfloat16 head",
        "half-head-lr-0",
        (*HALF_HEAD, "--lr", "0"),
        float32_head=False,
        learns=False,
    ),
)


def train(case: Case, rollouts: int, run_root: Path, more: list[str]) -> list[dict[str, float]]:
    """The rows of a run, one a rollout."""
    command = [sys.executable, "-m", "nanoslime.train", "--mock", "--engine", "sglang"]
    command += ["--dtype", "bfloat16", "--num-rollout", str(rollouts)]
    command += ["--algorithm.no-filter-zero-std"]
    command += ["--run-root", str(run_root), "--name", case.name, *case.flags, *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (run_root / case.name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if "train/logprob_gap_mean" in row]


def main(argv: list[str]) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=200, help="%(default)s")
    parser.add_argument("--window", type=int, default=20, help="%(default)s")
    parser.add_argument("--run-root", type=Path)
    options, more = parser.parse_known_args(argv)
    run_root = options.run_root or Path(tempfile.mkdtemp(prefix="drift-"))
    window = options.window
    drifted = False
    print(f"runs in {run_root}\n")
    print("| | reward | entropy | first gap | last gap | last / first | largest gap |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for case in CASES:
        rows = train(case, options.rollouts, run_root, more)
        ends = (rows[:window], rows[-window:])
        gaps = [mean(row["train/logprob_gap_mean"] for row in end) for end in ends]
        rewards = [mean(row["rollout/reward_mean"] for row in end) for end in ends]
        entropies = [mean(row["train/entropy"] for row in end) for end in ends]
        largest = max(row["train/logprob_gap_max"] for row in rows)
        ratio = gaps[1] / gaps[0]
        print(
            f"| {case.title} | {rewards[0]:.3f} to {rewards[1]:.3f} "
            f"| {entropies[0]:.3f} to {entropies[1]:.3f} "
            f"| {gaps[0]:.2e} | {gaps[1]:.2e} | {ratio:.2f} | {largest:.2e} |",
            flush=True,
        )
        is_flat = case.learns or ratio >= 1 / LIMIT
        if case.float32_head and not (ratio <= LIMIT and is_flat):
            drifted = True
    return int(drifted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
