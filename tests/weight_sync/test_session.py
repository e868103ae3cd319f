"""The order of a sync, and what becomes of an engine or a rank that fails: nobody serves a
mixture, and an engine costs the run nothing but itself.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nanoslime.types import EngineGone, RunError
from nanoslime.weight_sync.devices import SeparateDevices, SharedDevices
from nanoslime.weight_sync.engine_calls import EngineCalls, EnginesFailed, Failure
from nanoslime.weight_sync.engine_pool import EnginePool
from nanoslime.weight_sync.probe import Probe
from nanoslime.weight_sync.session import State, SyncSession
from nanoslime.weight_sync.transport import TRANSPORTS, EngineSide, Sent

# Of a rank, for its part of a sync.
SECONDS = {
    "time/weight_sync_gather_s": 4.0,
    "time/weight_sync_wire_s": 2.0,
    "time/weight_sync_load_s": 1.0,
}


class Engine:
    """Keeps what it is told, in a list that it shares with the ranks.

    As a server does, it refuses the end of an update that was not begun, or whose tensors have
    not come; and it serves what it has as soon as it is resumed, whatever that is. `gone_at`
    is the call at which it dies.
    """

    def __init__(self, name: str, calls: list[str], fails_at: str = "", gone_at: str = ""):
        self.name = name
        self.label = 0
        self.is_gone = False
        self.is_paused = False
        self.own_calls: list[str] = []
        self.agreed: list[Any] = []
        self.groups_left: list[str] = []
        # The version of the weights that it has; None for a mixture.
        self.weights: int | None = 0
        self.served: list[tuple[int | None, int]] = []  # weights and label, at each resume
        self.compared: list[int] = []  # versions
        self._calls = calls
        self._fails_at = fails_at
        self._gone_at = gone_at
        self._lock = threading.Lock()

    def _told(self, call: str) -> None:
        with self._lock:
            self._calls.append(call)
            self.own_calls.append(call)
        if call == self._gone_at:
            self.is_gone = True
        if self.is_gone:
            raise EngineGone(f"engine {self.name}: {call} was not answered")
        if call == self._fails_at:
            raise RunError(f"engine {self.name}: {call} refused")

    def agree(self, tensors: list[Any]) -> None:
        self.agreed.append(tensors)
        if self._fails_at == "agree":
            raise RunError(f"engine {self.name}: it was loaded as torch.float16")

    def pause(self, mode: str) -> None:
        assert mode == "retract"
        self._told("pause")
        self.is_paused = True

    def resume(self) -> None:
        self._told("resume")
        self.is_paused = False
        self.served.append((self.weights, self.label))

    def begin_update(self) -> None:
        self._told("begin_update")
        assert self.is_paused
        self.weights = None

    def end_update(self, version: int, *, flush: bool) -> None:
        if not flush:
            assert self.label == version
            self.compared.append(version)
            self._told("compare")
        self._told("end_update")
        if self.weights is None:
            raise RunError(f"engine {self.name}: end_update before the tensors of {version}")
        self.label = version

    def abandon_update(self, group: str) -> None:
        self._told("abandon_update")
        self.groups_left.append(group)

    def update_weights_from_disk(
        self, path: str, version: int, *, flush: bool, compares: bool
    ) -> None:
        assert Path(path).is_dir() and self.is_paused
        if compares:
            assert self.weights == version
            self.compared.append(version)
            self._told("compare")
            return
        self._told("update_weights_from_disk")
        self.label = version
        self.weights = version

    def policy_version(self) -> int:
        self._told("policy_version")
        return self.label

    def release_memory(self) -> None:
        self._told("release_memory")

    def resume_memory(self, part: str) -> None:
        self._told(f"resume_memory {part}")


class Ranks:
    """Trainer ranks that send to the engines that they were connected with.

    Engines whose `gone_at` is "send" die meanwhile, and one whose `fails_at` is "send" refuses
    what it is sent; then nobody else gets all of it either.
    """

    address = "10.0.0.7"

    def __init__(self, calls: list[str], directory: Path, fails_at: str = ""):
        self.told: dict[str, tuple[Any, ...]] = {}  # arguments and deadline by method
        self.engines: list[Engine] = []
        self.groups: list[str] = []
        self._calls = calls
        self._directory = directory
        self._fails_at = fails_at

    def call(
        self, method: str, *args: Any, what: str, deadline_s: float | None = None
    ) -> list[Sent]:
        if method == "tensor_kinds":
            return [[("w", "torch.float32", (2, 3))], []]
        self._calls.append(method)
        self.told[method] = (*args, deadline_s)
        if method == self._fails_at:
            raise RunError(f"trainer rank 1 died while asked to {what}")
        if method == "connect":
            self.engines = list(args[1].engines)
            self.groups.append(args[1].group)
        if method == "score":
            return [None, [-1.0, -2.0]]
        if method == "prepare":
            self.version = args[0]
            (self._directory / f"version_{args[0]}").mkdir(exist_ok=True)
        if method == "send":
            return [self._send(args[0]), Sent(times=SECONDS)]
        return [Sent(), Sent()]

    def _send(self, version: int) -> Sent:
        failures = {}
        for engine in self.engines:
            try:
                engine._told("send")
            except RunError as e:
                failures[engine.name] = Failure.of(e)
        if failures:
            return Sent(failures=failures, problem="; ".join(f.cause for f in failures.values()))
        for engine in self.engines:
            engine.weights = version
        return Sent(num_bytes=8, times=SECONDS)


def opened(
    tmp_path: Path,
    transport: str,
    *engines: Engine,
    calls: list[str],
    rank_fails_at: str = "",
    restarts: list[Callable[[], Engine]] | None = None,
) -> SyncSession:
    ranks = Ranks(calls, tmp_path, rank_fails_at)
    max_restarts = 3 if restarts else 0
    session = SyncSession(
        ranks,
        EnginePool(engines, restarts or [], max_restarts=max_restarts),
        SeparateDevices(),
        transport=transport,
        directory=tmp_path,
        deadline_s=5.0,
    )
    session.open([[0]])
    session._num_syncs = 1  # so that the next one is as most are, and compares nothing
    calls.clear()
    return session


@pytest.mark.parametrize("transport", ["broadcast", "tensor"])
def test_buckets_go_between_begin_and_end_while_the_engines_are_paused(tmp_path, transport):
    calls: list[str] = []
    engine = Engine("a", calls)
    session = opened(tmp_path, transport, engine, calls=calls)
    times = session.sync(3)
    update = ["begin_update", "send", "send", "end_update"]
    assert calls == ["prepare", "pause", *update, "policy_version", "resume"]
    assert (session.version, session.state, engine.label) == (3, State.IDLE, 3)
    assert times["time/weight_sync_s"] >= times["time/weight_sync_pause_s"] >= 0
    # Two ranks send in turns what they have gathered side by side.
    assert times["time/weight_sync_gather_s"] == 4.0
    assert times["time/weight_sync_wire_s"] == 4.0
    assert times["time/weight_sync_load_s"] == 2.0


@pytest.mark.parametrize("transport", ["broadcast", "disk"])
def test_the_first_sync_and_every_third_compare_and_so_does_a_join(
    tmp_path, monkeypatch, transport
):
    monkeypatch.setattr("nanoslime.weight_sync.engine_pool._PAUSE_S", 0.0)
    calls: list[str] = []
    a = Engine("a", calls)
    fresh = Engine("a", calls)
    session = opened(tmp_path, transport, a, calls=calls, restarts=[lambda: fresh])
    session._num_syncs = 0
    session._compare_every = 3
    for version in range(5):
        session.sync(version)
    assert a.compared == [0, 3]
    assert [label for _, label in a.served] == [0, 1, 2, 3, 4]
    session._engines.lost("a", "a hangs")
    while not fresh.served:
        session._engines.service(session.join)
    assert fresh.compared == [4] and fresh.served == [(4, 4)]


@pytest.mark.parametrize("transport", ["broadcast", "disk"])
def test_an_engine_in_which_comparing_changes_something_is_lost(tmp_path, transport):
    calls: list[str] = []
    a = Engine("a", calls)
    b = Engine("b", calls, fails_at="compare")
    session = opened(tmp_path, transport, a, b, calls=calls)
    session._num_syncs = 0
    session.sync(4)
    assert a.served == [(4, 4)] and b.served == []


def test_files_are_written_before_the_pause_and_two_versions_of_them_are_kept(tmp_path):
    calls: list[str] = []
    session = opened(tmp_path, "disk", Engine("a", calls), calls=calls)
    session.sync(3)
    assert calls == ["prepare", "pause", "update_weights_from_disk", "policy_version", "resume"]
    session.sync(4)
    session.sync(5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_4", "version_5"]


def test_without_a_way_an_engine_of_another_version_is_named(tmp_path):
    calls: list[str] = []
    engine = Engine("a", calls)
    engine.label = 7
    session = opened(tmp_path, "none", engine, calls=calls)
    with pytest.raises(RunError, match="engine a reports policy version 7 after the sync of 0"):
        session.sync(3)


def test_without_a_way_the_engines_stay_at_version_0(tmp_path):
    calls: list[str] = []
    session = opened(tmp_path, "none", Engine("a", calls), calls=calls)
    session.sync(3)
    assert calls == ["policy_version"] and session.version == 0


def test_shared_devices_change_hands_inside_a_sync(tmp_path):
    calls: list[str] = []
    engines = EnginePool([Engine("a", calls)])
    ranks = Ranks(calls, tmp_path)
    devices = SharedDevices(ranks, engines)
    session = SyncSession(
        ranks, engines, devices, transport="tensor", directory=tmp_path, deadline_s=5.0
    )
    session.open([[0]])
    calls.clear()
    assert session.sync(1).keys() == {
        "time/weight_sync_s",
        "time/weight_sync_pause_s",
        "time/sleep_s",
        *SECONDS,
    }
    update = ["begin_update", "send", "send", "end_update"]
    again = ["begin_update", "send", "send", "compare", "end_update"]
    turn = ["resume_memory weights", *update, *again, "sleep", "resume_memory cache"]
    assert calls == ["prepare", "pause", *turn, "policy_version", "resume"]
    calls.clear()
    assert devices.give_to_trainer().keys() == {"time/wake_s"}
    assert devices.give_to_trainer() == {}
    assert calls == ["release_memory", "wake"]


def test_a_rank_that_dies_while_sending_leaves_every_engine_paused_under_its_old_label(tmp_path):
    calls: list[str] = []
    engine = Engine("a", calls)
    session = opened(tmp_path, "broadcast", engine, calls=calls, rank_fails_at="send")
    with pytest.raises(RunError, match="rank 1 died while asked to send the weights of version 4"):
        session.sync(4)
    assert "resume" not in calls and engine.label == 0
    assert (session.version, session.state) == (-1, State.SENDING)


CALLS = ["pause", "begin_update", "send", "end_update", "policy_version", "resume"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("way", ["fails_at", "gone_at"])
def test_an_engine_that_fails_is_lost_and_the_others_are_brought_to_the_version(
    tmp_path, call, way
):
    """Whatever the call, the lost engine serves nothing, and the others no mixture."""
    calls: list[str] = []
    a = Engine("a", calls)
    b = Engine("b", calls, **{way: call})
    session = opened(tmp_path, "broadcast", a, b, calls=calls)
    session.sync(4)
    assert (session.version, session.state) == (4, State.IDLE)
    assert a.served == [(4, 4)] and b.served == []
    assert session._engines.ready() == [a]
    num_rounds = 2 if call in ("begin_update", "send") else 1
    assert a.own_calls.count("begin_update") == num_rounds
    if num_rounds == 2:
        assert session._ranks.engines == [a], "the group was formed anew"
        assert len(set(session._ranks.groups)) == 2
    session.sync(5)
    assert a.served == [(4, 4), (5, 5)] and b.served == []
    assert b.own_calls.count("pause") == 1, "a lost engine is told nothing more"


def test_an_engine_that_was_late_because_another_hangs_goes_on(tmp_path):
    """Both are late for the rank that sends; only one of them answers afterwards."""
    calls: list[str] = []
    a = Engine("a", calls)
    b = Engine("b", calls, gone_at="abandon_update")
    session = opened(tmp_path, "broadcast", a, b, calls=calls)
    send = session._ranks._send

    def late(version: int) -> Sent:
        if b in session._ranks.engines:
            failures = {name: Failure(f"{name} is late", is_gone=True) for name in "ab"}
            return Sent(failures=failures, problem="a is late; b is late")
        return send(version)

    session._ranks._send = late
    session.sync(4)
    assert a.served == [(4, 4)] and b.served == []


@pytest.mark.parametrize("call", ["pause", "update_weights_from_disk"])
def test_an_engine_that_dies_over_files_is_lost(tmp_path, call):
    calls: list[str] = []
    a = Engine("a", calls)
    b = Engine("b", calls, gone_at=call)
    session = opened(tmp_path, "disk", a, b, calls=calls)
    session.sync(4)
    assert a.served == [(4, 4)] and session._engines.ready() == [a]
    assert calls.count("prepare") == 1


@pytest.mark.parametrize("call", ["begin_update", "send", "end_update"])
def test_what_every_engine_refuses_is_not_their_fault_and_none_goes_on(tmp_path, call):
    calls: list[str] = []
    engines = [Engine(name, calls, fails_at=call) for name in "ab"]
    session = opened(tmp_path, "broadcast", *engines, calls=calls)
    with pytest.raises(RunError, match=f"engine a: {call} refused; engine b: {call} refused"):
        session.sync(4)
    assert "resume" not in calls and {engine.label for engine in engines} == {0}
    assert [engine.own_calls.count(call) for engine in engines] == [2, 2], "it was tried again"
    with pytest.raises(
        RunError, match="version 5 cannot be sent: the sync .* while it was sending"
    ):
        session.sync(5)


@pytest.mark.parametrize("transport", ["broadcast", "tensor", "disk"])
def test_what_every_engine_refuses_once_is_sent_again_and_named(tmp_path, caplog, transport):
    """What went wrong on the way may have passed: files are written anew."""
    calls: list[str] = []
    engines = [Engine(name, calls) for name in "ab"]
    session = opened(tmp_path, transport, *engines, calls=calls)
    call = "update_weights_from_disk" if transport == "disk" else "send"
    for engine in engines:
        engine._fails_at = call
    told = Engine._told

    def once(engine: Engine, name: str) -> None:
        try:
            told(engine, name)
        finally:
            if name == call:
                engine._fails_at = ""

    for engine in engines:
        engine._told = partial(once, engine)
    session.sync(4)
    assert [engine.served for engine in engines] == [[(4, 4)], [(4, 4)]]
    assert calls.count("prepare") == (2 if transport == "disk" else 1)
    assert f"version 4 is sent once more: engine a: {call} refused; engine b" in caplog.text


def test_engines_that_die_one_after_another_are_lost_one_after_another(tmp_path):
    calls: list[str] = []
    a = Engine("a", calls)
    b = Engine("b", calls, gone_at="begin_update")
    c = Engine("c", calls, gone_at="send")
    session = opened(tmp_path, "broadcast", a, b, c, calls=calls)
    session.sync(4)
    assert a.served == [(4, 4)] and session._engines.ready() == [a]
    assert len(session._ranks.groups) == 3


@pytest.mark.parametrize("call", CALLS)
def test_a_run_without_an_engine_and_without_hope_ends_with_the_causes(tmp_path, call):
    calls: list[str] = []
    session = opened(tmp_path, "broadcast", Engine("a", calls, gone_at=call), calls=calls)
    found_by = "abandon_update" if call == "send" else call
    message = f"no engine is left: engine a: {found_by} was not answered"
    with pytest.raises(RunError, match=message):
        session.sync(4)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("transport", ["broadcast", "disk"])
def test_the_only_engine_comes_back_and_gets_the_weights_before_it_serves(
    tmp_path, monkeypatch, call, transport
):
    """The sync goes on without any engine; who comes up joins with its version."""
    monkeypatch.setattr("nanoslime.weight_sync.engine_pool._PAUSE_S", 0.0)
    if transport == "disk" and call in ("begin_update", "send", "end_update"):
        call = "update_weights_from_disk"
    calls: list[str] = []
    fresh = Engine("a", calls)
    may_start = threading.Event()

    def restart() -> Engine:
        assert may_start.wait(10)
        return fresh

    gone = Engine("a", calls, gone_at=call)
    session = opened(tmp_path, transport, gone, calls=calls, restarts=[restart])
    pool = session._engines
    told: list[list[Engine]] = []
    pool.subscribe(told.append, lambda: told.append("drain"))
    session.sync(4)
    assert session.version == 4 and told == ["drain", []]
    pool.service(session.join)
    assert told == ["drain", []], "it is not up yet"
    may_start.set()
    while not pool.ready():
        pool.service(session.join)
    assert told == ["drain", [], [fresh]]
    assert fresh.served == [(4, 4)] and gone.served == []
    session.sync(5)
    assert fresh.served == [(4, 4), (5, 5)]


def test_an_engine_joins_while_the_others_serve(tmp_path, monkeypatch):
    monkeypatch.setattr("nanoslime.weight_sync.engine_pool._PAUSE_S", 0.0)
    calls: list[str] = []
    a = Engine("a", calls)
    b = Engine("b", calls)
    fresh = Engine("b", calls)
    session = opened(
        tmp_path, "broadcast", a, b, calls=calls, restarts=[lambda: None, lambda: fresh]
    )
    pool = session._engines
    session.sync(1)
    a.own_calls.clear()
    pool.lost("b", "b hangs")
    while not fresh.served:
        pool.service(session.join)
    assert a.own_calls == ["abandon_update"], "it was not even paused"
    assert fresh.served == [(1, 1)] and pool.ready() == [a, fresh]
    calls.clear()
    session.sync(2)
    assert a.served == [(1, 1), (2, 2)] and fresh.served == [(1, 1), (2, 2)]
    assert session._ranks.engines == [a, fresh]
    assert calls[:6] == ["close", *["abandon_update"] * 2, "connect", "prepare", "pause"]
    assert calls.count("connect") == 1, "the pause is as long as ever"
    first, of_fresh, _ = session._ranks.groups
    assert a.groups_left == [first, of_fresh]
    a.groups_left.clear()
    session.sync(3)
    monkeypatch.setattr("nanoslime.weight_sync.engine_pool._PAUSE_S", 60.0)
    pool.lost("b", "b hangs again")
    calls.clear()
    session.sync(4)
    assert a.groups_left == [session._ranks.groups[2]]
    order = [call for call in calls if call != "abandon_update"]
    assert order[:4] == ["close", "connect", "prepare", "pause"]


@pytest.mark.parametrize("transport", ["broadcast", "tensor", "disk"])
def test_an_engine_agrees_once_on_what_it_is_sent_before_anything_pauses(tmp_path, transport):
    calls: list[str] = []
    a, b = Engine("a", calls), Engine("b", calls, fails_at="agree")
    session = opened(tmp_path, transport, a, b, calls=calls)
    session.sync(1)
    session.sync(2)
    assert a.agreed == b.agreed == [[("w", "torch.float32", (2, 3))]]
    assert session._engines.ready() == [a] and b.own_calls.count("pause") == 0


def test_a_run_of_which_no_engine_agrees_ends_before_the_pause(tmp_path):
    calls: list[str] = []
    session = opened(tmp_path, "broadcast", Engine("a", calls, fails_at="agree"), calls=calls)
    with pytest.raises(EnginesFailed, match="engine a: it was loaded as torch.float16"):
        session.sync(1)
    assert calls == []


def test_an_engine_that_dies_as_the_group_is_formed_does_not_stall_the_others(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("nanoslime.weight_sync.engine_pool._PAUSE_S", 0.0)
    calls: list[str] = []
    a = Engine("a", calls)
    fresh = Engine("b", calls)
    session = opened(
        tmp_path,
        "broadcast",
        a,
        Engine("b", calls),
        calls=calls,
        restarts=[lambda: None, lambda: fresh],
    )
    pool = session._engines
    session.sync(1)
    pool.lost("b", "b hangs")
    while pool._places[1].came_up is None:
        threading.Event().wait(0.01)
    fresh.is_gone = True
    session.sync(2)
    assert a.served == [(1, 1), (2, 2)] and fresh.served == []
    assert session._ranks.engines == [a] and a.own_calls.count("pause") == 2


@pytest.mark.parametrize(
    ("b_says", "is_late", "gap"), [(-2.1, False, 0.1), (-3.0, False, 1.0), (-3.0, True, 0.0)]
)
def test_an_engine_alone_beyond_the_bound_is_lost_and_never_serves_again(
    tmp_path, b_says, is_late, gap
):
    """At once; or, where it has answered late, in the next sync."""
    calls: list[str] = []
    a, b = Engine("a", calls), Engine("b", calls)
    session = opened(tmp_path, "broadcast", a, b, calls=calls)
    session._probe = Probe([1, 2, 3], max_gap=0.3)
    may_answer = threading.Event()
    if not is_late:
        may_answer.set()

    def score(tokens: list[int]) -> tuple[list[float], int]:
        version = session._ranks.version
        assert may_answer.wait(10)
        return [-1.0, b_says], version

    a.score = lambda tokens: ([-1.0, -2.0], session._ranks.version)
    b.score = score
    metrics = session.sync(4)
    assert calls[:3] == ["prepare", "score", "pause"]
    assert metrics.keys() >= {"time/weight_sync_score_s", "time/weight_sync_probe_s"}
    assert metrics["weight_sync/logprob_gap_max"] == pytest.approx(gap)
    assert session._engines.ready() == ([a] if gap == 1.0 else [a, b])
    may_answer.set()
    session.sync(5)
    is_lost = b_says == -3.0
    assert session._engines.ready() == ([a] if is_lost else [a, b])
    assert len(b.served) == (1 if is_lost else 2)


def test_a_sync_waits_for_no_answer_where_engines_are_busy_and_a_look_finds_it(tmp_path):
    calls: list[str] = []
    a, b = Engine("a", calls), Engine("b", calls)
    session = opened(tmp_path, "broadcast", a, b, calls=calls)
    session._probe = Probe([1, 2, 3], max_gap=0.3, wait_s=0.0)
    may_answer = threading.Event()

    def score(tokens: list[int]) -> tuple[list[float], int]:
        assert may_answer.wait(10)
        return [-1.0, -3.0], 4

    a.score = lambda tokens: ([-1.0, -2.0], session._ranks.version)
    b.score = score
    assert session.sync(4)["time/weight_sync_probe_s"] < 0.4
    assert session._engines.ready() == [a, b]
    may_answer.set()
    session.look_at_probe()
    assert session._engines.ready() == [a]
    assert session.sync(5)["weight_sync/logprob_gap_max"] == pytest.approx(1.0)


def test_all_engines_beyond_the_bound_end_the_run_in_the_same_sync(tmp_path):
    calls: list[str] = []
    engines = [Engine(name, calls) for name in "ab"]
    session = opened(tmp_path, "broadcast", *engines, calls=calls)
    session._probe = Probe([1, 2, 3], max_gap=0.3)
    for engine in engines:
        engine.score = lambda tokens: ([-1.0, -9.0], 4)
    message = (
        "engine a gives 2 tokens .* by 3.5 in the mean and 7 at most.*gap is 0.3; engine b gives"
    )
    with pytest.raises(EnginesFailed, match=message):
        session.sync(4)
    assert session._engines.ready() == []


def test_an_engine_that_joins_is_probed_before_it_serves(tmp_path, monkeypatch):
    monkeypatch.setattr("nanoslime.weight_sync.engine_pool._PAUSE_S", 0.0)
    calls: list[str] = []
    a = Engine("a", calls)
    wrong, right = Engine("b", calls), Engine("b", calls)
    coming = iter([wrong, right])
    session = opened(
        tmp_path,
        "broadcast",
        a,
        Engine("b", calls),
        calls=calls,
        restarts=[lambda: None, lambda: next(coming)],
    )
    session.sync(1)
    session._probe = Probe([1, 2, 3], max_gap=0.3)
    wrong.score = lambda tokens: ([-1.0, -9.0], 1)
    right.score = lambda tokens: ([-1.0, -2.0], 1)
    told: list[list[Engine]] = []
    session._engines.subscribe(told.append, lambda: None)
    session._engines.lost("b", "b hangs")
    while len(session._engines.ready()) < 2:
        session._engines.service(session.join)
    assert all(wrong not in engines for engines in told) and told[-1] == [a, right]


def test_an_engine_that_dies_as_it_joins_is_lost_again_and_the_others_serve(tmp_path, monkeypatch):
    monkeypatch.setattr("nanoslime.weight_sync.engine_pool._PAUSE_S", 0.0)
    calls: list[str] = []
    a = Engine("a", calls)
    fresh = [Engine("b", calls, gone_at="send"), Engine("b", calls, fails_at="end_update")]
    fresh.append(Engine("b", calls))
    coming = iter(fresh)
    session = opened(
        tmp_path,
        "broadcast",
        a,
        Engine("b", calls),
        calls=calls,
        restarts=[lambda: None, lambda: next(coming)],
    )
    pool = session._engines
    session.sync(1)
    pool.lost("b", "b hangs")
    while len(pool.ready()) < 2:
        pool.service(session.join)
    assert [engine.served for engine in fresh] == [[], [], [(1, 1)]]
    assert pool.metrics() == {"engines/ready": 2, "engines/lost": 3, "engines/restarts": 3}


def test_an_engine_that_reports_another_version_is_lost(tmp_path):
    calls: list[str] = []
    engines = [Engine("a", calls), Engine("b", calls)]
    session = opened(tmp_path, "broadcast", *engines, calls=calls)
    engines[1].end_update = lambda version, flush: None
    session.sync(4)
    assert engines[1].served == [] and session._engines.ready() == engines[:1]


def test_a_sync_of_which_every_engine_reports_another_version_fails(tmp_path):
    calls: list[str] = []
    engines = [Engine("a", calls), Engine("b", calls)]
    session = opened(tmp_path, "broadcast", *engines, calls=calls)
    for engine in engines:
        engine.end_update = lambda version, flush: None
    with pytest.raises(RunError, match="engine b reports policy version 0 after the sync of 4"):
        session.sync(4)
    assert "resume" not in calls and session.version == -1


@pytest.mark.parametrize(
    ("transport", "has_engines", "deadline_s"),
    [("broadcast", True, 15.0), ("tensor", True, 15.0), ("disk", False, None)],
)
def test_ranks_are_told_of_their_engines_and_of_the_deadline(
    tmp_path, transport, has_engines, deadline_s
):
    """Files may take as long as a checkpoint, and only the driver talks to engines then."""
    calls: list[str] = []
    engine = Engine("a", calls)
    ranks = Ranks(calls, tmp_path)
    session = SyncSession(
        ranks,
        EnginePool([engine]),
        SeparateDevices(),
        transport=transport,
        directory=tmp_path,
        deadline_s=5.0,
    )
    session.open([[3, 4]])
    sender, side, _ = ranks.told["connect"]
    assert sender == TRANSPORTS[transport].sender
    engines = [engine] if has_engines else []
    ranks_of = [[3, 4]] if has_engines else []
    assert side == EngineSide(engines, ranks_of, "10.0.0.7", tmp_path, side.group)
    session.sync(2)
    assert ranks.told["prepare"] == (2, deadline_s)
    assert ranks.told.get("send", (2, True, deadline_s)) == (2, True, deadline_s)


def test_a_call_of_one_engine_that_is_late_or_fails_is_named():
    """The others may have answered, or answer in a while."""
    calls = EngineCalls([Engine("a", []), Engine("b", [])])
    waiting: Future[None] = Future()
    done: Future[None] = Future()
    done.set_result(None)
    with pytest.raises(EnginesFailed, match="engine b did not join within 0s") as late:
        calls.collect([done, waiting], "join", 0.01)
    assert [(name, f.is_gone) for name, f in late.value.failures.items()] == [("b", True)]
    failed: Future[None] = Future()
    failed.set_exception(EngineGone("engine a is dead"))
    threading.Timer(0.1, waiting.set_exception, [RunError("engine b lost its peer")]).start()
    with pytest.raises(EnginesFailed, match="engine a is dead; engine b lost its peer") as both:
        calls.collect([failed, waiting], "join", 30)
    assert [(name, f.is_gone) for name, f in both.value.failures.items()] == [
        ("a", True),
        ("b", False),
    ]
    calls.close()
