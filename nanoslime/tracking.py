"""Where the numbers of a run go: one line a step on the console, metrics.jsonl, TensorBoard, W&B."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanoslime.config.run import RunConfig
from nanoslime.plugins import resolve
from nanoslime.run_dir import RunDir

logger = logging.getLogger(__name__)

WRITERS = {"tensorboard": "torch.utils.tensorboard:SummaryWriter", "wandb": "wandb:init"}


class Sink:
    """Where numbers go. What a sink leaves out does nothing."""

    def resume(self, step: int) -> None: ...
    def log(self, step: int, metrics: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class Tracker(AbstractContextManager["Tracker"]):
    """Sends each step's metrics to its sinks; with none it is silent. Leaving it closes them."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def resume(self, step: int) -> None:
        """Call it before the first log: the run goes on at `step`; what was logged from there on is void."""
        for sink in self._sinks:
            sink.resume(step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """`metrics` of rollout `step`, named area/what_unit; steps come in rising order."""
        for sink in self._sinks:
            sink.log(step, metrics)

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.close()


def make_tracker(config: RunConfig, run: RunDir, *, leads: bool = True) -> Tracker:
    """The sinks that `config.tracking` asks for; none for a rank that does not lead.

    Raises ValueError where one was asked for that is not installed.
    """
    if not leads:
        return Tracker([])
    sinks: list[Sink] = [_Console(config.rollout.num_rollout), _JSONLines(run.metrics)]
    if config.tracking.use_tensorboard:
        sinks.append(_TensorBoard(run.tensorboard))
    if config.tracking.use_wandb:
        sinks.append(_WandB(config, run))
    return Tracker(sinks)


def console_line(step: int, num_rollout: int, metrics: dict[str, float]) -> str:
    """`step` of `num_rollout`: rewards, KL, logprob gap between engine and trainer, seconds per phase."""
    kl = "train/ref_kl" if "train/ref_kl" in metrics else "train/ppo_kl_abs"
    shown = [
        ("reward", "rollout/reward_mean", ".3f"),
        ("eval", "eval/reward_mean", ".3f"),
        (kl.removeprefix("train/"), kl, ".1e"),
        ("gap", "train/logprob_gap_mean", ".1e"),
        ("gap_max", "train/logprob_gap_max", ".1e"),
    ]
    parts = [f"{label} {metrics[name]:{form}}" for label, name, form in shown if name in metrics]
    if metrics.get("train/skipped"):
        parts.append("SKIPPED: non-finite gradient")
    phases = {name: seconds for name, seconds in metrics.items() if name.startswith("time/")}
    parts += [f"{name[len('time/') :].removesuffix('_s')} {s:.1f}s" for name, s in phases.items()]
    return "  ".join([f"step {step + 1}/{num_rollout}", *parts])


class _Console(Sink):
    def __init__(self, num_rollout: int) -> None:
        self._num_rollout = num_rollout

    def resume(self, step: int) -> None:
        if step:
            logger.info("resuming after step %d/%d", step, self._num_rollout)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        logger.info("%s", console_line(step, self._num_rollout, metrics))


class _JSONLines(Sink):
    """One JSON object a step, on the file system when `log` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def resume(self, step: int) -> None:
        if not self._path.exists():
            return
        lines = self._path.read_text().splitlines(keepends=True)
        # a line without its end was cut short when the run was killed
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text("".join(kept))
        os.replace(partial, self._path)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


class _TensorBoard(Sink):
    def __init__(self, directory: Path) -> None:
        self._make = resolve("tensorboard", WRITERS, "tracking.use_tensorboard=true, writer")
        self._directory = directory
        self._first: int | None = None
        self._writer: Any = None

    def resume(self, step: int) -> None:
        self._first = step

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._writer is None:
            self._writer = self._make(log_dir=str(self._directory), purge_step=self._first)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _WandB(Sink):
    """One W&B run per run directory; W&B itself ignores steps that it has already seen."""

    def __init__(self, config: RunConfig, run: RunDir) -> None:
        self._run = resolve("wandb", WRITERS, "tracking.use_wandb=true, writer")(
            project=config.tracking.wandb_project,
            name=run.name,
            id=hashlib.sha256(str(run.path).encode()).hexdigest()[:16],  # other run roots may hold this name
            resume="allow",
            mode=config.tracking.wandb_mode,
            dir=str(run.path),
            config=asdict(config),  # a pydantic dataclass is a dataclass
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()
