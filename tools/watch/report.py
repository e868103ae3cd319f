"""A run as one HTML page that needs no network: tools/watch/report.html with the run's data.

The page draws itself. Curves, phases and samples are in it as JSON, in which no text of a
sample can end the element that holds it.
"""

import argparse
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import json_line, publish
from nanoslime.types import RunError
from tools.watch import samples
from tools.watch.recorded import read_samples, recorded_steps
from tools.watch.status import Life, RunStatus, facts, subjects

_TEMPLATE = Path(__file__).parent / "report.html"
_CURVES = """rollout/reward_mean train/loss train/ref_kl train/ppo_kl_abs train/entropy
train/grad_norm train/logprob_gap_mean rollout/response_tokens_mean rollout/truncated_ratio
time/step_s""".split()
# So many prompts with a sample of low and of high reward, of the first and the last rollout.
_NUM_SAMPLES = 3


def write(asked: argparse.Namespace) -> Iterator[str]:
    """Writes the page and tells where."""
    status = RunStatus(asked.run)
    out = asked.out or Path(f"{status.run.name}.html")
    publish(out, html(status).encode())
    yield str(out.absolute())


def html(status: RunStatus) -> str:
    """The page."""
    unit, hours = status.hours()
    data = {
        "name": status.run.name,
        "subjects": list(subjects(status)),
        "curves": {
            "evaluation": _curve(status.evals, "reward"),
            **{name: _curve(status.rows, name) for name in _CURVES},
        },
        "unit": unit,
        "attempts": [_attempt(status, life, hours[i]) for i, life in enumerate(status.lives)],
        "layout": facts(status.run.plan),
        "samples": _samples(status.run),
    }
    # Of all characters only this one can end a script element.
    text = json_line(data).decode().replace("<", "\\u003c")
    return _TEMPLATE.read_text().replace("RUN_DATA", text)


def _curve(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _attempt(status: RunStatus, life: Life, hours: dict[str, float]) -> dict[str, Any]:
    nodes = (status.run.attempts / str(life.number) / "nodes").glob("*.json")
    names = {file.stem: facts(file).get("name") for file in nodes}
    return {**life._asdict(), "hours": hours, "nodes": names}


def _samples(run: RunDir) -> list[dict[str, Any]]:
    """Some of the first and of the last rollout; none where they cannot be read."""
    steps = recorded_steps(run.rollouts)
    chosen = []
    with suppress(RunError, OSError, KeyError):
        tokenizer = samples.tokenizer_of(run)
        for step in sorted({*steps[:1], *steps[-1:]}):
            by_group = {one.line["group"]: one for one in read_samples(run.rollouts, step)}
            ranked = sorted(by_group.values(), key=samples.reward_of)
            for sample in ranked[:_NUM_SAMPLES] + ranked[_NUM_SAMPLES:][-_NUM_SAMPLES:]:
                facts_of = {key: sample.line[key] for key in ("reward", "status", "label", "error")}
                text = "\n".join(samples.turns(sample, tokenizer, color=False))
                chosen.append({"step": step, "text": text, **facts_of})
    return chosen
