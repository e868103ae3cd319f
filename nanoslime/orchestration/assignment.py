"""Which rollout worker sends its requests to which engines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanoslime.rollout.tasks import Worker
from nanoslime.types import Engine


@dataclass(frozen=True, slots=True)
class Assignment:
    workers: Sequence[Worker]
    # The worker beside an engine, by the engine's name. An engine beside none serves all.
    home: Mapping[str, int]

    def set_engines(self, engines: Sequence[Engine]) -> None:
        """These engines serve from now on: each the worker beside it. A worker that has none
        left shares those of the others.
        """
        for number, worker in enumerate(self.workers):
            own = [engine for engine in engines if self.home.get(engine.name, number) == number]
            worker.set_engines(own or engines)

    def drain(self) -> None:
        """No worker sends anything until the next `set_engines`."""
        for worker in self.workers:
            worker.drain()
