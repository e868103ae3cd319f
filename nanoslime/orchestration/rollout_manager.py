"""The rollout side of a run: prompts, engines behind a router, rewards, filters, advantages, evaluation,
policy versions.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanoslime import algorithms
from nanoslime.algorithms.filters import filter_groups
from nanoslime.config import RunConfig
from nanoslime.plugins import resolve
from nanoslime.process_groups import free_port
from nanoslime.rollout import recorder
from nanoslime.rollout.generate import group_metrics, sample_groups
from nanoslime.rollout.prompts import PromptSource, load_prompts
from nanoslime.rollout.rewards import REWARDS
from nanoslime.rollout.router import make_router
from nanoslime.run_dir import RunDir
from nanoslime.types import Engine, RunError, SampleGroup

logger = logging.getLogger(__name__)


class RolloutManager:
    """Lives in the driver. `version` is the policy version that every engine holds: the number of rollouts
    trained on.
    """

    def __init__(
        self, config: RunConfig, run: RunDir, model_dir: Path, tokenizer: Any, engines: Sequence[Engine]
    ):
        self.config, self.run, self.engines, self._tokenizer = config, run, list(engines), tokenizer
        self._model_dir = model_dir
        self._reward = resolve(config.data.reward, REWARDS, "data.reward")
        self._algorithm = algorithms.make(config.algorithm)
        self._router = make_router(
            config.rollout.router,
            self.engines,
            ports=(free_port("127.0.0.1"), free_port("127.0.0.1")),
            log=run.path / "attempts" / "latest" / "logs" / "router-0.log",
        )
        prompts = load_prompts(Path(config.data.prompts), tokenizer, config.data)
        self._source = PromptSource(prompts, seed=config.seed, shuffle=config.data.shuffle)
        held_out = (
            load_prompts(Path(config.data.eval_prompts), tokenizer, config.data)
            if config.data.eval_prompts
            else []
        )
        self._held_out = held_out[: config.eval.max_prompts or None]
        self._threads = ThreadPoolExecutor(max_workers=len(self.engines), thread_name_prefix="engine")
        self.version = -1
        self.metrics: dict[str, float] = {}

    def generate(self, step: int) -> list[SampleGroup]:
        """Scored, filtered groups with advantages, from the current policy. Sets `metrics` for the step."""
        rollout = self.config.rollout
        start = time.monotonic()
        prompts = self._source.next(rollout.rollout_batch_size)
        groups = self._sample(
            prompts,
            rollout,
            first_group_id=step * rollout.rollout_batch_size,
            seed=(self.config.seed, 0, step),
        )
        self._check_versions(groups)
        kept, dropped = filter_groups(groups, drop_zero_std=self.config.algorithm.filter_zero_std)
        self._algorithm.advantages(kept)
        recorder.record(self.run.rollouts / f"step_{step}.jsonl", groups)
        self.metrics = group_metrics(groups) | {
            f"rollout/dropped_{reason}": float(n) for reason, n in dropped.items()
        }
        self.metrics["time/generate_s"] = time.monotonic() - start
        return kept

    def evaluate(self, step: int) -> float | None:
        """Mean reward on the held-out prompts, appended to evals.jsonl; None where there are none."""
        if not self._held_out:
            return None
        knobs = self.config.eval
        sampling = replace(
            self.config.rollout,
            n_samples_per_prompt=knobs.n_samples_per_prompt,
            temperature=knobs.temperature,
            top_p=1.0,
            top_k=-1,
        )
        groups = self._sample(self._held_out, sampling, first_group_id=0, seed=(knobs.seed, 1, step))
        rewards = [r for g in groups for r in g.rewards]
        reward = sum(rewards) / len(rewards)
        record = {"step": step, "version": self.version, "reward": reward, "samples": len(rewards)}
        with self.run.evals.open("a") as f:
            f.write(json.dumps(record) + "\n")
        logger.info(
            "evaluation after %d rollouts: reward %.4f over %d samples", step + 1, reward, len(rewards)
        )
        return reward

    def update_weights(self, send: Callable[[], object], version: int) -> None:
        """Pauses the engines, runs `send`, flushes their caches, resumes, and checks the version that each
        one reports.
        """
        self._each(lambda e: e.pause())
        send()
        self._each(lambda e: e.flush())
        self._each(lambda e: e.resume())
        for engine, reported in zip(self.engines, self._each(lambda e: e.policy_version()), strict=True):
            if reported != version:
                raise RunError(
                    f"engine {engine.name} reports policy version {reported} after the sync of {version}"
                )
        self.version = version

    def load_from_disk(self, path: Path, version: int) -> None:
        self._each(lambda e: e.update_weights_from_disk(str(path), version))

    def state_dict(self) -> dict[str, Any]:
        return {"prompts": self._source.state_dict(), "version": self.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._source.load_state_dict(state["prompts"])

    def close(self) -> None:
        self._router.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _sample(
        self, prompts: list, rollout: Any, *, first_group_id: int, seed: tuple[int, ...]
    ) -> list[SampleGroup]:
        return asyncio.run(
            sample_groups(
                prompts,
                self._router,
                self._tokenizer,
                rollout,
                self._reward,
                first_group_id=first_group_id,
                seed=seed,
            )
        )

    def _check_versions(self, groups: list[SampleGroup]) -> None:
        for sample in (s for g in groups for s in g.samples):
            stale = [v for _, v in sample.policy_versions if v != self.version]
            if stale:
                raise RunError(
                    f"group {sample.group_id} was sampled by policy version {stale[0]}, "
                    f"the trainer is at {self.version}"
                )

    def _each(self, call: Callable[[Engine], Any]) -> list[Any]:
        return [future.result() for future in [self._threads.submit(call, e) for e in self.engines]]
