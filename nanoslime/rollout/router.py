"""Spreads requests over engines, by least sequences in flight."""

import asyncio
import logging
from collections.abc import Sequence

from nanoslime.types import Engine, GenerateRequest, Generation, RequestFailed, RunError, Status

logger = logging.getLogger(__name__)

# A request is tried so often, and so is the health check that decides on an engine.
_NUM_TRIES = 2
_HEALTH_PAUSE_S = 1.0


class LeastInflightRouter:
    """Gives each request to the engine with the fewest sequences in flight.

    A request that fails is tried once more, on another engine where there is one. When
    that fails too, its samples have status error. A failure also has the engine's health
    checked: an engine that is not healthy leaves the rotation, and `lost` names it with
    the cause.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = {engine.name: engine for engine in engines}
        if not engines or len(self._engines) < len(engines):
            names = [engine.name for engine in engines]
            raise RunError(f"a router needs engines with names of their own, got {names}")
        # Sequences that each engine was asked for and has not yet answered.
        self.inflight = dict.fromkeys(self._engines, 0)
        self.lost: dict[str, str] = {}
        # Healthy engines on which a request has failed, which is said once of each.
        self._failed_once: set[str] = set()
        # Requests that fail together on one engine wait for the same check.
        self._checks: dict[str, asyncio.Task[None]] = {}

    async def generate(self, request: GenerateRequest, key: str = "") -> list[Generation]:
        """Raises RunError, naming each engine's cause, when no engine is left.

        `key` says which requests belong together; it decides nothing yet.
        """
        tried = ""
        cause = ""
        for _ in range(_NUM_TRIES):
            tried = self._least_busy(avoid=tried)
            self.inflight[tried] += request.n
            try:
                return await self._engines[tried].generate(request)
            except RequestFailed as e:
                cause = str(e)
            finally:
                self.inflight[tried] -= request.n
            await self._check_health(tried, cause)
        self._left()
        return [Generation([], [], Status.ERROR, [], error=cause)] * request.n

    def _left(self) -> list[str]:
        """The engines in the rotation; RunError where there is none."""
        left = [name for name in self._engines if name not in self.lost]
        if not left:
            raise RunError("no engine is left: " + "; ".join(self.lost.values()))
        return left

    def _least_busy(self, avoid: str) -> str:
        """The least busy engine; `avoid` only where it is the last one."""
        left = self._left()
        others = [name for name in left if name != avoid]
        return min(others or left, key=self.inflight.__getitem__)

    async def _check_health(self, name: str, cause: str) -> None:
        """Takes the engine out of the rotation where it is not healthy."""
        if name in self.lost:
            return
        if name not in self._checks:
            check = asyncio.create_task(self._remove_unless_healthy(name, cause))
            check.add_done_callback(lambda _: self._checks.pop(name))
            self._checks[name] = check
        await asyncio.shield(self._checks[name])

    async def _remove_unless_healthy(self, name: str, cause: str) -> None:
        for number in range(_NUM_TRIES):
            if number > 0:
                await asyncio.sleep(_HEALTH_PAUSE_S)
            if await asyncio.to_thread(self._engines[name].health):
                level = logging.DEBUG if name in self._failed_once else logging.WARNING
                logger.log(level, "a request failed, its engine is healthy: %s", cause)
                self._failed_once.add(name)
                return
        self.lost[name] = f"{cause}; it failed {_NUM_TRIES} health checks"
        num_left = len(self._engines) - len(self.lost)
        logger.error("out of rotation: %s; %d engines left", self.lost[name], num_left)
