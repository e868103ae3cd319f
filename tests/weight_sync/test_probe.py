"""What engines and trainer say of the same tokens: who is beyond the bound is named, and who is
late is looked at later."""

import logging
import threading

import pytest

from nanoslime.types import EngineGone, RunError
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
            return [0.0, -2.0, -3.0], self._version
        return self._answer, self._version


def asked(*engines: Engine) -> Probe:
    probe = Probe([5, 6, 7, 8], max_gap=0.5)
    probe.expect(4, [None, EXPECTED])
    probe.ask(engines)
    return probe


def test_gaps_are_over_all_engines_and_told_once() -> None:
    probe = asked(Engine("a", [-1.0, -2.1, -3.2]), Engine("b", EXPECTED))
    metrics, failures = probe.collect(10)
    assert not failures
    assert metrics["weight_sync/logprob_gap_mean"] == pytest.approx(0.05)
    assert metrics["weight_sync/logprob_gap_max"] == pytest.approx(0.2)
    assert probe.collect(0) == ({}, {})


@pytest.mark.parametrize("other", [[-2.0, -2.0, -3.6], [float("nan"), -2.0, -3.0]])
def test_an_engine_beyond_the_bound_is_named(other: list[float]) -> None:
    probe = asked(Engine("a", EXPECTED), Engine("b", other))
    _, failures = probe.collect(10)
    [(name, failure)] = failures.items()
    assert name == "b" and not failure.is_gone
    assert "engine b gives 3 tokens of prompts other logprobs than the trainer" in failure.cause
    assert "version 4" in failure.cause and "max_logprob_gap is 0.5" in failure.cause


def test_an_engine_that_calls_its_weights_otherwise_is_named() -> None:
    probe = asked(Engine("a", EXPECTED, version=3))
    _, failures = probe.collect(10)
    assert failures["a"].cause == "engine a says that it has version 3 after the sync of 4"


def test_a_late_engine_is_looked_at_later_and_a_dead_one_is_left_out(caplog) -> None:
    may_answer = threading.Event()
    late = Engine("late", may_answer)
    refuses = RunError("it takes no more requests")
    probe = asked(late, Engine("dead", EngineGone("it is dead")), Engine("full", refuses))
    assert probe.collect(0.2) == ({}, {})
    assert "of engine full were not compared: it takes no more requests" in caplog.text
    may_answer.set()
    metrics, failures = probe.collect(10)
    assert metrics["weight_sync/logprob_gap_max"] == 1.0 and not failures


def test_an_engine_that_joins_is_asked_beside_a_late_one_which_the_next_version_forgets(
    caplog: pytest.LogCaptureFixture,
) -> None:
    may_answer = threading.Event()
    probe = asked(Engine("late", may_answer))
    probe.expect(4, [EXPECTED])
    probe.ask([Engine("joins", EXPECTED)])
    with caplog.at_level(logging.WARNING):
        assert probe.collect(0.2)[0]["weight_sync/logprob_gap_max"] == 0.0
        assert not caplog.text
        probe.expect(5, [EXPECTED])
    assert "version 4 was asked of engines that have not answered" in caplog.text
    assert probe.collect(0) == ({}, {})
    may_answer.set()


def test_without_a_trainer_nothing_is_asked() -> None:
    probe = Probe([5, 6, 7, 8], max_gap=0.5)
    probe.expect(4, [])
    probe.ask([Engine("a", EXPECTED)])
    assert probe.collect(10) == ({}, {})
