"""The producer over several rollout workers: who gets what, and what happens when one of them is
slow, dies, or is not there after a resume.
"""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoslime.rollout import producer as producer_module
from nanoslime.rollout.admission import Limits
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.producer import Producer, Recipe, Rollout, Serving, StopAsked
from nanoslime.rollout.tasks import FinishedGroup, GroupTask, Sampling, WorkerGone, WorkerNews
from nanoslime.types import Group, GroupReport, Prompt, RunError, SampleReport, Status
from tests.rollout import test_worker
from tests.rollout.test_worker import Gate, wait_for

open_worker = test_worker.open_worker  # the fixtures
engine = test_worker.engine
SAMPLING = Sampling(n_samples_per_prompt=2, max_new_tokens=6, temperature=0.7)


@dataclass
class Numbers:
    """Prompts 0, 1, 2 ... without an end."""

    position: int = 0

    def next(self, n: int) -> list[Prompt]:
        numbers = range(self.position, self.position + n)
        self.position += n
        return [Prompt(i, np.array([5, 6, i % 50], np.int32), f"{i}", "b") for i in numbers]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def make_task(prompt: Prompt, group_id: int) -> GroupTask:
    return GroupTask(group_id, prompt, SAMPLING, seed=group_id, reward="exact_match")


def report(task: GroupTask, version: int) -> GroupReport:
    sample = SampleReport(
        group_id=task.group_id,
        rollout_id=0,
        prompt_id=task.prompt.prompt_id,
        status=Status.COMPLETED,
        num_tokens=4,
        num_response_tokens=1,
        policy_versions=[(3, version)],
        loss_tokens_by_version={version: 1},
        expert_shape=None,
        arrays=None,
        reward=1.0,
    )
    return Group(task.group_id, [sample])


@dataclass(eq=False)
class ByHand:
    """A worker whose groups end when a test says so."""

    name: str
    version: int = 0
    started: list[int] = field(default_factory=list)
    running: dict[int, GroupTask] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    saved: list[list[int]] = field(default_factory=list)
    error: RunError | None = None
    _news: list[GroupReport] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def start(self, tasks: Sequence[GroupTask]) -> None:
        if self._is_lost():
            return
        self._check()
        self.started += [task.group_id for task in tasks]
        self.running |= {task.group_id: task for task in tasks}

    def end(self, *group_ids: int) -> None:
        with self._changed:
            self._news += [report(self.running.pop(n), self.version) for n in group_ids]
            self._changed.notify_all()

    def die(self) -> None:
        with self._changed:
            self.error = RunError(f"{self.name} died")
            self._changed.notify_all()

    def lose_node(self) -> None:
        with self._changed:
            self.running, self._news = {}, []
            self.error = WorkerGone(f"{self.name} is lost", ["its engine"])
            self._changed.notify_all()

    def come_back(self) -> None:
        self.error = None

    def save(self, path: Path) -> None:
        self._check()
        self.saved.append(sorted(self.running))

    def poll(self, timeout_s: float) -> WorkerNews:
        with self._changed:
            if self._is_lost():
                self._changed.wait(timeout_s)
            self._changed.wait_for(lambda: self._news or self.error, timeout_s)
            self._check()
            news, self._news = self._news, []
            return WorkerNews(news)

    def cancel(self, group_ids: Sequence[int]) -> None:
        self._check()
        self.cancelled += group_ids

    def finish_step(self, step: int, groups: Sequence[FinishedGroup]) -> None:
        if self._is_lost():
            return
        self._check()
        self.finished += [group.group_id for group in groups]

    def metrics(self) -> dict[str, float]:
        self._check()
        return {"rollout/generated_tokens": 1.0, f"of {self.name}": 2.0}

    def _is_lost(self) -> bool:
        return isinstance(self.error, WorkerGone)

    def _check(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def producer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes producers, and ends them before the workers that a test has opened before it."""
    monkeypatch.setattr(producer_module, "_POLL_S", 0.05)
    opened: list[Producer] = []

    def make(
        workers: Sequence[Any],
        source: Numbers | None = None,
        batch: int = 4,
        max_staleness: int = 0,
        must_stop: Any = lambda: None,
        has_versions: bool = True,
        lost: Any = lambda name, cause: None,
        max_replaced: int = 0,
        is_kept: Any = lambda group: True,
    ) -> Producer:
        serving = Serving(workers, lost, lambda: None, must_stop)
        limits = Limits(
            batch=batch,
            max_staleness=max_staleness,
            num_rollouts=1000,
            max_replaced=max_replaced,
        )
        recipe = Recipe(make_task, is_kept, has_versions)
        opened.append(Producer(limits, recipe, source or Numbers(), serving))
        return opened[-1]

    yield make
    for made in opened:
        made.close()


@dataclass
class Taking:
    """A take in a thread of its own, as the driver's main thread makes it."""

    producer: Producer
    version: int
    rollout: Rollout | None = None
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.rollout = self.producer.take(self.version)
        except (RunError, StopAsked) as e:
            self.error = e

    def group_ids(self) -> list[int]:
        self._thread.join(20)
        assert self.rollout is not None, self.error or "it still waits"
        return [group.group_id for group in self.rollout.groups]

    def fails(self, within_s: float) -> str:
        self._thread.join(within_s)
        assert self.error is not None, "it still waits"
        return str(self.error)


def loads(workers: Sequence[ByHand]) -> list[int]:
    return [len(worker.running) for worker in workers]


def test_each_prompt_goes_to_the_worker_with_the_least_to_do(producer: Any) -> None:
    workers = [ByHand("a"), ByHand("b"), ByHand("c")]
    made = producer(workers, batch=6, max_staleness=1)
    made.set_version(0)
    assert loads(workers) == [4, 4, 4]
    assert sorted(n for worker in workers for n in worker.started) == list(range(12))

    # One is fast, one slow, one makes nothing at all.
    fast, slow, stuck = workers
    fast.end(*list(fast.running))
    slow.end(*list(slow.running)[:2])
    taking = Taking(made, 0)
    first = taking.group_ids()
    assert len(first) == 6 and not set(first) & set(stuck.started)
    made.finish(0, taking.rollout.groups)
    assert sorted(fast.finished + slow.finished) == first and not stuck.finished
    made.set_version(1)
    assert loads(workers) == [4, 4, 4], "six more, where there was room"
    assert made.metrics() == {
        "rollout/generated_tokens": 3.0,
        **{f"of {name}": 2.0 for name in "abc"},
    }


def test_a_take_waits_for_a_slow_worker_only_when_its_groups_are_due(producer: Any) -> None:
    fast, slow = ByHand("fast"), ByHand("slow")
    made = producer([fast, slow], batch=2, max_staleness=1)
    made.set_version(0)
    late = list(slow.running)
    fast.end(*list(fast.running))
    first = Taking(made, 0)
    assert first.group_ids() == [0, 2] and late == [1, 3]
    made.finish(0, first.rollout.groups)
    made.set_version(1)
    fast.version = 1
    fast.end(*list(fast.running))
    second = Taking(made, 1)
    # Its tokens are of version 0, and the next take trains version 2.
    with pytest.raises(AssertionError, match="still waits"):
        second.fails(within_s=0.3)
    slow.end(*late)
    assert second.group_ids() == late


@pytest.mark.parametrize("when", ["while a take waits", "before", "as it is given a prompt"])
def test_a_worker_that_dies_ends_a_take_at_once_with_its_name(producer: Any, when: str) -> None:
    alive, dies = ByHand("alive"), ByHand("worker 1")
    made = producer([alive, dies], batch=4)
    if when == "as it is given a prompt":
        dies.error = RunError("worker 1 died")
        with pytest.raises(RunError, match="worker 1 died"):
            made.take(0)
        return
    if when == "before":
        made.set_version(0)
        dies.die()
    taking = Taking(made, 0)
    if when == "while a take waits":
        wait_for(lambda: len(dies.running) == 2)
        dies.die()
    begin = time.monotonic()
    assert taking.fails(within_s=5) == "worker 1 died"
    assert time.monotonic() - begin < 2
    # Neither the evaluation nor a stop hides it or waits for it.
    evaluation = GroupTask(-1, Numbers().next(1)[0], SAMPLING, 0, "exact_match", purpose="eval")
    with pytest.raises(RunError, match="worker 1 died"):
        made.evaluate([evaluation])
    made.halt()
    assert sorted(alive.cancelled) == sorted([*alive.started])


def test_the_groups_of_a_worker_that_is_lost_are_made_by_others_and_it_may_come_back(
    producer: Any,
) -> None:
    stays, goes = ByHand("stays"), ByHand("goes")
    told: list[tuple[str, str]] = []
    made = producer([stays, goes], batch=4, lost=lambda *what: told.append(what))
    taking = Taking(made, 0)
    wait_for(lambda: loads([stays, goes]) == [2, 2])
    finished, running = goes.started
    goes.end(finished)
    wait_for(lambda: made._held[finished].report is not None)
    goes.lose_node()
    wait_for(lambda: len(stays.running) == 4)
    assert set(stays.running) == {0, 1, 2, 3}, "what was finished has gone with it"
    assert stays.running[running].seed == running
    assert made.metrics()["of stays"] == 2.0 and "of goes" not in made.metrics()
    wait_for(lambda: told == [("its engine", "goes is lost")])
    stays.end(*list(stays.running))
    assert taking.group_ids() == [0, 1, 2, 3]
    made.finish(0, taking.rollout.groups)
    goes.come_back()
    wait_for(lambda: not made._gone)
    made.set_version(1)
    assert loads([stays, goes]) == [2, 2]
    assert told == [("its engine", "goes is lost")]


def test_a_report_that_a_lost_worker_has_sent_before_is_not_taken_for_the_group_made_again(
    producer: Any,
) -> None:
    """A checkpoint, say, may find the loss before the report has been heard."""
    stays, goes = ByHand("stays"), ByHand("goes")
    made = producer([stays, goes], batch=2)
    taking = Taking(made, 0)
    wait_for(lambda: loads([stays, goes]) == [1, 1])
    [lost] = goes.started
    late = report(goes.running[lost], 0)
    goes.lose_node()
    wait_for(lambda: lost in stays.running)
    with made._changed:
        made._hear(1, WorkerNews([late]))
        assert made._held[lost].report is None
    stays.end(0, 1)
    assert taking.group_ids() == [0, 1]


def test_a_group_of_an_evaluation_is_made_again_and_a_replaced_one_is_forgotten(
    producer: Any,
) -> None:
    stays, goes = ByHand("stays"), ByHand("goes")
    kept = [True]
    options = {"max_replaced": 4, "is_kept": lambda group: kept[0]}
    made = producer([goes, stays], batch=2, **options)
    made.set_version(0)
    assert goes.started == [0]
    kept[0] = False
    goes.end(0)
    wait_for(lambda: made._admission.replaced == [0] and goes.started == [0, 2])
    kept[0] = True
    evaluation = GroupTask(-1, Numbers().next(1)[0], SAMPLING, 0, "exact_match", purpose="eval")
    found: list[list[GroupReport]] = []
    thread = threading.Thread(target=lambda: found.append(made.evaluate([evaluation])))
    thread.start()
    wait_for(lambda: -1 in goes.running)
    goes.lose_node()
    wait_for(lambda: -1 in stays.running)
    stays.end(-1)
    thread.join(20)
    assert [group.group_id for group in found[0]] == [-1]
    assert set(made._held) == {1, 2} and made._admission.replaced == []


def test_a_checkpoint_holds_the_groups_of_a_worker_that_is_lost_while_it_is_written(
    producer: Any, tmp_path: Path
) -> None:
    """Also of one whose loss has not been heard of yet."""
    stays, goes = ByHand("stays"), ByHand("goes")
    made = producer([stays, goes], batch=4)
    made.set_version(0)
    with made._changed:
        goes.lose_node()
        state = made.save(tmp_path / "rollout")
    assert stays.saved == [[0, 2], [0, 1, 2, 3]]
    assert state["producer"]["num_files"] == 1
    assert sorted(map(int, state["producer"]["admission"]["oldest"])) == [0, 1, 2, 3]


def test_a_run_without_any_worker_left_ends(producer: Any) -> None:
    workers = [ByHand("a"), ByHand("b")]
    taking = Taking(producer(workers, batch=4), 0)
    wait_for(lambda: loads(workers) == [2, 2])
    for worker in workers:
        worker.lose_node()
    assert taking.fails(within_s=5) in ("a is lost", "b is lost")


def test_a_stop_ends_a_take_and_keeps_what_runs(producer: Any) -> None:
    reasons: list[str] = []
    worker = ByHand("a")
    made = producer([worker], must_stop=lambda: reasons[0] if reasons else None)
    taking = Taking(made, 0)
    wait_for(lambda: len(worker.running) == 4)
    worker.end(0)
    reasons.append("the time is up")
    assert taking.fails(within_s=5) == "the time is up"
    assert len(worker.running) == 3 and not worker.cancelled
    reasons.clear()
    worker.end(1, 2, 3)
    assert Taking(made, 0).group_ids() == [0, 1, 2, 3]


def tokens(groups: Sequence[GroupReport]) -> dict[int, list[list[int]]]:
    return {
        group.group_id: [sample.arrays.token_ids.tolist() for sample in group.samples]
        for group in groups
    }


@pytest.mark.parametrize("num_after", [2, 4])
def test_what_three_workers_saved_goes_on_with_fewer_or_more(
    open_worker: Any, producer: Any, engine: EmbeddedEngine, tmp_path: Path, num_after: int
) -> None:
    """Every prompt once, and the same samples as of a run with one worker."""

    def made(engines: Sequence[Any], source: Numbers | None = None) -> Producer:
        # The engine's weights stay those of version 0.
        workers = [open_worker(engines=[one], record="none") for one in engines]
        return producer(workers, source, batch=5, max_staleness=1, has_versions=False)

    def three_rollouts(of: Producer) -> dict[int, list[list[int]]]:
        found: dict[int, list[list[int]]] = {}
        for step in range(3):
            groups = of.take(step).groups
            assert not found.keys() & tokens(groups).keys()
            found |= tokens(groups)
            of.finish(step, groups)
        return found

    expected = three_rollouts(made([engine]))
    gates = [Gate(engine) for _ in range(3)]
    saved = made(gates)
    saved.set_version(0)
    wait_for(lambda: [gate.num_waiting for gate in gates] == [8, 6, 6])
    gates[0].let_through = 3  # samples: a group and a half of the first worker's
    gates[1].is_open = True
    wait_for(lambda: sum(held.report is not None for held in saved._held.values()) == 4)
    state = json.loads(json.dumps(saved.save(tmp_path / "rollout")))
    assert state["producer"]["num_files"] == 3 and state["prompts"] == {"position": 10}

    after = made([Gate(engine) for _ in range(num_after)], Numbers(position=10))
    after.load(tmp_path / "rollout", state["producer"])
    assert {held.worker for held in after._held.values()} == set(range(min(3, num_after)))
    for worker in after.serving.workers:
        worker.set_engines([engine])
    assert three_rollouts(after) == expected
