"""Scores samples: a reward gives each a finite number, or it becomes a sample with an error.

Scorer.score -> each reward of the sum -> in the event loop (QUICK), or in a RewardPool
"""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Sequence

from nanoslime.config import DataConfig
from nanoslime.failures import summary
from nanoslime.rollout.rewards import Reward, asked_names, call, known, make, number
from nanoslime.rollout.rewards.pool import RewardFailed, RewardPool
from nanoslime.types import Prompt, Sample, Status

logger = logging.getLogger(__name__)

# Rewards of our own that take microseconds and cannot hang: they need no process.
QUICK = frozenset({"exact_match", "f1", "gsm8k", "multiple_choice", "gpqa"})
_MAX_PROCESSES = 8


class Scorer:
    """The rewards of one rollout worker, for one event loop; `close` ends their processes."""

    def __init__(self, data: DataConfig) -> None:
        self._data = data
        # With what each asks for by name.
        self._quick: dict[str, tuple[Reward, frozenset[str]]] = {}
        self._pools: dict[str, RewardPool] = {}
        self._counts: Counter[str] = Counter()
        self._told: set[tuple[str, str]] = set()

    async def score(self, samples: Sequence[Sample], prompt: Prompt, reward_name: str) -> None:
        """Gives the samples of one rollout their reward, and its parts where it is a weighted sum.

        It is one for all of them: what the environment gave any of them, or else the reward
        of the last one. Samples that have status error already are left alone. A reward that
        crashes, takes too long, ends its process or is no finite number gives all the others
        this status, with the cause in `error`; so do rewards of the environment that differ.
        """
        made = [sample for sample in samples if sample.status is not Status.ERROR]
        given = [sample for sample in made if sample.reward is not None]
        if not made:
            return
        judged = (given or made)[-1]
        try:
            if given:
                judged.reward = _agreed(given)
            else:
                await self._judge(judged, prompt, self._data.reward_weights(reward_name))
        except Exception as error:
            self._fail(made, judged, reward_name, error)
            return
        for sample in made:
            if sample.reward is None:
                sample.reward_parts = dict(judged.reward_parts)
            sample.reward = judged.reward

    def metrics(self) -> dict[str, float]:
        """How many samples have lost their reward since this was asked the last time."""
        counts = self._counts
        self._counts = Counter()
        names = ("rollout/reward_errors", "rollout/reward_timeouts")
        return {name: float(counts[name]) for name in names}

    async def close(self) -> None:
        for pool in self._pools.values():
            await pool.close()

    async def _judge(self, sample: Sample, prompt: Prompt, weights: dict[str, float]) -> None:
        """Raises what the first reward that fails has raised, once all have come to an end."""
        judgements = [self._value(name, sample, prompt) for name in weights]
        values = await asyncio.gather(*judgements, return_exceptions=True)
        parts: dict[str, float] = {}
        for name, value in zip(weights, values, strict=True):
            if isinstance(value, BaseException):
                raise value
            parts[name] = value
        sample.reward = number(sum(weight * parts[name] for name, weight in weights.items()))
        if len(parts) > 1:
            sample.reward_parts = parts

    async def _value(self, name: str, sample: Sample, prompt: Prompt) -> float:
        """Raises RewardFailed, or what a quick reward raises."""
        data = self._data
        arguments = (sample.text, sample.label, prompt.metadata)
        named = known(sample, prompt, data)
        if name in QUICK:
            if name not in self._quick:
                reward = make(name)
                self._quick[name] = reward, asked_names(reward)  # its signature takes long
            return call(*self._quick[name], arguments, named)
        if name not in self._pools:
            cores = len(os.sched_getaffinity(0))
            size = data.reward_processes or min(cores, _MAX_PROCESSES)
            self._pools[name] = RewardPool(name, size, data.reward_timeout_s)
        return await self._pools[name].call(arguments, named)

    def _fail(
        self, samples: Sequence[Sample], judged: Sample, reward_name: str, error: Exception
    ) -> None:
        failure = RewardFailed(summary(error), type(error).__name__)
        if isinstance(error, RewardFailed):
            failure = error
        cause = f"reward {reward_name}: {failure.cause}"
        for sample in samples:
            sample.status = Status.ERROR
            sample.reward = None
            sample.error = cause
            self._counts["rollout/reward_errors"] += 1
            self._counts["rollout/reward_timeouts"] += failure.kind == "late"
        key = (reward_name, failure.kind)
        if key not in self._told:
            self._told.add(key)
            details = f"\n{failure.traceback}" if failure.traceback else ""
            logger.warning("%s (told once; response: %.200r)%s", cause, judged.text, details)


def _agreed(samples: Sequence[Sample]) -> float:
    """The reward that the environment gave the samples of a rollout.

    Raises ValueError where they have several, or one is no finite number.
    """
    rewards = {number(sample.reward) for sample in samples}
    if len(rewards) > 1:
        raise ValueError(
            f"the samples of a rollout share one reward, but the environment gave {sorted(rewards)}"
        )
    return rewards.pop()
