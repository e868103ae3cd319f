"""Makes control calls to several engines side by side, and says which of them failed."""

from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from nanoslime.types import EngineGone, RunError

# When one engine has failed, others that fail with it have so long to say so.
_ALIKE_S = 3.0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call to an engine failed."""

    cause: str
    # Whether it did not answer at all; otherwise it refused what it was asked.
    is_gone: bool

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Raises `error` where it is no RunError: that is a fault of ours."""
        if not isinstance(error, RunError):
            raise error
        return cls(str(error), isinstance(error, EngineGone))


class EnginesFailed(RunError):
    """Calls to engines failed; `failures` says of which, as far as it is known."""

    def __init__(self, message: str, failures: Mapping[str, Failure]) -> None:
        super().__init__(message)
        self.failures = dict(failures)

    @classmethod
    def of(cls, failures: Mapping[str, Failure]) -> "EnginesFailed":
        causes = [failure.cause for failure in failures.values()]
        return cls("; ".join(causes), failures)


def call_each(
    engines: Sequence[Any], method: str, *args: Any, **options: Any
) -> tuple[dict[str, Any], dict[str, Failure]]:
    """Calls a method of every engine; returns the answers, and the failures, by engine.

    An engine's control calls have deadlines of their own.
    """
    answers = {}
    failures = {}
    with ThreadPoolExecutor(max(1, len(engines)), thread_name_prefix="engine") as threads:
        calls = {
            engine.name: threads.submit(getattr(engine, method), *args, **options)
            for engine in engines
        }
    for name, call in calls.items():
        error = call.exception()
        if error is None:
            answers[name] = call.result()
        else:
            failures[name] = Failure.of(error)
    return answers, failures


class EngineCalls:
    """Calls to the same engines that run while their caller does something else."""

    def __init__(self, engines: Sequence[Any]):
        self.engines = list(engines)
        self._threads = ThreadPoolExecutor(
            max_workers=max(1, len(self.engines)), thread_name_prefix="engine"
        )

    def start(self, method: str, **options: Any) -> list[Future]:
        return [self.start_one(engine, method, **options) for engine in self.engines]

    def start_one(self, engine: Any, method: str, **options: Any) -> Future:
        return self._threads.submit(getattr(engine, method), **options)

    def collect(self, calls: Sequence[Future], what: str, deadline_s: float) -> None:
        """Waits for one call of each engine, or until one has failed.

        Raises EnginesFailed; errors say `what` an engine was asked to do.
        """
        _, pending = wait(calls, timeout=deadline_s, return_when=FIRST_EXCEPTION)
        failures = self.failures_of(calls)
        if failures:
            wait(calls, timeout=_ALIKE_S)
            raise EnginesFailed.of(self.failures_of(calls))
        if pending:
            for engine, call in zip(self.engines, calls, strict=True):
                if call in pending:
                    cause = f"engine {engine.name} did not {what} within {deadline_s:.0f}s"
                    failures[engine.name] = Failure(cause, is_gone=True)
            raise EnginesFailed.of(failures)

    def failures_of(self, calls: Sequence[Future]) -> dict[str, Failure]:
        """The failures of those calls that have ended, by engine."""
        failures = {}
        for engine, call in zip(self.engines, calls, strict=True):
            error = call.exception() if call.done() else None
            if error is not None:
                failures[engine.name] = Failure.of(error)
        return failures

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
