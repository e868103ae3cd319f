"""After each sync, engines and trainer say how likely the same few tokens are.

The trainer is asked before the pause, the engines once they generate again: beside their other
requests, so that nothing waits for it. What they answer is looked at before the next sync.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanoslime.types import RunError
from nanoslime.weight_sync.engine_calls import Failure

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Probe:
    """`token_ids` are the first tokens of some prompt; `max_gap` is the bound on the mean
    |engine's - trainer's logprob| over them, above which an engine cannot have these weights."""

    token_ids: list[int]
    max_gap: float
    _version: int = -1
    # The trainer's, float64 [T - 1]: of each token but the first, given those before it.
    _expected: np.ndarray = field(default_factory=lambda: np.zeros(0))
    _asked: dict[str, Future[Any]] = field(default_factory=dict)

    def expect(self, version: int, by_rank: Sequence[Sequence[float] | None]) -> None:
        """What the trainer says; ranks of earlier pipeline stages say nothing."""
        of_ranks = [logprobs for logprobs in by_rank if logprobs is not None]
        self._version = version
        self._expected = np.array(of_ranks[0]) if of_ranks else np.zeros(0)

    def ask(self, engines: Sequence[Any]) -> None:
        """Asks these engines, in threads; forgets what others have not yet answered."""
        if not len(self._expected) or not engines:
            self._asked = {}
            return
        threads = ThreadPoolExecutor(len(engines), thread_name_prefix="probe")
        self._asked = {
            engine.name: threads.submit(engine.score, self.token_ids) for engine in engines
        }
        threads.shutdown(wait=False)

    def collect(self) -> tuple[dict[str, float], dict[str, Failure]]:
        """Metrics over the engines that have answered, and those that are beyond the bound.

        An engine that fails or is late is left out: others watch whether it lives.
        """
        gaps = {}
        for name, call in self._asked.items():
            if not call.done() or isinstance(call.exception(), RunError):
                continue
            logprobs, version = call.result()
            if version == self._version:
                gaps[name] = np.abs(np.array(logprobs) - self._expected)
        self._asked = {}
        failures = {}
        for name, gap in gaps.items():
            mean = float(gap.mean())
            if not mean <= self.max_gap:
                cause = (
                    f"engine {name} gives {len(gap)} tokens of a prompt other logprobs than the "
                    f"trainer, by {mean:.3g} in the mean, with what it calls version "
                    f"{self._version} of the weights; weight_sync.max_logprob_gap is "
                    f"{self.max_gap:g}"
                )
                failures[name] = Failure(cause, is_gone=False)
        if not gaps:
            return {}, failures
        return {
            "weight_sync/logprob_gap_mean": float(np.mean([gap.mean() for gap in gaps.values()])),
            "weight_sync/logprob_gap_max": float(max(gap.max() for gap in gaps.values())),
        }, failures
