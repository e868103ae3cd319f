"""Where the numbers of a run go: one line a step on the console, metrics.jsonl,
TensorBoard, W&B.

TensorBoard and W&B are written in threads of their own: one that hangs costs its own numbers,
never a step.
"""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from queue import Full, Queue

from nanoslime.config.run import RunConfig
from nanoslime.plugins import resolve
from nanoslime.run_dir import STEP_PHASES, RunDir
from nanoslime.storage.shared_files import json_line, publish

logger = logging.getLogger(__name__)

_SHORT_S = 0.05
# Steps that may wait for a writer, and how long its start and its end may keep a run waiting.
_MAX_WAITING = 1000
_OPEN_DEADLINE_S = 60.0
_CLOSE_DEADLINE_S = 30.0

WRITERS = {"tensorboard": "torch.utils.tensorboard:SummaryWriter", "wandb": "wandb:init"}
WANDB_ID_CHARS = 16

Sink = Callable[[int, dict[str, float]], object]  # takes a step and its metrics
# Makes a sink, and what closes it.
OpenSink = Callable[[], tuple[Sink, Callable[[], object]]]


class Tracker(ExitStack):
    """Sends the metrics of each step to its sinks; without a sink it is silent. Leaving it
    closes them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sinks: list[Sink] = []
        self.writers: list[Writer] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of `step`. Names are area/what_unit; steps come in rising order."""
        num_dropped = sum(writer.num_dropped for writer in self.writers)
        if num_dropped:
            metrics = metrics | {"tracking/dropped": float(num_dropped)}
        for sink in (*self.sinks, *self.writers):
            sink(step, metrics)

    def write_aside(self, name: str, open_sink: OpenSink) -> None:
        """Gives a sink a thread of its own, in which it is opened, used and closed."""
        writer = Writer(name, open_sink)
        self.writers.append(writer)
        self.callback(writer.close)


class Writer:
    """A sink in a thread of its own. Steps that it does not take are dropped and counted.

    Raises what opening it raises within a minute; one that takes longer is not waited for.
    """

    def __init__(self, name: str, open_sink: OpenSink) -> None:
        self.num_dropped = 0
        self._name = name
        self._open_sink = open_sink
        self._waiting: Queue[tuple[int, dict[str, float]] | None] = Queue(_MAX_WAITING)
        self._opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        try:
            self._opened.result(_OPEN_DEADLINE_S)
        except TimeoutError:
            logger.warning("%s is not ready after %g s: training begins", name, _OPEN_DEADLINE_S)

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        try:
            self._waiting.put_nowait((step, metrics))
        except Full:
            self._drop(step, "it has not taken the steps before")

    def close(self) -> None:
        """Waits for what it still has to write, but not for ever."""
        deadline = time.monotonic() + _CLOSE_DEADLINE_S
        with suppress(Full):
            self._waiting.put(None, timeout=_CLOSE_DEADLINE_S)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning(
                "%s has not ended within %g s: what it has not written is lost",
                self._name,
                _CLOSE_DEADLINE_S,
            )

    def _run(self) -> None:
        try:
            sink, close = self._open_sink()
        except Exception as error:
            self._opened.set_exception(error)
            return
        self._opened.set_result(None)
        while (given := self._waiting.get()) is not None:
            try:
                sink(*given)
            except Exception as error:
                self._drop(given[0], str(error))
        close()

    def _drop(self, step: int, reason: str) -> None:
        if not self.num_dropped:
            logger.warning("%s has lost step %d, the first: %s", self._name, step, reason)
        self.num_dropped += 1


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
        tracker.write_aside("TensorBoard", _tensorboard(run.tensorboard, start))
    if config.tracking.use_wandb:
        tracker.write_aside("W&B", _wandb(config, run))
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
    for phase in (*STEP_PHASES, "step"):
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
        with open(path, "ab") as file:
            file.write(json_line({"step": step, **metrics}))

    return log


def _tensorboard(directory: Path, start: int) -> OpenSink:
    make_writer = resolve("tensorboard", WRITERS, "tracking.use_tensorboard=true, writer")

    def open_sink() -> tuple[Sink, Callable[[], object]]:
        writer = make_writer(log_dir=str(directory), purge_step=start)

        def log(step: int, metrics: dict[str, float]) -> None:
            for name, value in metrics.items():
                # A tag has no @, which mean@k and pass@k have.
                writer.add_scalar(name.replace("@", "_at_"), value, step)
            writer.flush()

        return log, writer.close

    return open_sink


def _wandb(config: RunConfig, run: RunDir) -> OpenSink:
    """One W&B run for all attempts of a run. W&B itself ignores steps that it has already seen.

    Offline (the default) each attempt leaves a folder, which `jobs/runs.py sync` uploads.
    """
    init = resolve("wandb", WRITERS, "tracking.use_wandb=true, writer")
    # The name alone would not do as an id: another run root may hold a run of this name.
    path_hash = hashlib.sha256(str(run.path).encode()).hexdigest()

    def open_sink() -> tuple[Sink, Callable[[], object]]:
        wandb_run = init(
            project=config.tracking.wandb_project,
            mode=config.tracking.wandb_mode,
            resume="allow",
            id=path_hash[:WANDB_ID_CHARS],
            name=run.name,
            dir=str(run.path),
            config=asdict(config),
        )
        return lambda step, metrics: wandb_run.log(metrics, step=step), wandb_run.finish

    return open_sink
