"""What engines and trainer say of the same tokens: who is beyond the bound is named, and who is
late or dead is left out."""

import threading

import pytest

from nanoslime.types import EngineGone
from nanoslime.weight_sync.probe import Probe

EXPECTED = [-1.0, -2.0, -3.0]


class Engine:
    def __init__(self, name: str, answer: object, version: int = 4) -> None:
        self.name = name
        self._answer = answer
        self._version = version

    def score(self, token_ids: list[int]) -> tuple[list[float], int]:
        assert token_ids == [5, 6, 7, 8]
        if isinstance(self._answer, Exception):
            raise self._answer
        if isinstance(self._answer, threading.Event):
            self._answer.wait(10)
            return EXPECTED, self._version
        return self._answer, self._version


def asked(*engines: Engine) -> Probe:
    probe = Probe([5, 6, 7, 8], max_gap=0.5)
    probe.expect(4, [None, EXPECTED])
    probe.ask(engines)
    for engine in engines:
        if not isinstance(engine._answer, threading.Event):
            probe._asked[engine.name].exception(timeout=10)
    return probe


def test_gaps_are_over_all_engines_and_asked_for_once() -> None:
    probe = asked(Engine("a", [-1.0, -2.1, -3.2]), Engine("b", EXPECTED))
    metrics, failures = probe.collect()
    assert not failures
    assert metrics["weight_sync/logprob_gap_mean"] == pytest.approx(0.05)
    assert metrics["weight_sync/logprob_gap_max"] == pytest.approx(0.2)
    assert probe.collect() == ({}, {})


@pytest.mark.parametrize("other", [[-2.0, -2.0, -3.6], [float("nan"), -2.0, -3.0]])
def test_an_engine_beyond_the_bound_is_named(other: list[float]) -> None:
    probe = asked(Engine("a", EXPECTED), Engine("b", other))
    _, failures = probe.collect()
    [(name, failure)] = failures.items()
    assert name == "b" and not failure.is_gone
    assert "engine b gives 3 tokens of a prompt other logprobs than the trainer" in failure.cause
    assert "version 4" in failure.cause


def test_who_is_late_dead_or_has_another_version_by_now_is_left_out() -> None:
    late = threading.Event()
    wrong = [0.0, 0.0, 0.0]
    probe = asked(
        Engine("late", late),
        Engine("dead", EngineGone("it is dead")),
        Engine("newer", wrong, version=5),
    )
    assert probe.collect() == ({}, {})
    late.set()


def test_without_a_trainer_nothing_is_asked() -> None:
    probe = Probe([5, 6, 7, 8], max_gap=0.5)
    probe.expect(4, [])
    probe.ask([Engine("a", EXPECTED)])
    assert probe.collect() == ({}, {})
