"""Spreads requests over engines, by least sequences in flight."""

import logging
from collections.abc import Sequence

from nanoslime.types import Engine, EngineLost, GenerateRequest, Generation, RunError

logger = logging.getLogger(__name__)


class LeastInflightRouter:
    """Gives each request to the engine with the fewest sequences in flight.

    A lost engine leaves the rotation and is named in `lost` with its cause; its
    requests go to the other engines.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = {engine.name: engine for engine in engines}
        if not engines or len(self._engines) < len(engines):
            names = [engine.name for engine in engines]
            raise RunError(f"a router needs engines with names of their own, got {names}")
        self._inflight = dict.fromkeys(self._engines, 0)
        self.lost: dict[str, str] = {}

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        """Raises RunError, naming each engine's cause, when none is left."""
        while len(self.lost) < len(self._engines):
            name = self._least_busy()
            self._inflight[name] += request.n
            try:
                return await self._engines[name].generate(request)
            except EngineLost as e:
                self._remove(name, e)
            finally:
                self._inflight[name] -= request.n
        raise RunError("no engine is left: " + "; ".join(self.lost.values()))

    def _least_busy(self) -> str:
        left = [name for name in self._engines if name not in self.lost]
        return min(left, key=self._inflight.__getitem__)

    def _remove(self, name: str, cause: EngineLost) -> None:
        """Takes the engine out of the rotation; several of its requests may find it lost."""
        if name in self.lost:
            return
        self.lost[name] = str(cause)
        num_left = len(self._engines) - len(self.lost)
        logger.error("out of rotation: %s; %d engines left", cause, num_left)
