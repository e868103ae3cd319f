"""Where the numbers of a run go: one line a step on the console, metrics.jsonl,
TensorBoard, W&B.
"""

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
from nanoslime.storage.shared_files import finite_json, publish

logger = logging.getLogger(__name__)

# What takes turns in a step, as far as a line has room for it.
_PHASES = ("generate", "fetch", "logprobs", "train", "sleep", "weight_sync", "wake", "step")
_SHORT_S = 0.05

WRITERS = {"tensorboard": "torch.utils.tensorboard:SummaryWriter", "wandb": "wandb:init"}
WANDB_ID_CHARS = 16

Sink = Callable[[int, dict[str, float]], object]  # takes a step and its metrics


class Tracker(ExitStack):
    """Sends the metrics of each step to its sinks; without a sink it is silent. Leaving it
    closes them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sinks: list[Sink] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of `step`. Names are area/what_unit; steps come in rising order."""
        for sink in self.sinks:
            sink(step, metrics)


def make_tracker(config: RunConfig, run: RunDir, start: int) -> Tracker:
    """Opens the sinks that `config.tracking` asks for.

    The run goes on at step `start`: lines that an earlier attempt logged from there on are
    removed. Raises ValueError where a sink is asked for and its package is not installed.
    """
    tracker = Tracker()
    num_rollout = config.rollout.num_rollout
    if start:
        logger.info("resuming after step %d/%d", start, num_rollout)
    _forget_from(start, run)
    tracker.sinks.append(lambda step, m: logger.info("%s", console_line(step, num_rollout, m)))
    tracker.sinks.append(_json_lines(run.metrics))
    if config.tracking.use_tensorboard:
        tracker.sinks.append(_tensorboard(run.tensorboard, start, closed_by=tracker))
    if config.tracking.use_wandb:
        tracker.sinks.append(_wandb(config, run, closed_by=tracker))
    return tracker


def console_line(step: int, num_rollout: int, metrics: dict[str, float]) -> str:
    """One line for a person: rewards, KL, the gap between engine and trainer, seconds a phase.

    A phase that would be shown as 0.0 s is left out.
    """
    kl_name = "train/ref_kl" if "train/ref_kl" in metrics else "train/ppo_kl_abs"
    columns = [
        ("reward", "rollout/reward_mean", ".3f"),
        ("eval", "eval/reward_mean", ".3f"),
        (kl_name.removeprefix("train/"), kl_name, ".1e"),
        ("gap", "train/logprob_gap_mean", ".1e"),
        ("gap_max", "train/logprob_gap_max", ".1e"),
    ]
    words = [f"step {step + 1}/{num_rollout}"]
    for label, name, number_format in columns:
        if name in metrics:
            words.append(f"{label} {metrics[name]:{number_format}}")
    if metrics.get("train/skipped"):
        words.append("SKIPPED: gradient not finite or too large")
    for phase in _PHASES:
        seconds = metrics.get(f"time/{phase}_s", 0.0)
        if seconds >= _SHORT_S:
            words.append(f"{phase} {seconds:.1f}s")
    return "  ".join(words)


def _forget_from(start: int, run: RunDir) -> None:
    """Removes the logged lines of all steps that a run from `start` on makes again.

    A run from step 0 makes the evaluation before training again too, which is logged as
    step -1.
    """
    first_forgotten = start if start > 0 else -1
    for path in (run.metrics, run.evals):
        if not path.exists():
            continue
        kept = []
        for line in path.read_text().splitlines(keepends=True):
            was_cut_short = not line.endswith("\n")  # the run was killed while it wrote
            if not was_cut_short and json.loads(line)["step"] < first_forgotten:
                kept.append(line)
        publish(path, "".join(kept).encode())


def _json_lines(path: Path) -> Sink:
    """Appends one JSON object a step, which is on the file system when the sink returns."""

    def log(step: int, metrics: dict[str, float]) -> None:
        with open(path, "a") as file:
            file.write(finite_json({"step": step, **metrics}) + "\n")

    return log


def _tensorboard(directory: Path, start: int, closed_by: ExitStack) -> Sink:
    make_writer = resolve("tensorboard", WRITERS, "tracking.use_tensorboard=true, writer")
    writer = make_writer(log_dir=str(directory), purge_step=start)
    closed_by.callback(writer.close)

    def log(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            # A tag has no @, which mean@k and pass@k have.
            writer.add_scalar(name.replace("@", "_at_"), value, step)
        writer.flush()

    return log


def _wandb(config: RunConfig, run: RunDir, closed_by: ExitStack) -> Sink:
    """Opens one W&B run per run directory. W&B itself ignores steps that it has already seen."""
    init = resolve("wandb", WRITERS, "tracking.use_wandb=true, writer")
    # The name alone would not do as an id: another run root may hold a run of this name.
    path_hash = hashlib.sha256(str(run.path).encode()).hexdigest()
    wandb_run = init(
        project=config.tracking.wandb_project,
        mode=config.tracking.wandb_mode,
        resume="allow",
        id=path_hash[:WANDB_ID_CHARS],
        name=run.name,
        dir=str(run.path),
        config=asdict(config),
    )
    closed_by.callback(wandb_run.finish)
    return lambda step, metrics: wandb_run.log(metrics, step=step)
