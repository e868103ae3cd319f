"""After each sync, engines and trainer say how likely the same few tokens are.

The trainer is asked before the pause, the engines once they generate again, beside their other
requests. A sync waits for the answers where an engine has nothing else to do. Otherwise they are
looked at while the driver waits for samples, and at the latest before the next sync. An engine
alone beyond the bound is lost, and started again; where all are, the run ends.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanoslime.types import EngineGone, RunError
from nanoslime.weight_sync.engine_calls import Failure

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Probe:
    """`max_gap` is the bound on the mean |engine's - trainer's logprob| over `token_ids`, above
    which an engine cannot have these weights. `wait_s` is how long a sync waits for answers; the
    engines are sent no further requests before."""

    token_ids: list[int]
    max_gap: float
    wait_s: float = 0.5
    _version: int = -1
    # The trainer's, float64 [T - 1]: of each token but the first, given those before it.
    _expected: np.ndarray = field(default_factory=lambda: np.zeros(0))
    _asked: dict[str, Future[Any]] = field(default_factory=dict)

    def expect(self, version: int, by_rank: Sequence[Sequence[float] | None]) -> None:
        """What the trainer says; ranks of earlier pipeline stages say nothing."""
        of_ranks = [logprobs for logprobs in by_rank if logprobs is not None]
        if version != self._version and self._asked:
            logger.warning(
                "whether they have the weights of version %d was asked of engines that have not "
                "answered before the next version: %s",
                self._version,
                ", ".join(self._asked),
            )
            self._asked = {}
        self._version = version
        self._expected = np.array(of_ranks[0]) if of_ranks else np.zeros(0)

    def ask(self, engines: Sequence[Any]) -> None:
        """Asks these engines, in threads."""
        if not len(self._expected) or not engines:
            return
        threads = ThreadPoolExecutor(len(engines), thread_name_prefix="probe")
        for engine in engines:
            self._asked[engine.name] = threads.submit(engine.score, self.token_ids)
        threads.shutdown(wait=False)

    def collect(self, wait_s: float) -> tuple[dict[str, float], dict[str, Failure]]:
        """Metrics over the engines that answer within `wait_s`, and those that have other weights.

        An engine that is gone is left out: others watch whether it lives.
        """
        wait(self._asked.values(), timeout=wait_s)
        answered = {name: call for name, call in self._asked.items() if call.done()}
        gaps = {}
        failures = {}
        for name, call in answered.items():
            del self._asked[name]
            error = call.exception()
            if isinstance(error, RunError):
                if not isinstance(error, EngineGone):
                    logger.warning("the weights of engine %s were not compared: %s", name, error)
                continue
            logprobs, version = call.result()
            gap = np.abs(np.array(logprobs) - self._expected)
            gaps[name] = gap
            problem = self._problem(gap, version)
            if problem:
                failures[name] = Failure(f"engine {name} {problem}", is_gone=False)
        if not gaps:
            return {}, failures
        return {
            "weight_sync/logprob_gap_mean": float(np.mean([gap.mean() for gap in gaps.values()])),
            "weight_sync/logprob_gap_max": float(max(gap.max() for gap in gaps.values())),
        }, failures

    def _problem(self, gap: np.ndarray, version: int) -> str | None:
        if version != self._version:
            return f"says that it has version {version} after the sync of {self._version}"
        mean = float(gap.mean())
        if mean <= self.max_gap:
            return None
        return (
            f"gives {len(gap)} tokens of prompts other logprobs than the trainer, by {mean:.3g} "
            f"in the mean and {float(gap.max()):.3g} at most, with what it calls version "
            f"{version} of the weights; weight_sync.max_logprob_gap is {self.max_gap:g}"
        )
