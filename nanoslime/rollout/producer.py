"""Keeps the rollout workers busy, as far as the bound on staleness allows, and hands out
rollouts to train on.

    prompts -> Admission -> GroupTask -> worker with the least to do
                    take <- GroupReport <- one polling thread per worker

There is no loop of its own: prompts are admitted when something has happened, by the thread that
tells of it. The caller of `take` and `evaluate` waits, and does in the meantime what only its
thread may do.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoslime.processes.phases import DRIVER, own_report
from nanoslime.rollout.admission import Admission, Cancelled, Limits, Taken
from nanoslime.rollout.prompts import PromptStream
from nanoslime.rollout.tasks import (
    FinishedGroup,
    GroupTask,
    RestoredGroup,
    Worker,
    WorkerGone,
    WorkerNews,
)
from nanoslime.types import GroupReport, Prompt, RunError, Status

# A worker is asked for news for so long, and a waiting caller looks up so often.
_POLL_S = 0.5
_LOOK_S = 0.1
# So often it looks whether the run is told to stop, which may read a network filesystem.
_STOP_LOOK_S = 1.0
_END_S = 30.0


class StopAsked(Exception):
    """The run is told to stop, for the reason that is the message."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What samples and scores for a run, and what the caller of `take` does while it waits."""

    workers: Sequence[Worker]
    # Hears the name of an engine that a worker has found dead, and the cause.
    lost: Callable[[str, str], None]
    # Brings engines back, where it is time for it; whether it waits for one. Raises RunError where
    # none is left.
    service: Callable[[], bool]
    # Why the run has to stop, if it has to.
    must_stop: Callable[[], str | None] = lambda: None


@dataclass(frozen=True, slots=True)
class Recipe:
    """What makes tasks of prompts, and judges what comes back."""

    make_task: Callable[[Prompt, int], GroupTask]  # of a prompt and the group's number
    is_kept: Callable[[GroupReport], bool]  # whether the filters leave anything of it
    # Whether engines have weights of the training's versions; else tokens do not age.
    has_versions: bool = True
    # Whether a group that was interrupted begins anew instead of going on: the engine then
    # draws the same samples again, bit for bit.
    restarts: bool = False


@dataclass(frozen=True, slots=True)
class Rollout:
    """What a take gives: all groups in order, those that no filter lets through included."""

    groups: list[GroupReport]
    taken: Taken


@dataclass(slots=True)
class _Held:
    """A group between its start on a worker and its rollout."""

    task: GroupTask
    worker: int
    report: GroupReport | None = None


@dataclass(slots=True)
class Producer:
    limits: Limits
    recipe: Recipe
    source: PromptStream
    serving: Serving
    _admission: Admission = field(init=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False)
    _held: dict[int, _Held] = field(default_factory=dict, init=False)
    # Whether prompts may be admitted: from the first weights until the end.
    _is_open: bool = field(default=False, init=False)
    _lost: dict[str, str] = field(default_factory=dict, init=False)
    # The numbers of workers that are lost.
    _gone: set[int] = field(default_factory=set, init=False)
    _failure: BaseException | None = field(default=None, init=False)
    _closed: bool = field(default=False, init=False)
    _threads: list[threading.Thread] = field(default_factory=list, init=False)
    _next_look: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._admission = Admission(self.limits)
        for number, worker in enumerate(self.serving.workers):
            name = f"news of {worker.name}"
            thread = threading.Thread(target=self._listen, args=(number,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def set_version(self, version: int) -> None:
        """The engines have the weights after `version` rollouts: prompts are admitted."""
        with self._changed:
            self._is_open = True
            self._cancel(self._admission.set_version(version))
            self._feed()

    def take(self, version: int) -> Rollout:
        """Waits for the groups of the next rollout, which trains these weights.

        Raises StopAsked, and the error of a worker or a pool that cannot go on.
        """
        self.set_version(version)
        taken = self._wait_for(self._next, "generate")
        with self._changed:
            groups = [self._report(group_id) for group_id in taken.group_ids]
        return Rollout(groups, taken)

    def finish(self, step: int, groups: Sequence[GroupReport]) -> None:
        """Has the workers record these groups, which `take` gave, as those of rollout
        `step`, and let them go."""
        with self._changed:
            for number, worker in enumerate(self.serving.workers):
                own = [group for group in groups if self._held[group.group_id].worker == number]
                finished = [
                    FinishedGroup(group.group_id, [sample.advantage for sample in group.samples])
                    for group in own
                ]
                worker.finish_step(step, finished)
            for group in groups:
                del self._held[group.group_id]

    def evaluate(self, tasks: Sequence[GroupTask]) -> list[GroupReport]:
        """Waits for these groups alone, in order; training groups go on beside them.

        The numbers of their groups are negative. Raises what `take` raises.
        """
        group_ids = [task.group_id for task in tasks]
        with self._changed:
            self._start(tasks)

        def finished() -> list[GroupReport] | None:
            reports = [self._held[group_id].report for group_id in group_ids]
            found = [report for report in reports if report is not None]
            return found if len(found) == len(reports) else None

        try:
            return self._wait_for(finished, "evaluate")
        finally:
            with self._changed:
                self._drop(group_ids)

    def metrics(self) -> dict[str, float]:
        """What the workers have counted since they were asked the last time."""
        found: dict[str, float] = {}
        for worker in self.serving.workers:
            with suppress(WorkerGone):
                for name, value in worker.metrics().items():
                    found[name] = found.get(name, 0.0) + value
        return found

    def save(self, directory: Path) -> dict[str, Any]:
        """Writes the groups that run or wait into `directory`, which is made where there are
        any; returns what `load` and the source need beside it, as of the same moment."""
        with self._changed:
            num_files = 0
            if any(group_id >= 0 for group_id in self._held):
                directory.mkdir()
                num_files = self._save_workers(directory)
            state = {"num_files": num_files, "admission": self._admission.state_dict()}
            return {"producer": state, "prompts": self.source.state_dict()}

    def _save_workers(self, directory: Path) -> int:
        """Returns how many wrote a file. Where one is lost, the others have its groups, and write
        theirs once more.
        """
        working = self._working()
        for place, number in enumerate(working):
            try:
                self.serving.workers[number].save(directory / f"{place}.npz")
            except WorkerGone as gone:
                self._lose(number, gone)
                return self._save_workers(directory)
        return len(working)

    def load(self, directory: Path, state: dict[str, Any]) -> None:
        """Goes on with what `save` wrote and, as "producer", returned. The workers may be more or
        fewer than then.
        """
        with self._changed:
            self._admission.load_state_dict(state["admission"])
            for number in range(state["num_files"]):
                place = number % len(self.serving.workers)
                for restored in self.serving.workers[place].load(directory / f"{number}.npz"):
                    self._restore(place, restored)
            missing = self._admission.groups.keys() - self._held.keys()
            if missing:
                raise RunError(f"{directory} lacks groups {sorted(missing)} of driver.json")

    def halt(self) -> None:
        """Ends what runs, so that engines and trainer may share devices again; for a run that
        stops, after `save`."""
        with self._changed:
            self._is_open = False
            self._drop(list(self._held))

    def close(self) -> None:
        """Ends the threads; the workers stay."""
        self._closed = True
        for thread in self._threads:
            thread.join(_END_S)

    def _listen(self, number: int) -> None:
        try:
            while not self._closed:
                try:
                    news = self.serving.workers[number].poll(_POLL_S)
                except WorkerGone as gone:
                    with self._changed:
                        self._lose(number, gone)
                    continue
                with self._changed:
                    self._gone.discard(number)
                    self._hear(number, news)
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _hear(self, number: int, news: WorkerNews) -> None:
        if not news.groups and not news.lost:
            return
        for report in news.groups:
            self._arrived(number, report)
        self._lost |= news.lost
        self._feed()
        self._changed.notify_all()

    def _working(self) -> list[int]:
        return [number for number in range(len(self.serving.workers)) if number not in self._gone]

    def _lose(self, number: int, gone: WorkerGone) -> None:
        """Others make the groups anew that a worker held.

        Those that a take has given stay: the trainer may have their arrays.
        """
        if number in self._gone:
            return
        if self._working() == [number]:
            raise gone
        self._gone.add(number)
        self._lost |= dict.fromkeys(gone.engines, str(gone))
        again = []
        for group_id, held in list(self._held.items()):
            if held.worker != number:
                continue
            if group_id in self._admission.replaced:
                self._admission.replaced.remove(group_id)
                del self._held[group_id]
            elif held.task.purpose == "eval" or self._admission.lose(group_id):
                again.append(held.task)
        self._start(again)
        self._changed.notify_all()

    def _arrived(self, number: int, report: GroupReport) -> None:
        held = self._held.get(report.group_id)
        if held is None or held.worker != number:
            return  # it was cancelled meanwhile, or another worker makes it since this one was lost
        held.report = report
        if held.task.purpose == "eval":
            return
        versions = [version for sample in report.samples for _, version in sample.policy_versions]
        oldest = min(versions, default=None) if self.recipe.has_versions else None
        self._admission.finish(
            report.group_id,
            oldest,
            is_kept=self.recipe.is_kept(report),
            has_failed=all(sample.status is Status.ERROR for sample in report.samples),
        )

    def _wait_for[T](self, found: Callable[[], T | None], phase: str) -> T:
        """What `found` gives; it is asked again whenever something has happened.

        That is the `phase` of the driver, which begins anew with an engine that is brought back.
        """
        since = time.monotonic()
        while True:
            with self._changed:
                if self._failure is not None:
                    raise self._failure
                result = found()
                if result is not None:
                    return result
                self._changed.wait(_LOOK_S)
                lost, self._lost = self._lost, {}
            for name, cause in lost.items():
                self.serving.lost(name, cause)
            if self.serving.service():
                since = time.monotonic()
            self._check_stop(phase, since)

    def _check_stop(self, phase: str, since: float) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _STOP_LOOK_S
        own_report().enter(DRIVER, phase, since)
        reason = self.serving.must_stop()
        if reason:
            raise StopAsked(reason)

    def _next(self) -> Taken | None:
        taken = self._admission.take()
        if taken is None:
            self._cancel(self._admission.cancel_overdue())
        self._feed()
        return taken

    def _report(self, group_id: int) -> GroupReport:
        report = self._held[group_id].report
        assert report is not None, "a take holds finished groups only"
        return report

    def _feed(self) -> None:
        """Starts as many prompts as there is room for."""
        if not self._is_open:
            return
        prompts = self.source.next(self._admission.room())
        self._start([self.recipe.make_task(prompt, self._admission.admit()) for prompt in prompts])

    def _start(self, tasks: Sequence[GroupTask]) -> None:
        """Each task goes to the worker with the fewest samples to make."""
        load = [0] * len(self.serving.workers)
        working = self._working()
        for held in self._held.values():
            if held.report is None:
                load[held.worker] += held.task.sampling.n_samples_per_prompt
        by_worker: list[list[GroupTask]] = [[] for _ in self.serving.workers]
        for task in tasks:
            number = min(working, key=load.__getitem__)
            load[number] += task.sampling.n_samples_per_prompt
            by_worker[number].append(task)
            self._held[task.group_id] = _Held(task, number)
        for worker, own in zip(self.serving.workers, by_worker, strict=True):
            if own:
                worker.start(own)

    def _cancel(self, cancelled: Sequence[Cancelled]) -> None:
        """Ends these groups, and starts those that take their place."""
        again = []
        for gone in cancelled:
            if gone.again is not None:
                prompt = self._held[gone.group_id].task.prompt
                again.append(self.recipe.make_task(prompt, gone.again))
        self._drop([gone.group_id for gone in cancelled])
        self._start(again)

    def _drop(self, group_ids: Sequence[int]) -> None:
        for group_id in group_ids:
            held = self._held.pop(group_id, None)
            if held is not None:
                with suppress(RunError):  # a dead worker says so to its thread
                    self.serving.workers[held.worker].cancel([group_id])

    def _restore(self, place: int, restored: RestoredGroup) -> None:
        task = restored.task
        worker = self.serving.workers[place]
        is_known = task.group_id in (*self._admission.groups, *self._admission.replaced)
        if not is_known:
            worker.cancel([task.group_id])
            return
        self._held[task.group_id] = _Held(task, place)
        if restored.report is not None:
            self._arrived(place, restored.report)
        elif self.recipe.restarts:
            worker.cancel([task.group_id])
            worker.start([task])
