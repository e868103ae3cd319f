"""Makes control calls to all engines side by side and takes every result."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from nanoslime.types import RunError


class EngineCalls:
    """One thread for each engine."""

    def __init__(self, engines: Sequence[Any]):
        self.engines = list(engines)
        self._threads = ThreadPoolExecutor(
            max_workers=max(1, len(self.engines)), thread_name_prefix="engine"
        )

    def each(self, method: str, *args: Any) -> list[Any]:
        """Calls a method of every engine; returns the results in order.

        An engine's control calls have deadlines of their own and raise RunError with its name.
        """
        calls = self.start(method, *args)
        return [call.result() for call in calls]

    def start(self, method: str, *args: Any, **options: Any) -> list[Future]:
        return [
            self._threads.submit(getattr(engine, method), *args, **options)
            for engine in self.engines
        ]

    def start_one(self, engine: Any, method: str, **options: Any) -> Future:
        return self._threads.submit(getattr(engine, method), **options)

    def collect(self, calls: Sequence[Future], what: str, deadline_s: float) -> None:
        """Waits for one call of each engine; errors say `what` it was asked to do."""
        for engine, call in zip(self.engines, calls, strict=True):
            try:
                call.result(timeout=deadline_s)
            except TimeoutError as e:
                raise RunError(
                    f"engine {engine.name} did not {what} within {deadline_s:.0f}s"
                ) from e

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
