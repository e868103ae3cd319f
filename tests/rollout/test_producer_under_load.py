"""The producer over simulated workers, under load: slow groups, filters, failures, evaluations
beside training, and resumes with other limits and another number of workers.
"""

import json
import pickle
import random
from collections import Counter
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import pytest

from nanoslime.rollout import producer as producer_module
from nanoslime.rollout.admission import Limits
from nanoslime.rollout.producer import Producer, Recipe, Serving
from nanoslime.rollout.tasks import FinishedGroup, GroupTask, RestoredGroup, Sampling, WorkerNews
from nanoslime.types import Group, GroupReport, Prompt, SampleReport, Status

NUM_ROLLOUTS = 12


def prompt(number: int) -> Prompt:
    return Prompt(number, np.array([1], np.int32), "", None)


def task(source: Prompt, group_id: int, purpose: Any = "train") -> GroupTask:
    return GroupTask(group_id, source, Sampling(1, 4, 1.0), group_id, "", purpose)


class Prompts:
    """Prompt n is the n-th that is taken."""

    def __init__(self) -> None:
        self.num_taken = 0

    def next(self, n: int) -> list[Prompt]:
        first = self.num_taken
        self.num_taken += n
        return [prompt(number) for number in range(first, first + n)]

    def state_dict(self) -> dict[str, Any]:
        return {"num_taken": self.num_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_taken = state["num_taken"]


class SimulatedWorker:
    """Each look at it is a step of its engines, which have the weights of `version[0]`."""

    def __init__(self, name: str, rng: random.Random, version: list[int]) -> None:
        self.name = name
        self._rng = rng
        self._version = version
        self._lock = RLock()
        self._news: list[GroupReport] = []
        # The version at the first token, and the steps that are left.
        self.running: dict[int, tuple[GroupTask, int | None, int]] = {}
        self.finished: dict[int, tuple[GroupTask, GroupReport]] = {}

    def start(self, tasks) -> None:
        with self._lock:
            for one in tasks:
                assert one.group_id not in {*self.running, *self.finished}
                num_steps = self._rng.choice([2, 5, 9, 9, 9, 150])
                self.running[one.group_id] = (one, None, num_steps)

    def poll(self, timeout_s: float) -> WorkerNews:
        with self._lock:
            for group_id, (of_group, first, num_steps) in list(self.running.items()):
                if first is None and self._rng.random() < 0.6:
                    first = self._version[0]
                self.running[group_id] = (of_group, first, num_steps - 1)
                if num_steps <= 1:
                    del self.running[group_id]
                    report = self._report(of_group, first)
                    self._news.append(report)
                    if of_group.purpose == "train":
                        self.finished[group_id] = (of_group, report)
            news, self._news = self._news, []
            return WorkerNews(news)

    def _report(self, of_group: GroupTask, first: int | None) -> GroupReport:
        """It has failed where there is no first token; some are to be filtered."""
        spans = [] if first is None else [(1, first)]
        if first is not None and first < self._version[0]:
            spans.append((3, self._version[0]))
        sample = SampleReport(
            group_id=of_group.group_id,
            rollout_id=of_group.group_id,
            prompt_id=of_group.prompt.prompt_id,
            status=Status.ERROR if first is None else Status.COMPLETED,
            num_tokens=5,
            num_response_tokens=4,
            policy_versions=spans,
            loss_tokens_by_version={},
            expert_shape=None,
            arrays=None,
            reward=float(self._rng.random() < 0.75),
        )
        return Group(of_group.group_id, [sample])

    def cancel(self, group_ids) -> None:
        with self._lock:
            for group_id in group_ids:
                self.running.pop(group_id, None)
                self.finished.pop(group_id, None)
            self._news = [one for one in self._news if one.group_id not in group_ids]

    def finish_step(self, step: int, groups: list[FinishedGroup]) -> None:
        with self._lock:
            for group in groups:
                del self.finished[group.group_id]

    def save(self, path: Path) -> None:
        with self._lock:
            path.write_bytes(pickle.dumps((self.running, self.finished)))

    def load(self, path: Path) -> list[RestoredGroup]:
        running, finished = pickle.loads(path.read_bytes())
        with self._lock:
            self.running |= running
            self.finished |= finished
        restored = [RestoredGroup(of_group, None) for of_group, *_ in running.values()]
        return restored + [RestoredGroup(*held) for held in finished.values()]


def is_kept(group: GroupReport) -> bool:
    [sample] = group.samples
    return sample.status is Status.COMPLETED and sample.reward == 1


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_each_prompt_is_trained_on_once_within_the_bound(
    tmp_path, monkeypatch, seed
):
    monkeypatch.setattr(producer_module, "_LOOK_S", 0.001)
    rng = random.Random(seed)
    version = [0]
    prompts = Prompts()
    recipe = Recipe(make_task=task, is_kept=is_kept, restarts=bool(seed % 2))
    seen: Counter[int] = Counter()
    counts: Counter[str] = Counter()

    def limits() -> Limits:
        return Limits(
            batch=rng.choice([1, 2, 4]),
            max_staleness=rng.choice([0, 1, 2, 4]),
            num_rollouts=NUM_ROLLOUTS,
            max_replaced=rng.choice([0, 2, 6]),
            overdue=rng.choice(["wait", "regenerate", "drop"]),
        )

    def opened(of_run: Limits) -> Producer:
        workers = [SimulatedWorker(f"{i}", rng, version) for i in range(rng.choice([1, 2, 3]))]
        serving = Serving(workers, lost=lambda name, cause: None, service=lambda: False)
        return Producer(of_run, recipe, prompts, serving)

    producer = opened(limits())
    for step in range(NUM_ROLLOUTS):
        bound = step - producer.limits.max_staleness
        if bound < step:
            producer.set_version(step)
        tasks = [task(prompt(-number), -number, "eval") for number in range(1, rng.choice([1, 4]))]
        evaluated = producer.evaluate(tasks)
        assert [group.group_id for group in evaluated] == [one.group_id for one in tasks]
        rollout = producer.take(step)
        for group in rollout.groups:
            [sample] = group.samples
            seen[sample.prompt_id] += 1
            if is_kept(group):
                assert all(bound <= of_token <= step for _, of_token in sample.policy_versions)
        counts += rollout.taken.counts
        producer.finish(step, rollout.groups)
        version[0] = step + 1
        if rng.random() < 0.4:
            directory = tmp_path / f"{step}"
            state = producer.save(directory)
            producer.close()
            state = json.loads(json.dumps(state))
            prompts = Prompts()
            prompts.load_state_dict(state["prompts"])
            producer = opened(limits())
            producer.load(directory, state["producer"])
    producer.close()
    seen.update(held.task.prompt.prompt_id for held in producer._held.values())
    assert set(seen.values()) == {1}
    counts += producer._admission.counts
    num_dropped = sum(n for reason, n in counts.items() if reason.startswith("dropped"))
    assert len(seen) + num_dropped == prompts.num_taken
