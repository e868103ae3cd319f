"""Where the numbers of a run go: one line a step on the console, metrics.jsonl, TensorBoard, W&B."""

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from nanoslime.config.run import RunConfig
from nanoslime.plugins import resolve
from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import publish

logger = logging.getLogger(__name__)

WRITERS = {"tensorboard": "torch.utils.tensorboard:SummaryWriter", "wandb": "wandb:init"}


Sink = Callable[[int, dict[str, float]], object]  # takes a step and its metrics


class Tracker(ExitStack):
    """Sends each step's metrics to its sinks; with none it is silent. Leaving it closes them."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks: list[Sink] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """`metrics` of rollout `step`, named area/what_unit; steps come in rising order."""
        for sink in self.sinks:
            sink(step, metrics)


def make_tracker(config: RunConfig, run: RunDir, start: int, *, leads: bool = True) -> Tracker:
    """The sinks that `config.tracking` asks for; none for a rank that does not lead.

    The run goes on at step `start`; what was logged from there on is void. Raises ValueError where a sink was
    asked for that is not installed.
    """
    tracker, num_rollout = Tracker(), config.rollout.num_rollout
    if not leads:
        return tracker
    _forget(run, start)
    tracker.sinks += [_console(num_rollout), _json_lines(run.metrics)]
    if config.tracking.use_tensorboard:
        tracker.sinks.append(_tensorboard(run.tensorboard, start, tracker))
    if config.tracking.use_wandb:
        tracker.sinks.append(_wandb(config, run, tracker))
    return tracker


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
        parts.append("SKIPPED: gradient not finite or too large")
    phases = {name: seconds for name, seconds in metrics.items() if name.startswith("time/")}
    parts += [f"{name[len('time/') :].removesuffix('_s')} {s:.1f}s" for name, s in phases.items()]
    return "  ".join([f"step {step + 1}/{num_rollout}", *parts])


def _console(num_rollout: int) -> Sink:
    return lambda step, metrics: logger.info("%s", console_line(step, num_rollout, metrics))


def _forget(run: RunDir, start: int) -> None:
    """Takes out the lines of steps that a run from `start` makes again: from 0, also the evaluation at -1."""
    for path in filter(Path.exists, (run.metrics, run.evals)):
        # a line without its end was cut short when the run was killed
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        publish(
            path,
            "".join(line for line in lines if json.loads(line)["step"] < (start or -1)).encode(),
        )


def _json_lines(path: Path) -> Sink:
    """One JSON object a step, on the file system when the sink returns."""

    def log(step: int, metrics: dict[str, float]) -> None:
        with open(path, "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    return log


def _tensorboard(directory: Path, start: int, closed_by: ExitStack) -> Sink:
    make = resolve("tensorboard", WRITERS, "tracking.use_tensorboard=true, writer")
    writer = make(log_dir=str(directory), purge_step=start)
    closed_by.callback(writer.close)

    def log(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def _wandb(config: RunConfig, run: RunDir, closed_by: ExitStack) -> Sink:
    """One W&B run per run directory; W&B itself ignores steps that it has already seen."""
    wandb_run = resolve("wandb", WRITERS, "tracking.use_wandb=true, writer")(
        project=config.tracking.wandb_project,
        mode=config.tracking.wandb_mode,
        resume="allow",
        id=hashlib.sha256(str(run.path).encode()).hexdigest()[
            :16
        ],  # other run roots may hold this name
        name=run.name,
        dir=str(run.path),
        config=asdict(config),  # a pydantic dataclass is a dataclass
    )
    closed_by.callback(wandb_run.finish)
    return lambda step, metrics: wandb_run.log(metrics, step=step)
