"""Evaluates a checkpoint on the evaluation sets of a recipe, in one process without a trainer.

    python -m nanoslime.evaluate CHECKPOINT [RECIPE.yaml] [--output FILE] [flags]

CHECKPOINT is a directory in Hugging Face's format or a hub id; or a run's directory, for the
newest that it has; or its checkpoints/step_K or hf/step_K. Without a recipe, a run's own
configuration holds. What comes out is a table on stdout and a JSON file; of a run's step it is
what the run itself found there, as far as its engine draws the same samples again.

A checkpoints/step_K is exported to the run's hf/step_K first. That loads the trainer's state
whole into this process; one that is too large for it is converted by tools/megatron_to_hf.py.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from nanoslime.config import RunConfig
from nanoslime.config.load import load, read
from nanoslime.models.local_checkpoint import with_local_checkpoint
from nanoslime.orchestration.evaluation import Evaluation, estimates
from nanoslime.orchestration.groups import LocalTrainGroup
from nanoslime.orchestration.rank_environment import interface_names
from nanoslime.orchestration.session import EngineHere, prepare_model
from nanoslime.processes.ports import free_port
from nanoslime.processes.temp import private_tmpdir
from nanoslime.rollout import rewards
from nanoslime.rollout.prompts import RunPrompts
from nanoslime.rollout.tasks import GroupTask, WorkerSetup
from nanoslime.rollout.worker import RolloutWorker
from nanoslime.run_dir import DONE, FAILED, RunDir
from nanoslime.storage.commit import checkpoints
from nanoslime.storage.datasets import with_local_prompts
from nanoslime.storage.manifest import verify
from nanoslime.storage.shared_files import publish_json
from nanoslime.training.backend import RankEnv
from nanoslime.types import GroupReport, RunError

logger = logging.getLogger(__name__)

_POLL_S = 5.0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the command line names."""

    # A directory, or a hub id.
    name: str
    run: RunDir | None = None
    # Rollouts that it was trained on, as far as that is known.
    rollouts: int = 0

    @classmethod
    def find(cls, name: str) -> "Checkpoint":
        path = Path(name).expanduser().absolute()
        runs = [above for above in (path, path.parent.parent) if (above / "attempts").is_dir()]
        if not runs:
            return cls(name)
        run = RunDir.open(runs[0])
        if path == run.path:
            known = checkpoints(run.path / "hf") + checkpoints(run.checkpoints)
            if not known:
                raise RunError(f"{path} has no checkpoint yet, neither in hf/ nor in checkpoints/")
            _, path = max(known, key=lambda found: found[0])
        rollouts = {found: number for number, found in checkpoints(path.parent)}
        return cls(str(path), run, rollouts.get(path, 0))

    def exported(self, config: RunConfig) -> str:
        """The checkpoint in Hugging Face's format; it is written where it is not there yet."""
        path = Path(self.name)
        if self.run is None or path.parent != self.run.checkpoints:
            return self.name
        destination = self.run.hf(self.rollouts)
        if not destination.is_dir():
            logger.info("exporting %s to %s", path, destination)
            verify(path)
            _export(self.run, path / "trainer", destination, config)
        return str(destination)


def _export(run: RunDir, state: Path, destination: Path, config: RunConfig) -> None:
    """Writes the trainer's state as one rank has it that is alone, on the device of `config`."""
    trained, model_dir = prepare_model(read(run.config), run)
    training = trained.training.without_megatron()
    trained = replace(trained, training=training, cluster=config.cluster)
    address = f"tcp://127.0.0.1:{free_port('127.0.0.1')}"
    env = RankEnv(0, 1, 0, config.cluster.device, address)
    group = LocalTrainGroup(trained, run, model_dir, env)
    try:
        group.setup()
        group.load(state)
        group.export_hf(destination)
    finally:
        group.close()


def evaluate(checkpoint: Checkpoint, config: RunConfig, output: Path | None) -> str:
    """Evaluates, writes `output` (by default into a new run directory) and returns a table.

    The run directory has the configuration.
    """
    os.environ.update(interface_names(os.environ, config.cluster.network_interface or "lo"))
    name = checkpoint.exported(config)
    model = replace(config.model, hf_checkpoint=name, revision="")
    config, _ = with_local_checkpoint(replace(config, model=model), download=True)
    config = with_local_prompts(config)
    model_dir = Path(config.model.hf_checkpoint)
    for one in config.eval_sets:
        rewards.check(one.data(config.data))
    prompts = RunPrompts.load(config, model_dir, for_training=False)
    root = Path(config.cluster.run_root or "runs")
    run = RunDir.create(root, f"{config.name}-evaluation", config.cluster.share)
    run.write_config(config)
    device = config.cluster.device
    gpu_ids = list(range(config.rollout.engine_tp_size)) if device == "cuda" else []
    with ExitStack() as resources:
        here = EngineHere(config, run.new_attempt(), model_dir, device, gpu_ids)
        resources.callback(here.close)
        engine = here.start()
        worker = RolloutWorker(WorkerSetup(config, model_dir, run.rollouts))
        resources.callback(worker.close)
        worker.set_engines([engine])
        evaluation = Evaluation(config, run, prompts)
        evaluation.run(checkpoint.rollouts - 1, checkpoint.rollouts, partial(_sample, worker))
    rows = evaluation.rows
    output = output or run.path / "evaluation.json"
    publish_json(output, {"checkpoint": name, "sets": rows})
    return f"{table(rows)}\nin {output}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of an evaluation for a person, a line for each estimate."""
    lines = []
    for row in rows:
        for name, value, error in estimates(row):
            lines.append(f"{row['set']:20} {name:10} {value:.4f}{error}")
        lines.append(
            f"{row['set']:20} {row['samples']} samples of {row['prompts']} prompts, "
            f"{row['truncated_ratio']:.0%} truncated, {row['error_ratio']:.0%} not made, "
            f"{row['response_tokens_mean']:.0f} tokens on average"
        )
    return "\n".join(lines)


def _sample(worker: RolloutWorker, tasks: Sequence[GroupTask]) -> list[GroupReport]:
    worker.start(tasks)
    groups: list[GroupReport] = []
    while len(groups) < len(tasks):
        news = worker.poll(_POLL_S)
        for engine, cause in news.lost.items():
            raise RunError(f"the evaluation has lost its engine {engine}: {cause}")
        groups += news.groups
    return groups


def parse(argv: list[str]) -> tuple[Checkpoint, RunConfig, Path | None]:
    parser = argparse.ArgumentParser(prog="python -m nanoslime.evaluate", allow_abbrev=False)
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "%(prog)s CHECKPOINT [RECIPE.yaml] [--output FILE] [flags of nanoslime.train]"
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--output", type=Path)
    known, flags = parser.parse_known_args(argv)
    checkpoint = Checkpoint.find(known.checkpoint)
    recipe = None
    if flags and not flags[0].startswith("-"):
        recipe = Path(flags.pop(0))
    is_of_run = recipe is None and checkpoint.run is not None
    if is_of_run:
        recipe = checkpoint.run.config
    config = load(recipe, None, flags, resumes=is_of_run)
    if is_of_run:  # a rehearsal has its data in the run's directory
        config, _ = prepare_model(config, checkpoint.run)
    config = replace(
        config,
        rehearsal=replace(config.rehearsal, enabled=False),
        cluster=replace(config.cluster, colocate=False),
        rollout=replace(config.rollout, load_rollouts="", rollout_only=False),
    )
    if not config.eval_sets:
        raise RunError(
            "there is nothing to evaluate on: give --eval-prompts FILE, or eval.sets in the recipe"
        )
    return checkpoint, config, known.output


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    disable_progress_bar()
    try:
        with private_tmpdir():
            shown = evaluate(*parse(argv))
    except (RunError, ValueError, OSError) as e:
        logger.error("%s", e)
        return FAILED
    sys.stdout.write(f"{shown}\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
