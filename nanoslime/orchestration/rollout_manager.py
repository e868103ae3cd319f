"""The rollout side of a run: from prompts to groups with advantages, and evaluation."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

from nanoslime import algorithms
from nanoslime.algorithms.prepare import PreparedGroups, prepare
from nanoslime.config import RolloutConfig, RunConfig
from nanoslime.orchestration.evaluation import Evaluation
from nanoslime.rollout import recorder, rewards
from nanoslime.rollout.generate import sample_groups
from nanoslime.rollout.prompts import RunPrompts
from nanoslime.rollout.router import LeastInflightRouter
from nanoslime.rollout.tasks import GroupTask
from nanoslime.run_dir import RunDir
from nanoslime.types import (
    Engine,
    GroupReport,
    Prompt,
    RunError,
    Sample,
    SampleGroup,
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
    """Samples in the driver. Every sample must be of the current version of `weights`."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        loaded: RunPrompts,
        engines: Sequence[Engine],
        weights: Weights,
    ):
        self.config = config
        self.run = run
        self.metrics: dict[str, float] = {}
        self._weights = weights
        data = config.data
        self._tokenizer = loaded.tokenizer
        self._reward = rewards.make(data.reward)
        self._algorithm = algorithms.make(config.algorithm, config.rollout.max_new_tokens)
        self._router = LeastInflightRouter(engines)
        self._failures = SampleFailures()
        self._loaded = loaded
        self._source = loaded.stream(config.seed, data.shuffle)
        self._evaluation = Evaluation(config, run, loaded)

    def generate(self, step: int) -> list[GroupReport]:
        """Returns scored, filtered groups with advantages, sampled by the current policy.

        Sets `metrics` for the step. Warns of samples that could not be made. Raises
        RunError where no sample could be made.
        """
        start = time.monotonic()
        rollout = self.config.rollout
        batch_size = rollout.rollout_batch_size
        first_round = step * rollout.dynamic_sampling_rounds
        groups: list[SampleGroup] = []
        kept: list[SampleGroup] = []
        for number in range(first_round, first_round + rollout.dynamic_sampling_rounds):
            prompts = self._source.next(batch_size - len(kept))
            groups += self._sample(
                prompts,
                rollout,
                first_group_id=number * batch_size,
                seed=(self.config.seed, 0, number),
            )
            prepared = _prepare(groups, self._algorithm)
            kept = prepared.groups
            self.metrics = prepared.metrics
            if len(kept) == batch_size:
                break
        self._check_versions(groups)
        settings = recorder.SamplingSettings.of(rollout)
        recorder.record(recorder.Recording(self.run.rollouts, settings), step, groups)
        self._failures.report(groups, f"rollout {step}", "are left out")
        self.metrics |= self._loaded.source_metrics(local_reports(groups))
        self.metrics["time/generate_s"] = time.monotonic() - start
        return local_reports(kept)

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluates the policy on every set of prompts; returns metrics, none without a set.

        A sample that could not be made counts as reward 0, with a warning. Raises RunError
        where no sample could be made.
        """
        return self._evaluation.run(step, self._weights.version, self._sample_tasks)

    def state_dict(self) -> dict[str, Any]:
        return {"prompts": self._source.state_dict(), "held_out": self._evaluation.digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "prompts" not in state:
            raise RunError(
                "the checkpoint is of a run with rollout.load_rollouts, which has no data cursor; "
                "go on with --load-rollouts, or start a new run from its hf/ export"
            )
        self._source.load_state_dict(state["prompts"])

    def _sample(
        self,
        prompts: list[Prompt],
        rollout: RolloutConfig,
        *,
        first_group_id: int,
        seed: tuple[int, int, int],
    ) -> list[SampleGroup]:
        groups = sample_groups(
            prompts,
            self._router,
            self._tokenizer,
            rollout,
            self._reward,
            first_group_id=first_group_id,
            seed=seed,
        )
        return asyncio.run(groups)

    def _sample_tasks(self, tasks: Sequence[GroupTask]) -> list[SampleGroup]:
        groups: list[SampleGroup] = []
        for (sampling, reward), same in groupby(tasks, attrgetter("sampling", "reward")):
            own = list(same)
            found = sample_groups(
                [task.prompt for task in own],
                self._router,
                self._tokenizer,
                replace(self.config.rollout, **asdict(sampling)),
                rewards.make(reward),
                first_group_id=own[0].group_id,
                seeds=[task.seed for task in own],
            )
            groups += asyncio.run(found)
        self._failures.report(groups, "evaluation", "count as reward 0")
        return groups

    def _check_versions(self, groups: list[SampleGroup]) -> None:
        current = self._weights.version
        for group in groups:
            for sample in group.samples:
                for _, version in sample.policy_versions:
                    if version != current:
                        raise RunError(
                            f"group {group.group_id} was sampled by policy version {version}, "
                            f"the trainer is at {current}"
                        )


class Replay:
    """Recorded rollouts take the place of engines, prompts and rewards, each at its step.

    Policy versions are those of the recording, whatever the trainer's is.
    """

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
        groups = recorder.load(Path(rollout.load_rollouts), step, **drawn)
        self._failures.report(groups, f"rollout {step}", "are left out")
        prepared = _prepare(groups, self._algorithm)
        self.metrics = prepared.metrics
        self.metrics["time/generate_s"] = time.monotonic() - start
        return local_reports(prepared.groups)

    def evaluate(self, step: int) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def _prepare(groups: list[SampleGroup], algorithm: algorithms.PolicyGradient) -> PreparedGroups:
    """Prepares `groups` for training; warns where no group is left to train on."""
    prepared = prepare(groups, algorithm)
    if groups and not prepared.groups:
        logger.warning(
            "none of %d groups is left to train on, dropped for: %s", len(groups), prepared.dropped
        )
    return prepared


class SampleFailures:
    """Tells of samples that could not be made: each distinct cause once in a run."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def report(self, groups: Sequence[SampleGroup], what: str, consequence: str) -> None:
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
                f"first: prompt {first.metadata.get('prompt_id')}: {_cause(first)} "
                f"({num_alike} samples)"
            )
        news = [cause for cause in causes if cause not in self._told]
        for cause in news[:_MAX_NEWS]:
            self._told.add(cause)
            logger.warning(
                "%s: %d of %d samples could not be made and %s: %s",
                what,
                causes[cause],
                len(samples),
                consequence,
                cause,
            )


def _cause(sample: Sample) -> str:
    """Why a sample was not made."""
    return sample.error or f"it is {sample.status}"
