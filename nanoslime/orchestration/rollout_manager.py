"""The rollout side of a run: from prompts to groups with advantages, and evaluation."""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nanoslime import algorithms
from nanoslime.algorithms.filters import filter_groups
from nanoslime.algorithms.prepare import PreparedGroups, prepare
from nanoslime.config import RunConfig
from nanoslime.engine_kind import engine_kind
from nanoslime.orchestration.evaluation import Evaluation
from nanoslime.rollout import recorder
from nanoslime.rollout.admission import Limits
from nanoslime.rollout.producer import Producer, Recipe, Serving, StopAsked
from nanoslime.rollout.prompts import RunPrompts
from nanoslime.rollout.tasks import GroupTask, Sampling, Worker, seed_of
from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import read_json_lines
from nanoslime.types import (
    Engine,
    GroupReport,
    Prompt,
    RunError,
    SampleReport,
    Status,
    local_reports,
)

logger = logging.getLogger(__name__)

_NOT_MADE = (Status.ERROR, Status.ABORTED)
# So many distinct causes of one rollout are told at most.
_MAX_NEWS = 5


class Weights(Protocol):
    """The weights that every engine has; the SyncSession of a run."""

    version: int  # the number of rollouts they were trained on; -1 before the first sync


class RolloutManager:
    """Takes rollouts from a Producer, gives them advantages, and evaluates.

    No sample is older than rollout.max_staleness versions of `weights`.
    """

    def __init__(
        self, config: RunConfig, run: RunDir, loaded: RunPrompts, weights: Weights, serving: Serving
    ):
        self.config = config
        self.run = run
        self.metrics: dict[str, float] = {}
        self._weights = weights
        self._algorithm = algorithms.make(config.algorithm, config.rollout.max_new_tokens)
        self._failures = SampleFailures()
        self._loaded = loaded
        self._sampling = Sampling.of(config.rollout)
        self._source = loaded.stream(config.seed, config.data.shuffle)
        self._evaluation = Evaluation(config, run, loaded)
        self._stopped = False
        rollout = config.rollout
        limits = Limits(
            batch=rollout.rollout_batch_size,
            max_staleness=rollout.max_staleness,
            num_rollouts=rollout.num_rollout,
            max_replaced=(rollout.dynamic_sampling_rounds - 1) * rollout.rollout_batch_size,
            overdue=rollout.overdue,
        )
        recipe = Recipe(
            make_task=self._task,
            is_kept=self._is_kept,
            has_versions=not rollout.rollout_only,
            restarts=rollout.max_staleness == 0 and engine_kind(rollout).honours_seeds,
        )
        self._producer = Producer(limits, recipe, self._source, serving)

    def set_version(self, version: int) -> None:
        """The engines have the weights after `version` rollouts.

        With max_staleness they sample further prompts from now on, not only when `generate`
        waits for them.
        """
        if self.config.rollout.max_staleness:
            self._producer.set_version(version)

    def generate(self, step: int) -> list[GroupReport]:
        """Returns scored, filtered groups with advantages, which training takes next.

        Sets `metrics` for the step. Warns of samples that could not be made. Raises
        RunError where no sample could be made, and StopAsked.
        """
        start = time.monotonic()
        try:
            rollout = self._producer.take(step)
        except StopAsked:
            self._stopped = True
            raise
        waited_s = time.monotonic() - start
        groups = rollout.groups
        prepared = _prepare(groups, self._algorithm)
        self._check_versions(prepared.groups)
        self._producer.finish(step, groups)
        self._failures.report(groups, f"rollout {step}", "are left out")
        self.metrics = prepared.metrics | self._producer.metrics()
        self.metrics |= _age_metrics(prepared.groups, self._weights.version)
        self.metrics |= self._loaded.source_metrics(groups)
        for reason, number in rollout.taken.counts.items():
            self.metrics[f"rollout/{reason}"] = float(number)
        self.metrics["time/generate_s"] = waited_s
        return prepared.groups

    def evaluate(self, step: int) -> dict[str, float] | None:
        """Evaluates the policy on every set of prompts; returns metrics, none without a set.

        A sample that could not be made counts as reward 0, with a warning. Returns None
        where the run is told to stop meanwhile. Raises RunError where no sample could be
        made.
        """
        try:
            return self._evaluation.run(step, self._weights.version, self._evaluate)
        except StopAsked as reason:
            logger.warning("the evaluation after %d rollouts is left out: %s", step + 1, reason)
            return None

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation after rollout `step` is on record."""
        return any(row["step"] == step for row in read_json_lines(self.run.evals))

    def save(self, directory: Path) -> dict[str, Any]:
        """Writes groups that are being sampled into `directory`, which is made where there
        are any; returns what else `load` needs. A run that stops ends them then."""
        state = self._producer.save(directory) | {"held_out": self.held_out}
        if self._stopped:
            self._producer.halt()
        return state

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """Goes on where `save` was called."""
        if "producer" not in state:
            raise RunError(
                "the checkpoint is of a run with rollout.load_rollouts, which has no data cursor; "
                "go on with --load-rollouts, or start a new run from its hf/ export"
            )
        self._source.load_state_dict(state["prompts"])
        self._producer.load(directory, state["producer"])

    @property
    def held_out(self) -> str:
        """A hash of the prompts whose reward chooses the best checkpoint."""
        return self._evaluation.digest()

    def close(self) -> None:
        self._producer.close()

    def _task(self, prompt: Prompt, group_id: int) -> GroupTask:
        return GroupTask(
            group_id=group_id,
            prompt=prompt,
            sampling=self._sampling,
            seed=seed_of(self.config.seed, 0, group_id),
            reward=prompt.reward or self.config.data.reward,
        )

    def _is_kept(self, group: GroupReport) -> bool:
        kept, _ = filter_groups([group], drop_zero_std=self.config.algorithm.filter_zero_std)
        return bool(kept)

    def _evaluate(self, tasks: Sequence[GroupTask]) -> list[GroupReport]:
        groups = self._producer.evaluate(tasks)
        self._failures.report(groups, "evaluation", "count as reward 0")
        return groups

    def _check_versions(self, groups: Sequence[GroupReport]) -> None:
        """Raises RunError for a token to train on that is beyond the bound, or of newer weights,
        and for one of older weights than a token before it.
        """
        current = self._weights.version
        bound = current - self.config.rollout.max_staleness
        for group in groups:
            for sample in group.samples:
                versions = [version for _, version in sample.policy_versions]
                if versions != sorted(versions):
                    raise RunError(
                        f"group {group.group_id} has a sample whose tokens are of policy versions "
                        f"{versions}, one after the other: an engine calls its weights otherwise "
                        f"than they are"
                    )
                for version in versions:
                    if not bound <= version <= current:
                        raise RunError(
                            f"group {group.group_id} was sampled by policy version {version}, "
                            f"the trainer is at {current}"
                        )


class Replay:
    """Recorded rollouts take the place of engines, prompts and rewards, each at its step.

    Policy versions are those of the recording, whatever the trainer's is.
    """

    held_out: str | None = None

    def __init__(self, config: RunConfig):
        self.config = config
        self.metrics: dict[str, float] = {}
        self._algorithm = algorithms.make(config.algorithm, config.rollout.max_new_tokens)
        self._failures = SampleFailures()
        if config.eval_sets:
            logger.warning("rollout.load_rollouts: there is no engine, so evaluations are skipped")

    def generate(self, step: int) -> list[GroupReport]:
        start = time.monotonic()
        algorithm = self.config.algorithm
        rollout = self.config.rollout
        # The recording has to agree in what the loss or the reward depends on.
        drawn: dict[str, Any] = {"temperature": rollout.temperature}
        if algorithm.denominator == "fixed" or algorithm.overlong_buffer:
            drawn["max_new_tokens"] = rollout.max_new_tokens
        groups = local_reports(recorder.load(Path(rollout.load_rollouts), step, **drawn))
        self._failures.report(groups, f"rollout {step}", "are left out")
        prepared = _prepare(groups, self._algorithm)
        self.metrics = prepared.metrics | _age_metrics(prepared.groups, step)
        self.metrics["time/generate_s"] = time.monotonic() - start
        return prepared.groups

    def set_version(self, version: int) -> None: ...

    def evaluate(self, step: int) -> dict[str, float]:
        return {}

    def is_evaluated(self, step: int) -> bool:
        return True

    def save(self, directory: Path) -> dict[str, Any]:
        return {}

    def load(self, directory: Path, state: dict[str, Any]) -> None: ...


def _prepare(
    groups: list[GroupReport], algorithm: algorithms.PolicyGradient
) -> PreparedGroups[SampleReport]:
    """Prepares `groups` for training; warns where no group is left to train on."""
    prepared = prepare(groups, algorithm)
    if groups and not prepared.groups:
        logger.warning(
            "none of %d groups is left to train on, dropped for: %s", len(groups), prepared.dropped
        )
    return prepared


def _age_metrics(groups: Sequence[GroupReport], version: int) -> dict[str, float]:
    """By how many versions the tokens in the loss are behind `version`, which they train."""
    tokens: Counter[int] = Counter()
    for group in groups:
        for sample in group.samples:
            tokens.update(sample.loss_tokens_by_version)
    total = sum((version - of_token) * number for of_token, number in tokens.items())
    return {
        "rollout/staleness_mean": total / max(tokens.total(), 1),
        "rollout/staleness_max": float(version - min(tokens, default=version)),
    }


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which rollout worker sends its requests to which engines."""

    workers: Sequence[Worker]
    # The worker beside an engine, by the engine's name. An engine beside none serves all.
    home: Mapping[str, int]

    def set_engines(self, engines: Sequence[Engine]) -> None:
        """These engines serve from now on: each the worker beside it. A worker that has none
        left shares those of the others.
        """
        for number, worker in enumerate(self.workers):
            own = [engine for engine in engines if self.home.get(engine.name, number) == number]
            worker.set_engines(own or engines)

    def drain(self) -> None:
        """No worker sends anything until the next `set_engines`."""
        for worker in self.workers:
            worker.drain()


class SampleFailures:
    """Tells of samples that could not be made: each distinct cause once in a run."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def report(self, groups: Sequence[GroupReport], what: str, consequence: str) -> None:
        """Warns of the samples of `what` that no engine could make.

        Raises RunError with the engine's words where no sample is left: what a pause or
        the engine ended early is none either.
        """
        samples = [sample for group in groups for sample in group.samples]
        causes = Counter(_cause(sample) for sample in samples if sample.status is Status.ERROR)
        if samples and all(sample.status in _NOT_MADE for sample in samples):
            first = samples[0]
            num_alike = sum(_cause(sample) == _cause(first) for sample in samples)
            raise RunError(
                f"{what}: {len(samples)} of {len(samples)} samples could not be made; "
                f"first: prompt {first.prompt_id}: {_cause(first)} "
                f"({num_alike} samples)"
            )
        news = [cause for cause in causes if cause not in self._told]
        for cause in news[:_MAX_NEWS]:
            self._told.add(cause)
            number = f"{causes[cause]} of {len(samples)} samples"
            logger.warning("%s: %s could not be made and %s: %s", what, number, consequence, cause)


def _cause(sample: SampleReport) -> str:
    """Why a sample was not made."""
    return sample.error or f"it is {sample.status}"
