"""How much of the waiting rollout.max_staleness removes.

    python tools/bench_overlap.py                 a simulation on the real admission code
    python tools/bench_overlap.py --real [FLAGS]  the tiny model, trained for real

The simulation is exact and has no clock: sequences with the lengths of a trace occupy a slot of
the engines for as many ticks as they have tokens, the trainer takes groups through
`rollout/admission.py`, and trains for a time that its tokens decide. The bound is what no order
can beat, max(generate, train): all slots are busy until all is sampled, or the trainer
never waits. A weight sync stops both sides for a hundredth of a step; the bound has none.

The trace: 100 rollouts of 64 prompts x 8 samples, lengths exp(Normal(ln 2048, 1)) cut at 16,384,
from the seed below. `--real` runs `python -m nanoslime.train --mock FLAGS` with staleness 0 and 1.
"""

import heapq
import json
import subprocess
import sys
import tempfile
import time
from argparse import REMAINDER, ArgumentParser, RawDescriptionHelpFormatter
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanoslime.rollout.admission import Admission, Limits

SEED = 20_251_128
NUM_STEPS = 100
BATCH = 64
NUM_SAMPLES = 8
MEDIAN = 2048
CAP = 16_384
SLOTS = 128  # sequences that all engines together sample at once
SYNC_SHARE = 0.01
ROOT = Path(__file__).parents[1]


def trace() -> np.ndarray:
    """Lengths [rollouts * prompts, samples]."""
    shape = (NUM_STEPS * BATCH, NUM_SAMPLES)
    lengths = np.random.default_rng(SEED).lognormal(np.log(MEDIAN), 1.0, shape)
    return lengths.clip(1, CAP).astype(int)


@dataclass(frozen=True, slots=True)
class Measured:
    total: float
    bound: float
    engines_idle: float
    trainer_idle: float
    staleness: float  # of a group's oldest token, mean over all groups


@dataclass(slots=True)
class Simulation:
    """Engines in ticks, one token of every busy slot each; `now` leaves pauses out."""

    lengths: np.ndarray
    admission: Admission
    now: float = 0.0
    free: int = SLOTS
    waiting: deque[tuple[int, int]] = field(default_factory=deque)  # (group, length)
    running: list[tuple[float, int]] = field(default_factory=list)  # heap of (end, group)
    left: dict[int, int] = field(default_factory=dict)  # samples of a group that are not done
    oldest: dict[int, int] = field(default_factory=dict)

    def feed(self) -> None:
        for _ in range(self.admission.room()):
            group = self.admission.admit()
            self.left[group] = NUM_SAMPLES
            self.waiting.extend((group, int(length)) for length in self.lengths[group])
        while self.free and self.waiting:
            group, length = self.waiting.popleft()
            self.oldest.setdefault(group, self.admission.version)
            heapq.heappush(self.running, (self.now + length, group))
            self.free -= 1

    def run_until(self, end: float) -> None:
        while self.running and self.running[0][0] <= end:
            self.step()
        self.now = end

    def step(self) -> None:
        """To the end of the next sequence."""
        self.now, group = heapq.heappop(self.running)
        self.free += 1
        self.left[group] -= 1
        if self.left[group] == 0:
            self.admission.finish(group, self.oldest[group], is_kept=True)
        self.feed()


def simulate(lengths: np.ndarray, train_per_generate: float, max_staleness: int) -> Measured:
    generate = lengths.sum() / SLOTS
    per_token = train_per_generate * generate / lengths.sum()
    sync = SYNC_SHARE * generate / NUM_STEPS
    limits = Limits(batch=BATCH, max_staleness=max_staleness, num_rollouts=NUM_STEPS)
    simulation = Simulation(lengths, Admission(limits))
    waited = 0.0
    trained = 0.0
    staleness = []
    for version in range(NUM_STEPS):
        assert simulation.admission.set_version(version) == []
        simulation.feed()
        begin = simulation.now
        while (taken := simulation.admission.take()) is None:
            simulation.step()
        waited += simulation.now - begin
        simulation.feed()
        ages = [version - simulation.oldest[group] for group in taken.group_ids]
        assert 0 <= min(ages) and max(ages) <= max_staleness
        staleness += ages
        seconds = per_token * lengths[taken.group_ids].sum()
        trained += seconds
        simulation.run_until(simulation.now + seconds)
    total = simulation.now + NUM_STEPS * sync
    return Measured(
        total=total,
        bound=max(generate, trained),
        engines_idle=1 - generate / total,
        trainer_idle=waited / total,
        staleness=float(np.mean(staleness)),
    )


def simulated() -> None:
    lengths = trace()
    print(f"{lengths.size} sequences of {lengths.mean():.0f} tokens on average, {SLOTS} slots\n")
    print(
        "| generate : train | staleness | total over bound | engines idle | trainer idle "
        "| mean age |\n|---|---|---|---|---|---|"
    )
    for name, ratio in (("2:1", 0.5), ("1:1", 1.0), ("1:2", 2.0)):
        for max_staleness in (0, 1, 2, 4):
            found = simulate(lengths, ratio, max_staleness)
            print(
                f"| {name} | {max_staleness} | {found.total / found.bound:.3f} "
                f"| {found.engines_idle:.1%} | {found.trainer_idle:.1%} | {found.staleness:.2f} |"
            )


def real(flags: list[str]) -> None:
    """The same recipe twice. Seconds a step leave out the first two."""
    print("| staleness | s a step | generate s | train s | whole run s | age mean, max |")
    print("|---|---|---|---|---|---|")
    curves = []
    for max_staleness in (0, 1):
        with tempfile.TemporaryDirectory() as directory:
            command = [sys.executable, "-m", "nanoslime.train", "--mock", *flags]
            command += ["--max-staleness", str(max_staleness)]
            command += ["--run-root", directory, "--name", "run", "--eval-interval", "10"]
            begin = time.monotonic()
            subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
            whole = time.monotonic() - begin
            run = Path(directory) / "run"
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            evals = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
        names = ("time/step_s", "time/generate_s", "time/train_s", "rollout/staleness_mean")
        means = [float(np.mean([row[name] for row in rows[2:]])) for name in names]
        oldest = max(row["rollout/staleness_max"] for row in rows)
        print(
            f"| {max_staleness} | {means[0]:.3f} | {means[1]:.3f} | {means[2]:.3f} | {whole:.1f} "
            f"| {means[3]:.2f}, {oldest:.0f} |"
        )
        rewards = [row["rollout/reward_mean"] for row in rows]
        tenths = [f"{np.mean(part):.3f}" for part in np.array_split(rewards, 10)]
        held_out = [f"{row['reward']:.3f}" for row in evals]
        curves.append(
            f"staleness {max_staleness}: reward by tenths of the run {', '.join(tenths)}; "
            f"on held-out prompts {', '.join(held_out)}"
        )
    print("\n" + "\n".join(curves))


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--real", nargs=REMAINDER, metavar="FLAG")
    arguments = parser.parse_args()
    if arguments.real is None:
        simulated()
    else:
        real(arguments.real)


if __name__ == "__main__":
    main()
