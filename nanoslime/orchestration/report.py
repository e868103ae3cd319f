"""What a run tells of itself: its phase while it runs, and a summary at its end."""

import json
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanoslime.orchestration.session import Session
from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import publish_json


class Clock:
    """Counts the seconds of each phase, which lasts until the next one begins, and
    publishes the run's status.
    """

    def __init__(self, run: RunDir):
        self._run = run
        self._phase = ""
        self._start = time.monotonic()
        self.seconds: dict[str, float] = defaultdict(float)
        self.step = 0

    def __call__(self, phase: str) -> None:
        now = time.monotonic()
        if self._phase:
            self.seconds[self._phase] += now - self._start
        self._phase = phase
        self._start = now
        self._run.write_status(phase, self.step)


def write_summary(session: Session, clock: Clock, seconds: float) -> None:
    """Writes summary.json from what the run left in its files.

    The rewards of a resumed run cover all of its attempts; seconds and phase_s are of the last.
    """
    run = session.attempt.run
    rollouts = session.config.rollout.num_rollout
    evals = _json_lines(run.evals)
    rows = _json_lines(run.metrics)
    gaps = [row["train/logprob_gap_max"] for row in rows if "train/logprob_gap_max" in row]
    hf = run.hf(rollouts)
    summary = {
        "reward_before": _reward_at(-1, evals),
        "reward_after": _reward_at(rollouts - 1, reversed(evals)),
        "steps": rollouts,
        "logprob_gap_max": max(gaps, default=None),
        "seconds": round(seconds, 1),
        "phase_s": {phase: round(s, 1) for phase, s in clock.seconds.items()},
        "checkpoint": str(run.checkpoint(rollouts)),
        "hf_export": str(hf) if hf.exists() else None,
        "tensorboard": str(run.tensorboard) if session.config.tracking.use_tensorboard else None,
    }
    publish_json(run.summary, summary)


def _reward_at(step: int, evals: Iterable[dict[str, Any]]) -> float | None:
    """The reward of the first of these evaluations that is of `step`."""
    for evaluation in evals:
        if evaluation["step"] == step:
            return evaluation["reward"]
    return None


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
