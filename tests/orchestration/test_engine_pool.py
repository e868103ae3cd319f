"""Which engines serve, and how a lost one comes back; with syncs in tests/weight_sync."""

import logging
import threading
import time
from collections.abc import Callable

import pytest

from nanoslime.types import EngineGone, RunError
from nanoslime.weight_sync import engine_pool
from nanoslime.weight_sync.engine_calls import EnginesFailed, Failure
from nanoslime.weight_sync.engine_pool import EnginePool, EngineState

STARTING, SYNCING, READY = EngineState.STARTING, EngineState.SYNCING, EngineState.READY
DRAINING, LOST = EngineState.DRAINING, EngineState.LOST


class Engine:
    def __init__(self, name: str) -> None:
        self.name = name

    def pause(self) -> str:
        return f"{self.name} paused"

    def hang(self) -> None:
        if self.name == "b":
            raise EngineGone("engine b hangs")


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_pool, "_PAUSE_S", 0.0)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def serving(pool: EnginePool) -> EnginePool:
    pool.serve()
    return pool


def test_a_sync_takes_the_engines_through_their_states() -> None:
    pool = EnginePool([Engine("a"), Engine("b")])
    told: list[object] = []
    pool.subscribe(lambda engines: told.append([e.name for e in engines]), lambda: told.append("-"))
    assert pool.states() == [SYNCING, SYNCING] and pool.ready() == []
    pool.serve()
    assert pool.states() == [READY, READY] and pool.in_sync() == []
    pool.drain()
    assert pool.states() == [DRAINING, DRAINING] and pool.ready() == []
    assert pool.each("pause") == {"a": "a paused", "b": "b paused"}
    pool.paused()
    assert pool.states() == [SYNCING, SYNCING]
    pool.serve()
    assert told == [["a", "b"], "-", ["a", "b"]]


def test_who_subscribes_late_hears_who_serves() -> None:
    pool = serving(EnginePool([Engine("a")]))
    told: list[list[Engine]] = []
    pool.subscribe(told.append, lambda: None)
    assert told == [pool.ready()]


def test_a_lost_engine_comes_back_through_a_sync_of_its_own() -> None:
    up = threading.Event()
    fresh = Engine("b")

    def restart() -> Engine:
        assert up.wait(20)
        return fresh

    pool = serving(EnginePool([Engine("a"), Engine("b")], [restart, restart], max_restarts=1))
    told: list[list[str]] = []
    pool.subscribe(lambda engines: told.append([e.name for e in engines]), lambda: None)
    pool.lost("b", "b hangs")
    pool.lost("b", "another worker saw it too")
    pool.lost("nobody", "who is that")
    assert pool.states() == [READY, STARTING]
    assert pool.service(lambda: pytest.fail("nothing has come up"))
    up.set()
    joined: list[list[Engine]] = []

    def join() -> None:
        joined.append(pool.in_sync())
        assert pool.states() == [READY, SYNCING]
        pool.serve()

    until(lambda: not pool.service(join))
    assert joined == [[fresh]] and pool.states() == [READY, READY]
    assert told == [["a", "b"], ["a"], ["a", "b"]]
    assert pool.metrics() == {"engines/ready": 2, "engines/lost": 1, "engines/restarts": 1}


def test_an_engine_that_came_up_takes_part_in_the_next_sync() -> None:
    fresh = Engine("b")
    pool = serving(EnginePool([Engine("a"), Engine("b")], [lambda: fresh] * 2, max_restarts=1))
    pool.lost("b", "b hangs")
    until(lambda: pool._places[1].came_up is not None)
    assert pool.states() == [READY, STARTING], "the main thread takes it in"
    pool.take_in()
    assert pool.alive()[1] is fresh and pool.states() == [READY, SYNCING]
    pool.drain()
    assert pool.states() == [DRAINING, SYNCING] and pool.in_sync()[1] is fresh


def test_restarts_are_counted_and_their_pauses_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = []

    def fails() -> Engine:
        raise OSError("no such host")

    pool = EnginePool([Engine("a")], [fails], max_restarts=3)
    wait = pool._closed.wait
    monkeypatch.setattr(pool._closed, "wait", lambda s: pauses.append(s) or wait(0))
    monkeypatch.setattr(engine_pool, "_PAUSE_S", 2.0)
    pool.serve()
    pool.lost("a", "engine a died")
    until(lambda: pool.states() == [LOST])
    assert pauses == [2.0, 8.0, 32.0]
    message = "no engine is left: engine a died; restart 3 failed: OSError: no such host"
    with pytest.raises(RunError, match=message):
        pool.service(lambda: None)
    with pytest.raises(RunError, match=message):
        pool.drain()


def test_a_run_goes_on_while_one_engine_is_left_or_may_come_back() -> None:
    pool = serving(EnginePool([Engine("a"), Engine("b")]))
    pool.lost("a", "a died")
    pool.service(lambda: None)
    pool.drain()
    pool.serve()
    pool.lost("b", "b died")
    with pytest.raises(RunError, match="no engine is left: a died; b died"):
        pool.service(lambda: None)


def test_a_closed_pool_starts_nothing() -> None:
    pool = serving(EnginePool([Engine("a")], [lambda: pytest.fail("started")], max_restarts=3))
    pool.close()
    pool.lost("a", "a died")
    assert pool.states() == [LOST]


def test_losses_during_a_sync_are_told_when_it_ends() -> None:
    """A router that heard of its engines would send them requests again."""
    pool = serving(EnginePool([Engine("a"), Engine("b")]))
    told: list[list[str]] = []
    pool.subscribe(lambda engines: told.append([e.name for e in engines]), lambda: None)
    pool.drain()
    assert pool.each("hang") == {"a": None}
    assert told == [["a", "b"]] and [engine.name for engine in pool.in_sync()] == ["a"]
    pool.paused()
    pool.serve()
    assert told == [["a", "b"], ["a"]]


def test_a_loss_that_is_still_being_told_does_not_end_a_drain() -> None:
    """Otherwise a router sends requests to engines that a sync has paused."""
    pool = serving(EnginePool([Engine("a"), Engine("b")]))
    told: list[list[str] | str] = []
    telling = threading.Event()

    def slowly(engines: list[Engine]) -> None:
        telling.set()
        time.sleep(0.2)
        told.append([engine.name for engine in engines])

    pool.subscribe(slowly, lambda: told.append("drain"))
    telling.clear()
    loss = threading.Thread(target=pool.lost, args=("b", "b hangs"))
    loss.start()
    assert telling.wait(20)
    pool.drain()
    loss.join()
    assert told == [["a", "b"], ["a"], "drain"]


def test_a_refusal_of_all_engines_is_nobodys_loss(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    pool = EnginePool([Engine("a"), Engine("b")])
    refusals = {name: Failure(f"{name} refuses", is_gone=False) for name in "ab"}
    with pytest.raises(EnginesFailed, match="a refuses; b refuses"):
        pool.fail(refusals)
    assert pool.states() == [SYNCING, SYNCING] and not caplog.text
    pool.fail({"a": refusals["a"]})
    assert pool.states() == [LOST, SYNCING]
    pool.fail({"b": Failure("b is gone", is_gone=True)})
    assert pool.states() == [LOST, LOST]
