"""A rollout worker: runs groups of rollouts, scores them, and keeps their samples.

    GroupTask -> n x environment.run(prompt, policy) -> scorer -> GroupReport

All of it happens in one event loop in a thread of its own, which lives as long as the worker.
The calls of the driver come in from other threads.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from nanoslime.failures import summary
from nanoslime.models.shape import ModelShape
from nanoslime.processes.phases import IDLE, own_report
from nanoslime.rollout import environments, worker_state
from nanoslime.rollout.policy import Call, Policy, ServedModel
from nanoslime.rollout.recorder import Recorder, Recording
from nanoslime.rollout.rewards.scorer import Scorer
from nanoslime.rollout.router import Router
from nanoslime.rollout.sample_builder import SampleBuilder
from nanoslime.rollout.tasks import (
    FinishedGroup,
    GroupTask,
    Purpose,
    RestoredGroup,
    Sampling,
    WorkerNews,
    WorkerSetup,
)
from nanoslime.types import (
    Engine,
    GroupReport,
    KeptArrays,
    RunError,
    Sample,
    SampleArrays,
    SampleGroup,
    Status,
)

logger = logging.getLogger(__name__)

# An event loop that comes to nothing for so long is blocked; whoever asks it over Ray waits a
# little longer. Once that has been told, nobody waits for it again.
_PATIENCE_S = 100.0
_PATIENCE_ONCE_BLOCKED_S = 1.0
_ALIVE_S = 1.0


@dataclass(eq=False, slots=True)
class Rollout:
    """One rollout of a group: its requests so far, then its scored samples."""

    transcript: list[Call] = field(default_factory=list)
    policy: Policy | None = None  # while the environment runs
    samples: list[Sample] | None = None


@dataclass(eq=False, slots=True)
class Held:
    """A group that is being sampled, or that was and is kept until training is done with it."""

    task: GroupTask
    rollouts: list[Rollout]
    running: asyncio.Task[None] | None = None

    @property
    def samples(self) -> list[Sample]:
        return list(itertools.chain.from_iterable(one.samples or [] for one in self.rollouts))


class RolloutWorker:
    """A `nanoslime.rollout.tasks.Worker` in this process.

    Groups of evaluations are forgotten once they are reported; those of training stay until
    `finish_step` or `cancel`. Raises RunError where the environment or the reward cannot be
    loaded.
    """

    def __init__(self, setup: WorkerSetup, *, keeps_arrays: bool = False) -> None:
        """`keeps_arrays` says that reports have KeptArrays, which `arrays` resolves."""
        config = setup.config
        rollout = config.rollout
        self.name = f"rollout worker {setup.index}"
        self._index = setup.index
        self._keeps_arrays = keeps_arrays
        self._environment = environments.make(rollout.environment, rollout.environment_options)
        self._environment_timeout_s = rollout.environment_timeout_s
        self._scorer = Scorer(config.data)
        self._router = Router(max_inflight=rollout.max_inflight)
        tokenizer = AutoTokenizer.from_pretrained(
            setup.model_dir, trust_remote_code=config.model.trust_remote_code
        )
        shape = ModelShape.read(setup.model_dir)
        self._model = ServedModel.of(config, self._router, tokenizer, shape)
        recording = Recording(
            directory=setup.rollouts,
            settings=Sampling.of(rollout),
            mode=rollout.record,
            keep=rollout.record_keep,
            worker=setup.index,
            num_workers=setup.num_workers,
        )
        self._recorder = Recorder(recording)
        # Rollouts that may run at once; the others wait in the order of their groups. Those of
        # an evaluation do not wait for those of training.
        num_slots = rollout.max_inflight * setup.num_engines
        self._slots: dict[Purpose, asyncio.Semaphore] = {
            "train": asyncio.Semaphore(num_slots),
            "eval": asyncio.Semaphore(num_slots),
        }
        self._held: dict[int, Held] = {}
        # The samples of the last step that was finished, by group: it is being trained on.
        self._finished: dict[int, list[Sample]] = {}
        self._counted: dict[str, float] = {}
        # Guards the news, for which `poll` waits.
        self._changed = threading.Condition()
        self._reports: list[GroupReport] = []
        # Groups that the loop has still to hear of; they are not reported.
        self._cancelled: set[int] = set()
        self._failure: Exception | None = None
        # A full collection walks the half a million objects of torch and transformers, which
        # takes 0.2 s in every other rollout, and no request goes on meanwhile. So it leaves
        # out what this process has by now.
        gc.freeze()
        self._patience_s = _PATIENCE_S
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=self.name, daemon=True)
        self._thread.start()
        self._soon(self._tell_alive)

    def start(self, tasks: Sequence[GroupTask]) -> None:
        for task in tasks:
            rollouts = [Rollout() for _ in range(task.sampling.n_samples_per_prompt)]
            self._soon(self._begin, Held(task, rollouts))

    def poll(self, timeout_s: float) -> WorkerNews:
        with self._changed:
            self._changed.wait_for(self._has_news, timeout_s)
            if self._failure is not None:
                raise RunError(f"{self.name} failed: {summary(self._failure)}") from self._failure
            found = self._reports
            self._reports = []
        self._recorder.check()
        return WorkerNews(found, self._in_loop(self._take_lost()))

    def cancel(self, group_ids: Sequence[int]) -> None:
        gone = set(group_ids)
        with self._changed:
            self._cancelled |= gone
            self._reports = [one for one in self._reports if one.group_id not in gone]
        self._soon(self._cancel, gone)

    def finish_step(self, step: int, groups: Sequence[FinishedGroup]) -> None:
        self._soon(self._finish_step, step, list(groups))

    def arrays(self, kept: Sequence[KeptArrays]) -> list[SampleArrays]:
        """The arrays of samples of the step that was finished last."""
        return self._in_loop(self._arrays(kept))

    def set_engines(self, engines: Sequence[Engine]) -> None:
        self._soon(self._router.set_engines, list(engines))

    def drain(self) -> None:
        self._soon(self._router.drain)

    def save(self, path: Path) -> None:
        worker_state.write(path, self._in_loop(self._state()))

    def load(self, path: Path) -> list[RestoredGroup]:
        return self._in_loop(self._restore(worker_state.read(path)))

    def metrics(self) -> dict[str, float]:
        return self._in_loop(self._take_metrics())

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._in_loop(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        own_report().enter(self.name, IDLE)
        self._recorder.close()
        gc.unfreeze()

    # The rest runs in the event loop, except where it says so.

    def _soon(self, function: Callable[..., None], *args: Any) -> None:
        """Called from other threads: `function` runs in the loop, in the order of the calls."""

        def call() -> None:
            try:
                function(*args)
            except Exception as e:
                self._fail(e)

        self._loop.call_soon_threadsafe(call)

    def _in_loop(self, coroutine: Any) -> Any:
        """Called from other threads: the result of the coroutine.

        Raises RunError where the loop does not come to it, because something blocks it.
        """
        has_begun = threading.Event()

        async def run() -> Any:
            has_begun.set()
            return await coroutine

        call = asyncio.run_coroutine_threadsafe(run(), self._loop)
        if not has_begun.wait(self._patience_s):
            call.cancel()
            coroutine.close()
            waited_s = self._patience_s
            self._patience_s = _PATIENCE_ONCE_BLOCKED_S
            raise RunError(
                f"{self.name} has done nothing for {waited_s:g} s, because its event loop is "
                f"blocked at {self._whereabouts()}; what blocks belongs into asyncio.to_thread"
            )
        return call.result()

    def _whereabouts(self) -> str:
        """The innermost lines at which the event loop is, the caller's first."""
        frame = sys._current_frames()[self._thread.ident or 0]
        innermost = traceback.extract_stack(frame)[-3:]
        return " > ".join(f"{line.filename}:{line.lineno}" for line in innermost)

    def _tell_alive(self) -> None:
        """Says in this process's report, again and again, that the loop is not blocked."""
        own_report().enter(self.name, "serve")
        self._loop.call_later(_ALIVE_S, self._tell_alive)

    def _has_news(self) -> bool:
        return bool(self._reports or self._failure)

    def _fail(self, error: Exception) -> None:
        """Tells the driver of a fault of the worker's own."""
        logger.error("%s failed", self.name, exc_info=error)
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def _begin(self, held: Held) -> None:
        self._held[held.task.group_id] = held
        held.running = self._loop.create_task(self._run_group(held))

    async def _run_group(self, held: Held) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for index, rollout in enumerate(held.rollouts):
                    if rollout.samples is None:
                        group.create_task(self._run_rollout(held.task, index, rollout))
            report = self._report(held)
        except Exception as e:
            self._fail(e)
            return
        held.running = None
        if held.task.purpose == "eval":
            self._held.pop(held.task.group_id, None)
        with self._changed:
            if report.group_id not in self._cancelled:
                self._reports.append(report)
            self._changed.notify_all()

    async def _run_rollout(self, task: GroupTask, index: int, rollout: Rollout) -> None:
        """Sets the samples of `rollout`, scored. Nothing that goes wrong with them ends the run."""
        async with self._slots[task.purpose]:
            policy = Policy(task, index, self._model, rollout.transcript)
            rollout.policy = policy
            try:
                async with policy.time_limit(self._environment_timeout_s):
                    samples = await self._environment(task.prompt, policy)
                if not samples:
                    raise ValueError("it gave no sample")
                for sample in samples:
                    sample.group_id = policy.group_id
                    sample.rollout_id = policy.rollout_id
                    sample.metadata = {**sample.metadata, "prompt_id": task.prompt.prompt_id}
                    sample.check()
            except (Exception, SystemExit) as e:
                logger.debug("group %d: the environment failed", task.group_id, exc_info=e)
                cause = f"the environment failed with {summary(e)}"
                samples = [SampleBuilder(task.prompt, policy).build(Status.ERROR, cause)]
        begin = self._loop.time()
        await self._scorer.score(samples, task.prompt, task.reward)
        self._count("time/score_s", self._loop.time() - begin)
        tokens = sum(sample.num_response_tokens for sample in samples)
        if task.purpose == "train":
            self._count("rollout/generated_tokens", tokens)
        rollout.transcript = []
        rollout.policy = None
        rollout.samples = samples

    def _report(self, held: Held) -> GroupReport:
        """What the driver is told of a finished group."""
        group_id = held.task.group_id
        reports = []
        for index, sample in enumerate(held.samples):
            kept = KeptArrays(self._index, group_id, index)
            reports.append(sample.report(kept if self._keeps_arrays else sample.arrays))
        return GroupReport(group_id, reports)

    def _cancel(self, gone: set[int]) -> None:
        for group_id in gone:
            held = self._held.pop(group_id, None)
            if held is not None and held.running is not None:
                held.running.cancel()
        with self._changed:
            self._cancelled -= gone

    def _finish_step(self, step: int, groups: Sequence[FinishedGroup]) -> None:
        finished = []
        self._finished = {}
        for group in groups:
            samples = self._held.pop(group.group_id).samples
            for sample, advantage in zip(samples, group.advantages, strict=True):
                sample.advantage = advantage
            finished.append(SampleGroup(group.group_id, samples))
            if self._keeps_arrays:
                self._finished[group.group_id] = samples
        self._recorder.record(step, finished)

    async def _arrays(self, kept: Sequence[KeptArrays]) -> list[SampleArrays]:
        return [self._finished[one.group_id][one.index].arrays for one in kept]

    async def _state(self) -> list[worker_state.SavedGroup]:
        """The training groups with the tokens that they have."""
        await self._router.interrupt()
        groups = []
        for held in self._held.values():
            if held.task.purpose == "train":
                rollouts = [self._saved(rollout) for rollout in held.rollouts]
                groups.append(worker_state.SavedGroup(held.task, rollouts))
        return groups

    def _saved(self, rollout: Rollout) -> worker_state.SavedRollout:
        policy = rollout.policy
        transcript = rollout.transcript if policy is None else policy.transcript
        return worker_state.SavedRollout(transcript, rollout.samples)

    async def _restore(self, groups: Sequence[worker_state.SavedGroup]) -> list[RestoredGroup]:
        restored = []
        for saved in groups:
            rollouts = [Rollout(one.transcript, samples=one.samples) for one in saved.rollouts]
            held = Held(saved.task, rollouts)
            report = None
            if all(rollout.samples is not None for rollout in rollouts):
                self._held[saved.task.group_id] = held
                report = self._report(held)
            else:
                self._begin(held)
            restored.append(RestoredGroup(saved.task, report))
        return restored

    async def _take_lost(self) -> dict[str, str]:
        return self._router.take_lost()

    async def _take_metrics(self) -> dict[str, float]:
        counted = self._counted
        self._counted = {}
        counted["time/record_s"] = self._recorder.take_seconds()
        return counted | self._scorer.metrics() | self._router.metrics()

    def _count(self, name: str, value: float) -> None:
        self._counted[name] = self._counted.get(name, 0.0) + value

    async def _end(self) -> None:
        running = [held.running for held in self._held.values() if held.running is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        try:
            await environments.close(self._environment)
        finally:
            await self._scorer.close()
            await self._router.close()
            await self._loop.shutdown_asyncgens()
