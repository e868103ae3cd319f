"""Where the numbers of a run go: one line a step on the console, metrics.jsonl, TensorBoard, W&B."""

import hashlib
import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

from nanoslime.config.run import RunConfig
from nanoslime.plugins import resolve
from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import publish

logger = logging.getLogger(__name__)

WRITERS = {"tensorboard": "torch.utils.tensorboard:SummaryWriter", "wandb": "wandb:init"}


class Sink:
    """Where numbers go. What a sink leaves out does nothing."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class Tracker(AbstractContextManager["Tracker"]):
    """Sends each step's metrics to its sinks; with none it is silent. Leaving it closes them."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """`metrics` of rollout `step`, named area/what_unit; steps come in rising order."""
        for sink in self._sinks:
            sink.log(step, metrics)

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.close()


def make_tracker(config: RunConfig, run: RunDir, start: int, *, leads: bool = True) -> Tracker:
    """The sinks that `config.tracking` asks for; none for a rank that does not lead.

    The run goes on at step `start`; what was logged from there on is void. Raises ValueError where a sink was
    asked for that is not installed.
    """
    if not leads:
        return Tracker([])
    if start:
        logger.info("resuming after step %d/%d", start, config.rollout.num_rollout)
    sinks: list[Sink] = [_Console(config.rollout.num_rollout), _JSONLines(run.metrics, start)]
    if config.tracking.use_tensorboard:
        sinks.append(_TensorBoard(run.tensorboard, start))
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
        parts.append("SKIPPED: gradient not finite or too large")
    phases = {name: seconds for name, seconds in metrics.items() if name.startswith("time/")}
    parts += [f"{name[len('time/') :].removesuffix('_s')} {s:.1f}s" for name, s in phases.items()]
    return "  ".join([f"step {step + 1}/{num_rollout}", *parts])


class _Console(Sink):
    def __init__(self, num_rollout: int) -> None:
        self._num_rollout = num_rollout

    def log(self, step: int, metrics: dict[str, float]) -> None:
        logger.info("%s", console_line(step, self._num_rollout, metrics))


class _JSONLines(Sink):
    """One JSON object a step, on the file system when `log` returns."""

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        if path.exists():
            # a line without its end was cut short when the run was killed
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            publish(path, "".join(line for line in lines if json.loads(line)["step"] < start).encode())

    def log(self, step: int, metrics: dict[str, float]) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


class _TensorBoard(Sink):
    def __init__(self, directory: Path, start: int) -> None:
        make = resolve("tensorboard", WRITERS, "tracking.use_tensorboard=true, writer")
        self._writer = make(log_dir=str(directory), purge_step=start)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
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
