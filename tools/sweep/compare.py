"""Compares runs: a row for each setting, with mean and standard error over its seeds.

Reward is that of training (rollout/reward_mean) and of evaluation (the first set), at each run's
last step and at its best. A setting is what the runs' configurations do not have in common, seeds
and names aside; for a sweep it is what its file says.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from nanoslime.types import RunError
from tools.sweep import table
from tools.watch.status import RunStatus, damage_named

# Runs of the same setting differ in these.
_OWN = ("seed", "name", "cluster.run_root", "rollout.load_rollouts")
_COLUMNS = (
    "setting",
    "runs",
    "done",
    "train reward, last",
    "train reward, best",
    "eval reward, last",
    "eval reward, best",
    "steps",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run; None where it has no such reward."""

    is_done: bool
    num_steps: int
    train_last: float | None
    train_best: float | None
    eval_last: float | None
    eval_best: float | None
    unit: str
    hours: float


def show(asked: argparse.Namespace) -> Iterator[str]:
    yield from lines(asked.runs)


def lines(paths: Sequence[Path]) -> list[str]:
    """The table of these runs, and of the runs of these sweeps, and what is left out of it."""
    statuses = []
    outcomes = []
    left_out = []
    for path in table.runs_of(paths):
        try:
            with damage_named(path):
                status = RunStatus(path)
                outcomes.append(_outcome(status))
                statuses.append(status)
        except RunError as error:
            left_out.append(f"left out: {error}")
    if not statuses:
        left_out = left_out or ["there is nothing to compare, all runs were deleted"]
        raise RunError(
            f"{', '.join(map(str, paths))}: {'; '.join(left_out)}; name another sweep, or runs"
        )
    by_setting: dict[str, list[Outcome]] = {}
    for setting, outcome in zip(_settings(paths, statuses), outcomes, strict=True):
        by_setting.setdefault(setting, []).append(outcome)
    damages = [table.damage(path) for path in paths if table.is_sweep(path)]
    units = " and ".join(sorted({outcome.unit for outcome in outcomes}))
    rows = [[*_COLUMNS, units]]
    rows += [_row(setting, of_setting) for setting, of_setting in by_setting.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    shown = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return [
        *shown,
        *left_out,
        *(f"told by their configurations, since {fault}" for fault in damages if fault),
    ]


def _row(setting: str, outcomes: Sequence[Outcome]) -> list[str]:
    steps = sorted({outcome.num_steps for outcome in outcomes})
    return [
        setting or "-",
        str(len(outcomes)),
        str(sum(outcome.is_done for outcome in outcomes)),
        estimate([outcome.train_last for outcome in outcomes]),
        estimate([outcome.train_best for outcome in outcomes]),
        estimate([outcome.eval_last for outcome in outcomes]),
        estimate([outcome.eval_best for outcome in outcomes]),
        str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}",
        f"{sum(outcome.hours for outcome in outcomes):.3g}",
    ]


def estimate(values: Sequence[float | None]) -> str:
    """Mean and standard error of those that are known; a single value has no error."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    missing = "" if len(known) == len(values) else f" (of {len(known)})"
    if len(known) == 1:
        return f"{known[0]:.4f}{missing}"
    error = stdev(known) / math.sqrt(len(known))
    return f"{fmean(known):.4f} +- {error:.4f}{missing}"


def _outcome(status: RunStatus) -> Outcome:
    trained = _values(status.rows, "rollout/reward_mean")
    sets = [row.get("set") for row in status.evals]
    first_set = [row for row in status.evals if row.get("set") == sets[0]]
    # The one before the first step says nothing of what was learned.
    evaluated = _values([row for row in first_set if row.get("step", -1) >= 0], "reward")
    unit, hours = status.hours()
    return Outcome(
        is_done=bool(status.lives) and status.lives[-1].outcome == "done",
        num_steps=1 + max((row["step"] for row in status.rows if "step" in row), default=-1),
        train_last=trained[-1] if trained else None,
        train_best=max(trained, default=None),
        eval_last=evaluated[-1] if evaluated else None,
        eval_best=max(evaluated, default=None),
        unit=unit,
        hours=sum(sum(spent.values()) for spent in hours),
    )


def _values(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [float(row[key]) for row in rows if row.get(key) is not None]


def _settings(paths: Sequence[Path], statuses: Sequence[RunStatus]) -> list[str]:
    """What is special about each run."""
    if len(paths) == 1 and table.is_sweep(paths[0]) and not table.damage(paths[0]):
        by_run = {row.run: row.setting for row in table.read(paths[0]).rows}
        return [by_run[status.run.name] for status in statuses]
    flat = [_flat(asdict(status.config)) for status in statuses]
    names = dict.fromkeys(name for one in flat for name in one)
    differing = [
        name
        for name in names
        if name not in _OWN and len({repr(one.get(name)) for one in flat}) > 1
    ]
    return [", ".join(f"{name}={one.get(name)}" for name in differing) for one in flat]


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
