"""Trainer and engines have devices of their own, or take turns on the same ones."""

import time
from typing import Any, Protocol

from nanoslime.weight_sync.engine_pool import EnginePool


class TrainerRanks(Protocol):
    """All trainer ranks. `call` runs a collective method of the worker on each."""

    address: str  # of rank 0, reachable from the engines

    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> Any: ...


class SeparateDevices:
    """Trainer and engines do not wait for one another."""

    def give_to_trainer(self) -> dict[str, float]:
        return {}

    def make_room_for_weights(self) -> None: ...

    def give_to_engines(self) -> dict[str, float]:
        return {}


class SharedDevices:
    """One of the two sleeps while the other is at work; the trainer has the first turn.

    make_room_for_weights() lies between two turns: the trainer is still awake, and the
    engines can be sent weights. Engines that gave up their memory have lost their
    weights.
    """

    def __init__(self, ranks: TrainerRanks, engines: EnginePool):
        self._ranks = ranks
        self._engines = engines
        self._engines_turn = False

    def give_to_trainer(self) -> dict[str, float]:
        """Returns the seconds of the trainer's waking; none where it is awake."""
        if not self._engines_turn:
            return {}
        self._engines.each_ready("release_memory")
        self._engines_turn = False
        return {"time/wake_s": self._timed("wake")}

    def make_room_for_weights(self) -> None:
        self._engines.each("resume_memory", "weights")

    def give_to_engines(self) -> dict[str, float]:
        """Returns the seconds that the trainer took to fall asleep."""
        sleep_s = self._timed("sleep")
        self._engines.each("resume_memory", "cache")
        self._engines_turn = True
        return {"time/sleep_s": sleep_s}

    def _timed(self, method: str) -> float:
        start = time.monotonic()
        self._ranks.call(method, what=method)
        return time.monotonic() - start
