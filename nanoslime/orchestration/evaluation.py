"""Evaluates the policy on sets of prompts, and keeps what came out.

sets -> a GroupTask for each prompt -> whoever samples and scores them -> metrics of each set
-> evals.jsonl (a row for each set), the log, and metrics for the tracker
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from nanoslime.algorithms.evaluation import evaluation_metrics
from nanoslime.config import EvalSetConfig, RunConfig
from nanoslime.rollout.prompts import RunPrompts, digest
from nanoslime.rollout.tasks import GroupTask, Sampling, seed_of
from nanoslime.run_dir import RunDir
from nanoslime.storage.shared_files import json_line
from nanoslime.types import Group, Prompt

logger = logging.getLogger(__name__)

# Samples and scores the groups of these tasks; the order of the answers is free.
Sampler = Callable[[Sequence[GroupTask]], Sequence[Group[Any]]]


def eval_sampling(one: EvalSetConfig, config: RunConfig) -> Sampling:
    """How the samples of a set are drawn.

    Greedy sampling is drawing from the likeliest token alone, at temperature 1: SGLang does so
    too where it is asked for temperature 0.
    """
    evaluation = config.eval
    rollout = config.rollout
    temperature = evaluation.temperature if one.temperature is None else one.temperature
    num_samples = one.n_samples_per_prompt
    if num_samples is None:
        num_samples = 1 if one.temperature == 0 else evaluation.n_samples_per_prompt
    return replace(
        Sampling.of(rollout),
        n_samples_per_prompt=num_samples,
        max_new_tokens=one.max_new_tokens or rollout.max_new_tokens,
        temperature=temperature or 1.0,
        top_p=one.top_p if temperature else 1.0,
        top_k=one.top_k if temperature else 1,
    )


class Evaluation:
    """The evaluations of a run on the sets of `RunConfig.eval_sets`."""

    def __init__(self, config: RunConfig, run: RunDir, loaded: RunPrompts):
        # Of the last evaluation, one for each set: what evals.jsonl got.
        self.rows: list[dict[str, Any]] = []
        self._run = run
        self._config = config
        self._sets = config.eval_sets
        self._prompts: list[Sequence[Prompt]] = []
        for one in self._sets:
            limit = config.eval.max_prompts if one.max_prompts is None else one.max_prompts
            self._prompts.append(loaded.eval_sets[one.title][: limit or None])

    def digest(self) -> str:
        """A hash of the prompts that choose the best checkpoint."""
        return digest(self._prompts[0] if self._prompts else [])

    def tasks(self, step: int) -> list[list[GroupTask]]:
        """The tasks of each set for the evaluation after rollout `step`, -1 before the first.

        Their groups have negative ids, so that they are none of the training's.
        """
        config = self._config
        tasks = []
        group_ids = count(-sum(map(len, self._prompts)))
        for number, one in enumerate(self._sets):
            sampling = eval_sampling(one, config)
            reward = one.data(config.data).reward
            of_set = []
            for position, prompt in enumerate(self._prompts[number]):
                task = GroupTask(
                    group_id=next(group_ids),
                    prompt=prompt,
                    sampling=sampling,
                    seed=seed_of(config.eval.seed, 1 + number, step, position),
                    reward=reward,
                    purpose="eval",
                )
                of_set.append(task)
            tasks.append(of_set)
        return tasks

    def run(self, step: int, version: int, sample: Sampler) -> dict[str, float]:
        """Evaluates on all sets; returns metrics for the tracker, none without a set.

        eval/<set>/<name> are those of `evaluation_metrics`, and eval/reward_mean is the mean
        reward of the first set. evals.jsonl gets a row for each set, once all are done.
        `version` is that of the weights that the engines have.
        """
        if not self._sets:
            return {}
        tasks_of = self.tasks(step)
        groups = sample([task for tasks in tasks_of for task in tasks])
        by_id = {group.group_id: group for group in groups}
        metrics: dict[str, float] = {}
        self.rows = []
        for one, tasks in zip(self._sets, tasks_of, strict=True):
            own = [by_id[task.group_id] for task in tasks]
            of_set = evaluation_metrics(own, one.pass_reward)
            metrics.setdefault("eval/reward_mean", of_set["reward_mean"])
            for name, value in of_set.items():
                metrics[f"eval/{one.title}/{name}"] = value
            row = {
                "step": step,
                "version": version,
                "set": one.title,
                "reward": of_set["reward_mean"],
                "samples": sum(len(group.samples) for group in own),
                "prompts": len(own),
            }
            self.rows.append(row | of_set)
            logger.info("%s", _line(self.rows[-1]))
        with self._run.evals.open("ab") as file:
            file.writelines(map(json_line, self.rows))
        return metrics


def _line(row: dict[str, Any]) -> str:
    """One line for a person: each estimate with its standard error."""
    told = [f"{name} {value:.4f}{error}" for name, value, error in estimates(row)]
    return (
        f"evaluation of {row['set']} after {row['step'] + 1} rollouts: {', '.join(told)}; "
        f"{row['samples']} samples of {row['prompts']} prompts, {row['truncated_ratio']:.0%} "
        f"truncated, {row['response_tokens_mean']:.0f} tokens on average"
    )


def estimates(row: dict[str, Any]) -> Iterator[tuple[str, float, str]]:
    """Name, value and the text of the standard error of each estimate."""
    for name, value in row.items():
        if "@" in name and not name.endswith("_se"):
            error = row.get(f"{name}_se")
            yield name, value, "" if error is None else f" ± {error:.4f}"
