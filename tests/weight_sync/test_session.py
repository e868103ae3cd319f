"""The order of a sync, and where it stops when an engine or a rank fails: nobody serves a
mixture.
"""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from nanoslime.orchestration.devices import SeparateDevices, SharedDevices
from nanoslime.types import RunError
from nanoslime.weight_sync.engine_calls import EngineCalls
from nanoslime.weight_sync.session import State, SyncSession
from nanoslime.weight_sync.transport import TRANSPORTS, EngineSide


class Engine:
    """Keeps what it is told, in a list that it shares with the ranks.

    As a server does, it refuses the end of an update that was not begun, or whose tensors have
    not come.
    """

    def __init__(self, name: str, calls: list[str], fails_at: str = ""):
        self.name = name
        self.label = 0
        self._calls = calls
        self._fails_at = fails_at

    def _told(self, call: str) -> None:
        self._calls.append(call)
        if call == self._fails_at:
            raise RunError(f"engine {self.name}: {call} refused")

    def pause(self) -> None:
        self._told("pause")

    def resume(self) -> None:
        self._told("resume")

    def begin_update(self) -> None:
        self._told("begin_update")

    def end_update(self, version: int) -> None:
        calls = ["", *self._calls]
        last_begin = len(calls) - 1 - calls[::-1].index("begin_update")
        if "send" not in calls[last_begin:]:
            raise RunError(f"engine {self.name}: end_update before the tensors of {version}")
        self._told("end_update")
        self.label = version

    def update_weights_from_disk(self, path: str, version: int) -> None:
        assert Path(path).is_dir()
        self._told("update_weights_from_disk")
        self.label = version

    def policy_version(self) -> int:
        self._told("policy_version")
        return self.label

    def release_memory(self) -> None:
        self._told("release_memory")

    def resume_memory(self, part: str) -> None:
        self._told(f"resume_memory {part}")


class Ranks:
    address = "10.0.0.7"

    def __init__(self, calls: list[str], directory: Path, fails_at: str = ""):
        self.told: dict[str, tuple[Any, ...]] = {}  # arguments and deadline by method
        self._calls = calls
        self._directory = directory
        self._fails_at = fails_at

    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> None:
        self._calls.append(method)
        self.told[method] = (*args, deadline_s)
        if method == self._fails_at:
            raise RunError(f"trainer rank 1 died while asked to {what}")
        if method == "send":
            (self._directory / f"version_{args[0]}").mkdir(exist_ok=True)


def opened(
    tmp_path: Path, transport: str, *engines: Engine, calls: list[str], rank_fails_at: str = ""
) -> SyncSession:
    ranks = Ranks(calls, tmp_path, rank_fails_at)
    session = SyncSession(
        ranks,
        EngineCalls(engines),
        SeparateDevices(),
        transport=transport,
        directory=tmp_path,
        deadline_s=5.0,
    )
    session.open([[0]])
    calls.clear()
    return session


@pytest.mark.parametrize("transport", ["broadcast", "tensor"])
def test_buckets_go_between_begin_and_end_while_the_engines_are_paused(tmp_path, transport):
    calls: list[str] = []
    engine = Engine("a", calls)
    session = opened(tmp_path, transport, engine, calls=calls)
    times = session.sync(3)
    assert calls == ["pause", "begin_update", "send", "end_update", "policy_version", "resume"]
    assert (session.version, session.state, engine.label) == (3, State.IDLE, 3)
    assert times["time/weight_sync_s"] >= 0


def test_files_are_written_before_the_pause_and_removed_after_the_load(tmp_path):
    calls: list[str] = []
    session = opened(tmp_path, "disk", Engine("a", calls), calls=calls)
    session.sync(3)
    assert calls == ["send", "pause", "update_weights_from_disk", "policy_version", "resume"]
    assert list(tmp_path.iterdir()) == []


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
    engines = EngineCalls([Engine("a", calls)])
    ranks = Ranks(calls, tmp_path)
    devices = SharedDevices(ranks, engines)
    session = SyncSession(
        ranks, engines, devices, transport="tensor", directory=tmp_path, deadline_s=5.0
    )
    session.open([[0]])
    calls.clear()
    assert session.sync(1).keys() == {"time/weight_sync_s", "time/sleep_s"}
    update = ["begin_update", "send", "end_update"]
    turn = ["resume_memory weights", *update, "sleep", "resume_memory cache"]
    assert calls == ["pause", *turn, "policy_version", "resume"]
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


@pytest.mark.parametrize("call", ["begin_update", "end_update"])
def test_an_engine_that_fails_keeps_its_label_and_no_engine_goes_on(tmp_path, call):
    calls: list[str] = []
    engines = [Engine("a", calls), Engine("b", calls, fails_at=call)]
    session = opened(tmp_path, "broadcast", *engines, calls=calls)
    with pytest.raises(RunError, match=f"engine b: {call} refused"):
        session.sync(4)
    assert "resume" not in calls and engines[1].label == 0
    with pytest.raises(
        RunError, match="version 5 cannot be sent: the sync .* while it was sending"
    ):
        session.sync(5)


def test_after_an_engine_that_was_not_paused_no_sync_goes_on(tmp_path):
    calls: list[str] = []
    engines = [Engine("a", calls), Engine("b", calls, fails_at="pause")]
    session = opened(tmp_path, "broadcast", *engines, calls=calls)
    with pytest.raises(RunError, match="engine b: pause refused"):
        session.sync(4)
    assert "begin_update" not in calls and "resume" not in calls
    with pytest.raises(RunError, match="version 5 cannot be sent: .* while it was paused"):
        session.sync(5)


def test_an_engine_with_another_label_is_named(tmp_path):
    calls: list[str] = []
    engines = [Engine("a", calls), Engine("b", calls)]
    session = opened(tmp_path, "broadcast", *engines, calls=calls)
    engines[1].end_update = lambda version: None
    with pytest.raises(RunError, match="engine b reports policy version 0 after the sync of 4"):
        session.sync(4)
    assert "resume" not in calls and session.version == -1


@pytest.mark.parametrize(
    ("transport", "has_engines", "deadline_s"),
    [("broadcast", True, 5.0), ("tensor", True, 5.0), ("disk", False, None)],
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
        EngineCalls([engine]),
        SeparateDevices(),
        transport=transport,
        directory=tmp_path,
        deadline_s=5.0,
    )
    session.open([[3, 4]])
    sender, side, _ = ranks.told["connect"]
    assert sender == TRANSPORTS[transport].sender
    assert side == EngineSide([engine] if has_engines else [], [[3, 4]], "10.0.0.7", tmp_path)
    session.sync(2)
    assert ranks.told["send"] == (2, deadline_s)


def test_a_call_of_one_engine_that_is_late_is_named():
    """The others may have answered."""
    calls = EngineCalls([Engine("a", []), Engine("b", [])])
    waiting: Future[None] = Future()
    done: Future[None] = Future()
    done.set_result(None)
    with pytest.raises(RunError, match="engine b did not join within 0s"):
        calls.collect([done, waiting], "join", 0.01)
    calls.close()
