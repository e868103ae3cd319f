"""The rollout side of a run: prompts, engines behind a router, rewards, filters, advantages, evaluation."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from nanoslime import algorithms
from nanoslime.algorithms.prepare import PreparedGroups, prepare
from nanoslime.config import RolloutConfig, RunConfig
from nanoslime.plugins import resolve
from nanoslime.rollout import recorder
from nanoslime.rollout.generate import sample_groups
from nanoslime.rollout.prompts import PromptSource, load_prompts
from nanoslime.rollout.rewards import REWARDS
from nanoslime.rollout.router import LeastInflightRouter
from nanoslime.run_dir import RunDir
from nanoslime.types import Engine, Prompt, RunError, SampleGroup

logger = logging.getLogger(__name__)


class RolloutManager:
    """Lives in the driver. `version` is what every engine holds: the number of rollouts trained on."""

    def __init__(self, config: RunConfig, run: RunDir, model_dir: Path, engines: Sequence[Engine]):
        self.config, self.run, self.engines = config, run, list(engines)
        trust = config.model.trust_remote_code
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust)
        self._reward = resolve(config.data.reward, REWARDS, "data.reward")
        self._algorithm = algorithms.make(config.algorithm, config.rollout.max_new_tokens)
        self._router = LeastInflightRouter(self.engines)
        data = config.data
        prompts = load_prompts(Path(data.prompts), self._tokenizer, data)
        self._source = PromptSource(prompts, seed=config.seed, shuffle=data.shuffle)
        held_out = (
            load_prompts(Path(data.eval_prompts), self._tokenizer, data)
            if data.eval_prompts
            else []
        )
        self._held_out = held_out[: config.eval.max_prompts or None]
        self._threads = ThreadPoolExecutor(
            max_workers=len(self.engines), thread_name_prefix="engine"
        )
        self.version = -1
        self.metrics: dict[str, float] = {}

    def generate(self, step: int) -> list[SampleGroup]:
        """Scored, filtered groups with advantages, from the current policy. Sets `metrics` for the step."""
        rollout = self.config.rollout
        start = time.monotonic()
        size, rounds = rollout.rollout_batch_size, rollout.dynamic_sampling_rounds
        groups, kept = list[SampleGroup](), list[SampleGroup]()
        for number in range(step * rounds, (step + 1) * rounds):
            prompts = self._source.next(size - len(kept))
            seed = (self.config.seed, 0, number)
            groups += self._sample(prompts, rollout, first_group_id=number * size, seed=seed)
            prepared = _prepare(groups, self._algorithm)
            kept = prepared.groups
            self.metrics = prepared.metrics
            if len(kept) == size:
                break
        self._check_versions(groups)
        settings = recorder.SamplingSettings.of(rollout)
        recorder.record(self.run.rollouts, step, groups, settings)
        self.metrics["time/generate_s"] = time.monotonic() - start
        return kept

    def evaluate(self, step: int) -> float | None:
        """Mean reward on the held-out prompts, appended to evals.jsonl; None where there are none.

        A sample that could not be made counts as reward 0, with a warning. RunError where none could.
        """
        if not self._held_out:
            return None
        knobs = self.config.eval
        own = {"n_samples_per_prompt": knobs.n_samples_per_prompt, "temperature": knobs.temperature}
        sampling = replace(self.config.rollout, **own, top_p=1.0, top_k=-1)
        groups = self._sample(
            self._held_out, sampling, first_group_id=0, seed=(knobs.seed, 1, step)
        )
        samples = [s for g in groups for s in g.samples]
        if errors := [s for s in samples if s.reward is None]:
            failed = f"evaluation: {len(errors)} of {len(samples)} samples could not be made"
            cause = f"first: prompt {errors[0].metadata['prompt_id']}: {errors[0].error}"
            if len(errors) == len(samples):
                raise RunError(f"{failed}; {cause}")
            logger.warning("%s and count as reward 0; %s", failed, cause)
        reward = sum(s.reward or 0.0 for s in samples) / len(samples)
        record = {"step": step, "version": self.version, "reward": reward, "samples": len(samples)}
        with self.run.evals.open("a") as f:
            f.write(json.dumps(record) + "\n")
        logger.info(
            "evaluation after %d rollouts: reward %.4f, %d samples", step + 1, reward, len(samples)
        )
        return reward

    def update_weights(self, send: Callable[[], object], version: int) -> None:
        """Pauses the engines, runs `send`, flushes their caches, resumes, and checks each one's version."""
        self.each("pause")
        send()
        self.each("flush")
        self.each("resume")
        for engine, reported in zip(self.engines, self.each("policy_version"), strict=True):
            if reported != version:
                reports = f"engine {engine.name} reports policy version {reported}"
                raise RunError(f"{reports} after the sync of {version}")
        self.version = version

    def each(self, method: str, *args: Any) -> list[Any]:
        """A method of every engine, side by side; the results in order."""
        calls = [self._threads.submit(getattr(e, method), *args) for e in self.engines]
        return [call.result() for call in calls]

    def state_dict(self) -> dict[str, Any]:
        return {"prompts": self._source.state_dict(), "version": self.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "prompts" not in state:
            what = "the checkpoint is of a run with rollout.load_rollouts, which has no data cursor"
            raise RunError(
                f"{what}; go on with --load-rollouts, or start a new run from its hf/ export"
            )
        self._source.load_state_dict(state["prompts"])

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _sample(
        self, prompts: list[Prompt], rollout: RolloutConfig, **options: Any
    ) -> list[SampleGroup]:
        groups = sample_groups(
            prompts, self._router, self._tokenizer, rollout, self._reward, **options
        )
        return asyncio.run(groups)

    def _check_versions(self, groups: list[SampleGroup]) -> None:
        spans = (
            (s, version) for g in groups for s in g.samples for _, version in s.policy_versions
        )
        for sample, version in spans:
            if version != self.version:
                sampled = f"group {sample.group_id} was sampled by policy version {version}"
                raise RunError(f"{sampled}, the trainer is at {self.version}")


class Replay:
    """Recorded rollouts in place of engines, prompts and rewards: rollout k of the run is the recorded one.

    Policy versions are those of the recording, whatever the trainer's is.
    """

    def __init__(self, config: RunConfig):
        self.config, self.metrics, self.version = config, dict[str, float](), -1
        self._algorithm = algorithms.make(config.algorithm, config.rollout.max_new_tokens)
        if config.data.eval_prompts:
            logger.warning("rollout.load_rollouts: there is no engine, so evaluations are skipped")

    def generate(self, step: int) -> list[SampleGroup]:
        start = time.monotonic()
        algorithm, rollout = self.config.algorithm, self.config.rollout
        drawn = {"temperature": rollout.temperature}
        if algorithm.denominator == "fixed" or algorithm.overlong_buffer:
            drawn["max_new_tokens"] = rollout.max_new_tokens
        groups = recorder.load(Path(rollout.load_rollouts), step, **drawn)
        prepared = _prepare(groups, self._algorithm)
        self.metrics = prepared.metrics
        self.metrics["time/generate_s"] = time.monotonic() - start
        return prepared.groups

    def evaluate(self, step: int) -> None: ...

    def update_weights(self, send: Callable[[], object], version: int) -> None:
        self.version = version

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def _prepare(groups: list[SampleGroup], algorithm: algorithms.PolicyGradient) -> PreparedGroups:
    """Filters `groups` and computes advantages and metrics; warns where no group is left to train on."""
    prepared = prepare(groups, algorithm)
    if groups and not prepared.groups:
        logger.warning(
            "none of %d groups is left to train on, dropped for: %s", len(groups), prepared.dropped
        )
    return prepared
