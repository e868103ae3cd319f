"""What a rung's run directory proves: a check for each thing that a cluster has to do.

Each is passed, failed, or not judged where a rung cannot show it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanoslime.config import RunConfig
from nanoslime.config.load import read
from nanoslime.layout import Layout
from nanoslime.models.shape import ModelShape
from nanoslime.run_dir import DONE, FAILED, RunDir
from nanoslime.storage import manifest
from nanoslime.storage.commit import checkpoints
from nanoslime.types import RunError
from tools.acceptance.places import KILLED, MEMORY, folder
from tools.memory.estimate import SLEEPING_ENGINE, estimate_memory
from tools.memory.parts import size_text
from tools.watch.status import facts, rows

PASSED = "passed"
FAILED_CHECK = "failed"
NOT_JUDGED = "not judged"
# Mean and largest |trainer's - engine's logprob| of a step's tokens. In bfloat16 both round each
# sum on their own (tools/BENCHMARKS.md, "do engine and trainer drift apart").
_MAX_MEAN_GAP = {"float32": 1e-4, "bfloat16": 0.05}
_MAX_GAP = {"float32": 1e-2, "bfloat16": 2.0}


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    outcome: str
    # A sentence with the figures.
    text: str
    values: dict[str, Any] = field(default_factory=dict)


def _judged(name: str, is_good: bool, text: str, **values: Any) -> Check:
    return Check(name, PASSED if is_good else FAILED_CHECK, text, values)


def of_run(run: RunDir) -> list[Check]:
    """All checks of a run that has ended, or has not come far."""
    config = read(run.config)
    metrics = rows(run.metrics)
    made: list[Callable[[], Check]] = [
        lambda: _steps(run, config, metrics),
        lambda: _parity(config, metrics),
        lambda: _sync(config, metrics),
        lambda: _save(run),
        lambda: _kill_and_resume(run),
        lambda: _bandwidth(run, config),
        lambda: _memory(run, config),
    ]
    return [check() for check in made]


def passed(checks: Sequence[Check]) -> bool:
    return all(check.outcome != FAILED_CHECK for check in checks)


def _steps(run: RunDir, config: RunConfig, metrics: Sequence[dict[str, Any]]) -> Check:
    """The run has reached its end, and each step is there once."""
    steps = [row.get("step") for row in metrics]
    wanted = list(range(config.rollout.num_rollout))
    attempt = run.latest_attempt()
    code, reason = (attempt and attempt.ended()) or (None, "nobody has said how it ended")
    text = f"{len(steps)} of {len(wanted)} steps, each once"
    if steps != wanted:
        text = f"steps {steps} in place of {wanted}"
    if code != DONE:
        text = f"{text}; the run did not reach its end: {reason or f'exit code {code}'}"
    return _judged("steps", steps == wanted and code == DONE, text, steps=steps)


def _parity(config: RunConfig, metrics: Sequence[dict[str, Any]]) -> Check:
    """The trainer gives the engine's tokens the logprobs that the engine gave them."""
    mean = _largest(metrics, "train/logprob_gap_mean")
    most = _largest(metrics, "train/logprob_gap_max")
    kind = "float32" if config.model.dtype == "float32" else "bfloat16"
    if mean is None or most is None:
        return _judged("parity", False, "no step has compared trainer and engine")
    is_good = mean <= _MAX_MEAN_GAP[kind] and most <= _MAX_GAP[kind]
    text = (
        f"logprobs of trainer and engine differ by {mean:.2g} in the mean of the worst step "
        f"(bound {_MAX_MEAN_GAP[kind]:g}) and {most:.2g} at most (bound {_MAX_GAP[kind]:g}), {kind}"
    )
    return _judged("parity", is_good, text, gap_mean=mean, gap_max=most, dtype=kind)


def _sync(config: RunConfig, metrics: Sequence[dict[str, Any]]) -> Check:
    """The engines have the trainer's weights after each sync.

    Each sync was made twice, and an engine of which the second time changes a tensor is lost;
    after it the engines have scored tokens of prompts, and so has the trainer.
    """
    gap = _largest(metrics, "weight_sync/logprob_gap_mean")
    lost = _largest(metrics, "engines/lost")
    if gap is None:
        return _judged("sync", False, "no engine has said what weights it has after a sync")
    bound = config.weight_sync.max_logprob_gap
    if bound is None:
        bound = 0.01 if config.model.dtype == "float32" else 0.3
    is_twice = config.weight_sync.compare_every == 1
    twice = ", each made twice without a change" if is_twice else ""
    text = (
        f"{len(metrics)} weight syncs{twice}; engines and trainer differ by {gap:.2g} on the same "
        f"tokens after them (bound {bound:g}), and {lost or 0:.0f} engines were lost"
    )
    return _judged("sync", gap <= bound and not lost and is_twice, text, gap_mean=gap, lost=lost)


def _save(run: RunDir) -> Check:
    """The newest checkpoint has all bytes that were written."""
    found = checkpoints(run.checkpoints)
    if not found:
        return _judged("save", False, "there is no checkpoint")
    step, path = found[-1]
    try:
        manifest.verify(path)
    except RunError as error:
        return _judged("save", False, f"the checkpoint of step {step} is damaged: {error}")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    took_s = [life["seconds"] for life in _phases(run) if life["phase"] == "checkpoint"]
    text = (
        f"the checkpoint of step {step}, {size_text(size)}, has the hashes of its manifest; saving "
        f"took at most {max(took_s, default=0.0):.1f} s"
    )
    return _judged("save", True, text, bytes=size, seconds=max(took_s, default=0.0))


def _kill_and_resume(run: RunDir) -> Check:
    """The driver was killed in a step, and another attempt went on after the last commit."""
    name = "kill and resume"
    killed = facts(folder(run) / KILLED)
    if not killed:
        return _judged(name, False, "the driver was never killed: no step was committed before")
    attempts = run.all_attempts()
    code, _ = attempts[0].ended() or (None, "")
    if len(attempts) < 2:
        return _judged(name, False, "the driver was killed, and no attempt came after it")
    second = attempts[1]
    resumed_at = second.record["rollouts"]
    last_code, _ = attempts[-1].ended() or (None, "")
    again_s = second.record["started"] - killed["time"]
    is_good = code == FAILED and resumed_at == killed["committed"] and last_code == DONE
    text = (
        f"the driver got SIGKILL in phase {killed['phase']} after {killed['committed']} committed "
        f"step(s); the next attempt began {again_s:.0f} s later after step {resumed_at}"
    )
    return _judged(name, is_good, text, resumed_at=resumed_at, seconds_until_next=again_s)


def _bandwidth(run: RunDir, config: RunConfig) -> Check:
    """What the nodes have measured between them before Ray started (tools/links.py)."""
    name = "bandwidth"
    if config.cluster.nodes == 1:
        return Check(name, NOT_JUDGED, "one node has no links to others")
    if not config.cluster.measure_links:
        return Check(name, NOT_JUDGED, "cluster.measure_links=false leaves the links unmeasured")
    found = [facts(attempt.path / "links.result.json") for attempt in run.all_attempts()]
    measured = [one for one in found if one.get("links")]
    if not measured:
        return _judged(name, False, "the nodes have not measured their links")
    newest = measured[-1]
    speeds = [link["gbps"] for link in newest["links"]]
    values = {
        "min_gbps": min(speeds),
        "max_gbps": max(speeds),
        "all_reduce_gbps": newest["all_reduce_gbps"],
    }
    text = (
        f"links give {values['min_gbps']:.3g} to {values['max_gbps']:.3g} GB/s, and an all-reduce "
        f"{values['all_reduce_gbps']:.3g} GB/s"
    )
    expected = config.cluster.expected_gbps
    if expected is not None:
        text += f" (bound of a link {expected / 2:g})"
    problems = [one["problem"] for one in newest["readings"].values() if one["problem"]]
    return _judged(name, not problems, "; ".join([text, *problems]), **values)


def _memory(run: RunDir, config: RunConfig) -> Check:
    """What the plan said that a trainer needs, and what it has had."""
    measured = max(
        (facts(path).get("peak_bytes", 0) for path in folder(run).glob(f"{MEMORY}-*.json")),
        default=0,
    )
    model = run.model / "model" if config.rehearsal.enabled else config.model.hf_checkpoint
    try:
        shape = ModelShape.read(str(model))
        layout = Layout.from_json(run.plan.read_text())
        trainer = estimate_memory(config, shape, layout.parallel).trainer
    except (RunError, OSError, ValueError) as error:
        return Check("memory", NOT_JUDGED, f"there is no prediction: {error}")
    if trainer is None:
        return Check("memory", NOT_JUDGED, "the run has no trainer")
    # A colocated engine has a process of its own.
    of_engine = SLEEPING_ENGINE if config.cluster.colocate and trainer.reserve else 0
    predicted = trainer.total - trainer.headroom - of_engine
    values = {"predicted_bytes": predicted, "measured_bytes": measured}
    if not measured:
        return Check("memory", NOT_JUDGED, "no trainer was measured on the first node", values)
    text = f"predicted {size_text(predicted)} a trainer, measured {size_text(measured)}"
    if config.cluster.device == "cpu":
        text += " with all that its process has loaded, so that this is not judged on CPUs"
        return Check("memory", NOT_JUDGED, text, values)
    fits = measured <= config.cluster.gpu_memory_gib * (1 << 30)
    return _judged("memory", fits, f"{text} of the largest one of the first node", **values)


def _phases(run: RunDir) -> list[dict[str, Any]]:
    """Each phase of all attempts with its seconds."""
    found = []
    for attempt in run.all_attempts():
        told = rows(attempt.phases)
        for line, following in zip(told, told[1:], strict=False):
            seconds = following["time"] - line["time"]
            found.append({"phase": line["phase"], "seconds": seconds})
    return found


def _largest(metrics: Sequence[dict[str, Any]], key: str) -> float | None:
    """The largest value of a metric; one that is no number is larger than all others."""
    values = [row[key] for row in metrics if row.get(key) is not None]
    if any(math.isnan(value) for value in values):
        return math.inf
    return max(values, default=None)
