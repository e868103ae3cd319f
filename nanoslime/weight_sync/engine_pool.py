"""The engines of a run, whoever is alive: what the routers and the weight sync go by.

    STARTING ──up──> SYNCING ──has the weights──> READY ──a sync begins──> DRAINING ──paused──┐
        ^               ^                                                                     │
        └─── LOST <─────┼── dies, hangs or refuses, in any state                              │
                        └─────────────────────────────────────────────────────────────────────┘

A lost engine is started again in a thread, after a pause that grows, and so often at most. The
driver's main thread gives it the current weights between two rollouts, or while it waits for
samples; only then does it serve.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from nanoslime.failures import summary
from nanoslime.types import Engine, MachineFailure
from nanoslime.weight_sync.engine_calls import EnginesFailed, Failure, call_each

logger = logging.getLogger(__name__)

# The pause before an engine is started for the first time again; each further one is longer.
_PAUSE_S = 1.0
_LONGER = 4.0

# Starts the engine anew, ending what is left of the last one.
Restart = Callable[[], Engine]


class EngineState(StrEnum):
    STARTING = "starting"
    SYNCING = "syncing"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


_IN_SYNC = (EngineState.DRAINING, EngineState.SYNCING)
_ALIVE = (*_IN_SYNC, EngineState.READY)


@dataclass(eq=False, slots=True)
class _Place:
    """An engine of the plan, whichever process it is at the moment."""

    engine: Engine
    restart: Restart | None
    state: EngineState = EngineState.SYNCING
    num_restarts: int = 0
    cause: str = ""
    # What `restart` has made, until the main thread takes it in.
    came_up: Engine | None = None


class EnginePool:
    """All is called in the driver's main thread, but `lost`, which any may call."""

    def __init__(
        self, engines: Sequence[Engine], restarts: Sequence[Restart] = (), *, max_restarts: int = 0
    ) -> None:
        """`restarts` are in the order of `engines`; without them a lost engine stays lost."""
        self._max_restarts = max_restarts if restarts else 0
        pairs = zip(engines, restarts or [None] * len(engines), strict=True)
        self._places = [_Place(engine, restart) for engine, restart in pairs]
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._syncs = True  # until the first sync has ended
        self._num_lost = 0
        self._on_change: list[Callable[[list[Engine]], None]] = []
        self._on_drain: list[Callable[[], None]] = []

    def subscribe(
        self, on_change: Callable[[list[Engine]], None], on_drain: Callable[[], None]
    ) -> None:
        """`on_change` is told which engines serve, now and whenever that changes, and at the
        end of a sync; `on_drain` that a sync begins.

        They return at once, and are called in any thread.
        """
        self._on_change.append(on_change)
        self._on_drain.append(on_drain)
        if not self._syncs:
            on_change(self.ready())

    def ready(self) -> list[Engine]:
        """The engines that serve."""
        return self._engines(EngineState.READY)

    def in_sync(self) -> list[Engine]:
        """Those that take part in a sync and are being given weights, and have not been lost."""
        return self._engines(*_IN_SYNC)

    def alive(self) -> list[Engine]:
        """Those that serve, too."""
        return self._engines(*_ALIVE)

    def states(self) -> list[EngineState]:
        with self._lock:
            return [place.state for place in self._places]

    def metrics(self) -> dict[str, float]:
        """Counts of the run up to now."""
        with self._lock:
            num_restarts = sum(place.num_restarts for place in self._places)
            return {
                "engines/ready": float(len(self.ready())),
                "engines/lost": float(self._num_lost),
                "engines/restarts": float(num_restarts),
            }

    def lost(self, name: str, cause: str) -> None:
        """The engine is dead, hangs, or cannot be brought to the right weights.

        It is started again, where it may be. What is lost already, or starts, is not lost
        twice.
        """
        with self._lock:
            place = self._place(name)
            if place is None or place.state not in _ALIVE:
                return
            place.state = EngineState.LOST
            place.cause = cause
            self._num_lost += 1
            logger.error("lost: %s; %d engines left", cause, len(self.alive()))
            self._start_again(place)
            if not self._syncs:
                self._tell_change()

    def service(self, join: Callable[[], None]) -> bool:
        """Has `join` give engines that came up the current weights; whether one is still starting.

        Raises RunError with all causes where no engine is left and none may come back.
        """
        self._require_any()
        self.take_in()
        if self.in_sync():
            join()
        return EngineState.STARTING in self.states()

    def take_in(self) -> None:
        """Engines that came up take part in the next sync, or in one of their own."""
        with self._lock:
            for place in self._places:
                if place.came_up is not None:
                    place.engine = place.came_up
                    place.came_up = None
                    place.state = EngineState.SYNCING

    def drain(self) -> None:
        """A sync begins: all engines that live take part, and nothing more is sent to them."""
        self._require_any()
        with self._lock:  # a loss that is being told comes before
            self._syncs = True
            for tell in self._on_drain:
                tell()
        self._change(EngineState.READY, EngineState.DRAINING)

    def paused(self) -> None:
        """Those that take part generate no more."""
        self._change(EngineState.DRAINING, EngineState.SYNCING)

    def serve(self) -> None:
        """Those that take part serve from now on. Raises RunError where no engine does, and
        none will.
        """
        self._change(EngineState.SYNCING, EngineState.READY)
        self._require_any()
        with self._lock:
            self._syncs = False
            self._tell_change()

    def each(self, method: str, *args: Any, **options: Any) -> dict[str, Any]:
        """Calls a method of each that takes part; returns the answers by name.

        One that fails is lost; see `fail`.
        """
        return self._each(self.in_sync(), method, *args, **options)

    def each_alive(self, method: str, *args: Any) -> dict[str, Any]:
        """As `each`, also of those that serve."""
        return self._each(self.alive(), method, *args)

    def each_ready(self, method: str, *args: Any) -> dict[str, Any]:
        """As `each`, of those that serve."""
        return self._each(self.ready(), method, *args)

    def fail(self, failures: Mapping[str, Failure]) -> None:
        """These engines are lost. Raises EnginesFailed where every engine of the run refuses:
        then it is not their fault.
        """
        num_refusals = sum(not failure.is_gone for failure in failures.values())
        if num_refusals and num_refusals == len(self.alive()):
            raise EnginesFailed.of(failures)
        for name, failure in failures.items():
            self.lost(name, failure.cause)

    def close(self) -> None:
        """Starts nothing any more; whoever owns the engines closes them."""
        self._closed.set()

    def _each(self, engines: list[Engine], method: str, *args: Any, **options: Any) -> Any:
        answers, failures = call_each(engines, method, *args, **options)
        self.fail(failures)
        return answers

    def _engines(self, *states: EngineState) -> list[Engine]:
        with self._lock:
            return [place.engine for place in self._places if place.state in states]

    def _place(self, name: str) -> _Place | None:
        return next((place for place in self._places if place.engine.name == name), None)

    def _change(self, old: EngineState, new: EngineState) -> None:
        with self._lock:
            for place in self._places:
                if place.state is old:
                    place.state = new

    def _tell_change(self) -> None:
        ready = self.ready()
        for tell in self._on_change:
            tell(ready)

    def _require_any(self) -> None:
        with self._lock:
            states = {place.state for place in self._places}
            if self._places and states <= {EngineState.LOST}:
                causes = "; ".join(place.cause for place in self._places)
                raise MachineFailure(f"no engine is left: {causes}")

    def _start_again(self, place: _Place) -> None:
        """Starts the thread that brings the engine back, where there may be one."""
        if place.num_restarts >= self._max_restarts or self._closed.is_set():
            return
        place.state = EngineState.STARTING
        name = f"restart-{place.engine.name}"
        thread = threading.Thread(target=self._bring_back, args=(place,), name=name, daemon=True)
        thread.start()

    def _bring_back(self, place: _Place) -> None:
        assert place.restart is not None
        name = place.engine.name
        while place.num_restarts < self._max_restarts:
            pause_s = _PAUSE_S * _LONGER**place.num_restarts
            if self._closed.wait(pause_s):
                return
            place.num_restarts += 1
            start = time.monotonic()
            try:
                engine = place.restart()
            except Exception as e:  # whatever it is, the engine is not there
                cause = f"{place.cause}; restart {place.num_restarts} failed: {summary(e)}"
                logger.error("engine %s: %s", name, cause)
                continue
            with self._lock:
                place.came_up = engine
            logger.warning("engine %s is up again after %.0f s", name, time.monotonic() - start)
            return
        with self._lock:
            place.state = EngineState.LOST
            place.cause = cause
