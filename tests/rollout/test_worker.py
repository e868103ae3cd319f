"""A rollout worker on real engines: groups are sampled and scored beside one another, kept
until training is done with them, and go on from a checkpoint.
"""

import asyncio
import gc
import json
import pickle
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoslime.algorithms.rewards import rewards_by_group
from nanoslime.config import DataConfig, RolloutConfig, RunConfig
from nanoslime.rollout import recorder, worker_state
from nanoslime.rollout import worker as worker_module
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.environments import single_turn
from nanoslime.rollout.policy import Policy
from nanoslime.rollout.sample_builder import SampleBuilder
from nanoslime.rollout.tasks import FinishedGroup, GroupTask, RestoredGroup, Sampling, WorkerSetup
from nanoslime.rollout.worker import RolloutWorker
from nanoslime.types import (
    Generation,
    GroupReport,
    KeptArrays,
    Prompt,
    RunError,
    Sample,
    SampleArrays,
    SampleGroup,
    Status,
)
from tests.serving import wait_until_running

SAMPLING = Sampling(n_samples_per_prompt=3, max_new_tokens=6, temperature=0.7)
HERE = "tests.rollout.test_worker"
REWARDS = "tests.orchestration.rewards"


def setup(directory: Path, model: Path, **rollout: Any):
    settings = {"engine": "embedded", "max_new_tokens": 6, "temperature": 0.7, **rollout}
    config = RunConfig(rollout=RolloutConfig(**settings), data=DataConfig())
    return WorkerSetup(config, model, directory / "rollouts")


def task(group_id: int, reward: str = "exact_match", tokens: Sequence[int] = (5, 6, 7), **more):
    prompt = Prompt(4, np.array(tokens, np.int32), "text", "b", {"k": 1}, "math", "f1")
    values = {"sampling": SAMPLING, "seed": 17 + group_id, "reward": reward, **more}
    return GroupTask(group_id=group_id, prompt=prompt, **values)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> EmbeddedEngine:
    return EmbeddedEngine(str(tiny_model), "float32", "cpu", seed=0)


@pytest.fixture
def open_worker(tmp_path: Path, tiny_model: Path, engine: EmbeddedEngine) -> Iterator[Any]:
    opened: list[RolloutWorker] = []

    def make(*, engines: Sequence[Any] = (engine,), keeps_arrays: bool = False, **more: Any):
        made = setup(tmp_path, tiny_model, **more)
        worker = RolloutWorker(made, keeps_arrays=keeps_arrays)
        opened.append(worker)
        worker.set_engines(engines)
        return worker

    yield make
    for worker in opened:
        worker.close()


def reports(worker: RolloutWorker, number: int) -> list[GroupReport]:
    """The next so many groups, in the order of their ids."""
    found: list[GroupReport] = []
    deadline = time.monotonic() + 60
    while len(found) < number:
        assert time.monotonic() < deadline, f"{len(found)} of {number} groups"
        found += worker.poll(1.0).groups
    assert len(found) == number
    return sorted(found, key=lambda group: group.group_id)


def tokens(groups: Sequence[GroupReport]) -> list[list[int]]:
    return [sample.arrays.token_ids.tolist() for group in groups for sample in group.samples]


def test_each_group_is_reported_once_with_scores_and_arrays(open_worker) -> None:
    worker = open_worker()
    worker.start([task(10), task(11, f"{REWARDS}:always_one", [8])])
    first, second = reports(worker, 2)
    assert [first.group_id, second.group_id] == [10, 11]
    assert [sample.rollout_id for sample in first.samples] == [30, 31, 32]
    assert first.rewards == [0.0] * 3 and second.rewards == [1.0] * 3
    for sample in first.samples:
        arrays: SampleArrays = sample.arrays
        assert (sample.num_tokens, sample.num_response_tokens) == (9, 6)
        assert arrays.token_ids[:3].tolist() == [5, 6, 7]
        assert arrays.loss_mask.tolist() == [False] * 3 + [True] * 6
        assert sample.policy_versions == [(3, 0)] and sample.loss_tokens_by_version == {0: 6}
        assert sample.status is Status.TRUNCATED and sample.prompt_id == 4
    assert len({tuple(row) for row in tokens([first])}) == 3
    assert not worker.poll(0.0).groups
    metrics = worker.metrics()
    assert metrics["rollout/generated_tokens"] == 36.0 and metrics["time/score_s"] >= 0
    assert "rollout/generated_tokens" not in worker.metrics()


def test_the_seed_decides_the_samples_whatever_else_runs(open_worker) -> None:
    worker = open_worker()
    worker.start([task(0), task(1)])
    expected = tokens(reports(worker, 2))
    other = open_worker(max_inflight=1)
    other.start([task(2), task(1), task(0)])
    assert tokens(reports(other, 3))[:6] == expected


def test_a_full_collection_leaves_out_what_was_there_before_the_worker(open_worker) -> None:
    before = [0]
    worker = open_worker()
    after = [0]
    walked = gc.get_objects()
    assert any(one is after for one in walked)
    assert not any(one is before for one in walked)
    worker.close()
    assert gc.get_freeze_count() == 0


def test_arrays_of_the_step_that_was_finished_last_are_kept_for_the_trainers(open_worker) -> None:
    worker = open_worker(keeps_arrays=True)
    worker.start([task(0), task(1), task(2), task(-1, purpose="eval")])
    evaluated, *trained = reports(worker, 4)
    assert not {-1} & worker._held.keys(), "an evaluation is not kept"
    places = [[sample.arrays for sample in group.samples] for group in trained]
    assert places[1] == [KeptArrays(worker=0, group_id=1, index=index) for index in range(3)]
    worker.finish_step(7, [FinishedGroup(group_id, [0.5] * 3) for group_id in (0, 1)])
    worker.start([task(3)])
    reports(worker, 1)
    asked = [places[1][2], places[0][0], places[1][0]]
    fetched = worker.arrays(asked)
    groups = recorded(worker, 7)
    for one, arrays in zip(asked, fetched, strict=True):
        sample = groups[one.group_id].samples[one.index]
        np.testing.assert_array_equal(arrays.token_ids, sample.token_ids)
        np.testing.assert_array_equal(arrays.rollout_logprobs, sample.rollout_logprobs)
        assert arrays.policy_versions == sample.policy_versions
    worker.finish_step(8, [FinishedGroup(2, [0.5] * 3)])
    assert len(worker.arrays(places[2])) == 3
    with pytest.raises(KeyError):
        worker.arrays(asked)


def recorded(worker: RolloutWorker, step: int) -> list[SampleGroup]:
    """The groups of a step, once they are on disk."""
    directory = worker._recorder._recording.directory
    wait_for(lambda: any(directory.glob("*.npz")))
    return recorder.load(directory, step)


def test_a_finished_step_is_recorded_with_its_advantages_and_let_go(open_worker, tmp_path) -> None:
    worker = open_worker()
    worker.start([task(0), task(1), task(2)])
    found = reports(worker, 3)
    finished = [FinishedGroup(group_id, [0.5, None, -1.0]) for group_id in (0, 2)]
    worker.finish_step(7, finished)
    worker.finish_step(8, [])
    worker.close()
    groups = recorder.load(tmp_path / "rollouts", 7)
    assert [group.group_id for group in groups] == [0, 2]
    assert [sample.advantage for sample in groups[0].samples] == [0.5, None, -1.0]
    assert groups[1].rewards == found[2].rewards
    assert recorder.load(tmp_path / "rollouts", 8) == []
    assert list(worker._held) == [1]


@pytest.mark.parametrize(
    ("environment", "cause"),
    [
        ("raising", "the environment failed with ValueError: tool is broken"),
        ("exiting", "the environment failed with SystemExit: 3"),
        ("misaligned", "must be equally long"),
        ("first_in_loss", "token 0 is in the loss"),
        ("no_list", "TypeError"),
        ("empty", "it gave no sample"),
        ("hanging", "it took longer than rollout.environment_timeout_s=0.2"),
        ("hanging_after_turns", "it took longer than rollout.environment_timeout_s=0.2"),
        ("late_by_itself", "TimeoutError: its own"),
    ],
)
def test_what_an_environment_does_wrong_is_an_error_of_its_samples(
    open_worker, environment, cause
) -> None:
    worker = open_worker(environment=f"{HERE}:{environment}", environment_timeout_s=0.2)
    worker.start([task(0)])
    [group] = reports(worker, 1)
    assert [sample.status for sample in group.samples] == [Status.ERROR] * 3
    assert all(cause in (sample.error or "") for sample in group.samples)
    assert all(sample.reward is None for sample in group.samples)
    assert [sample.num_tokens for sample in group.samples] == [3] * 3


def test_a_reward_that_fails_is_an_error_of_its_samples(open_worker) -> None:
    worker = open_worker()
    worker.start([task(0, f"{REWARDS}:exits"), task(1)])
    failed, fine = reports(worker, 2)
    assert [sample.status for sample in failed.samples] == [Status.ERROR] * 3
    assert all("exits" in (sample.error or "") for sample in failed.samples)
    assert len(fine.rewards) == 3


def test_a_prompt_that_fills_the_context_keeps_its_cause(open_worker) -> None:
    worker = open_worker()
    worker.start([task(0, tokens=[5] * 4096)])
    [group] = reports(worker, 1)
    assert all("4096 tokens" in (sample.error or "") for sample in group.samples)


async def raising(prompt: Prompt, policy: Policy) -> list[Sample]:
    raise ValueError("tool is broken")


async def exiting(prompt: Prompt, policy: Policy) -> list[Sample]:
    raise SystemExit(3)


async def misaligned(prompt: Prompt, policy: Policy) -> list[Sample]:
    sample = SampleBuilder(prompt, policy).build()
    sample.loss_mask = sample.loss_mask[1:]
    return [sample]


async def first_in_loss(prompt: Prompt, policy: Policy) -> list[Sample]:
    sample = SampleBuilder(prompt, policy).build()
    sample.loss_mask[0] = True
    return [sample]


async def no_list(prompt: Prompt, policy: Policy) -> Any:
    return 5


async def empty(prompt: Prompt, policy: Policy) -> list[Sample]:
    return []


async def hanging(prompt: Prompt, policy: Policy) -> list[Sample]:
    await asyncio.Event().wait()
    return []


async def hanging_after_turns(prompt: Prompt, policy: Policy) -> list[Sample]:
    turns = [policy.generate(prompt.token_ids, max_new_tokens=2) for _ in range(2)]
    await asyncio.gather(*turns)
    return await hanging(prompt, policy)


async def late_by_itself(prompt: Prompt, policy: Policy) -> list[Sample]:
    raise TimeoutError("its own")


async def two_turns(prompt: Prompt, policy: Policy) -> list[Sample]:
    """Two answers of three tokens with an observation between them, and the first one again as
    a sample of its own."""
    first = SampleBuilder(prompt, policy)
    first.generated(await policy.generate(first.token_ids, max_new_tokens=3))
    both = SampleBuilder(prompt, policy, first.token_ids)
    both.observed([9, 9])
    both.generated(await policy.generate(both.token_ids))
    return [first.build(), both.build()]


IS_BLOCKED = threading.Event()


async def blocking(prompt: Prompt, policy: Policy) -> list[Sample]:
    IS_BLOCKED.wait(30)  # it ought to be in asyncio.to_thread
    return [SampleBuilder(prompt, policy).build()]


def test_an_environment_that_blocks_the_event_loop_ends_the_run_with_its_line(
    open_worker, monkeypatch
) -> None:
    monkeypatch.setattr(worker_module, "_PATIENCE_S", 0.3)
    worker = open_worker(environment=f"{HERE}:blocking")
    worker.start([task(0)])
    line = f"test_worker.py:{blocking.__code__.co_firstlineno + 1} > "
    message = f"rollout worker 0 has done nothing for 0.3 s, .* blocked at .*{line}.*threading.py"
    try:
        with pytest.raises(RunError, match=message):
            worker.poll(0.1)
        begin = time.monotonic()
        with pytest.raises(RunError, match="for 1 s, because its event loop is blocked"):
            worker.close()
        assert time.monotonic() - begin < 10
    finally:
        IS_BLOCKED.set()


def test_waiting_for_tokens_is_no_time_of_the_environment(open_worker, engine) -> None:
    """Also where it waits for several at once, and for an engine."""
    gate = Gate(engine)
    worker = open_worker(engines=[], environment=f"{HERE}:turns_at_once", environment_timeout_s=0.2)
    worker.start([task(0)])
    assert not worker.poll(0.4).groups
    worker.set_engines([gate])
    wait_for(lambda: gate.num_waiting == 3)
    gate.let_through = 3
    assert not worker.poll(0.4).groups
    assert gate.num_waiting == 3
    gate.is_open = True
    [group] = reports(worker, 1)
    assert [sample.error for sample in group.samples] == [None] * 3


async def turns_at_once(prompt: Prompt, policy: Policy) -> list[Sample]:
    turns = [policy.generate(prompt.token_ids, max_new_tokens=2) for _ in range(2)]
    first, _ = await asyncio.gather(*turns)
    builder = SampleBuilder(prompt, policy)
    builder.generated(first)
    return [builder.build()]


def test_samples_of_one_rollout_share_its_number_and_its_reward(open_worker) -> None:
    worker = open_worker(environment=f"{HERE}:two_turns")
    worker.start([task(2, f"{REWARDS}:by_text_where_labelled")])
    [group] = reports(worker, 1)
    assert [sample.rollout_id for sample in group.samples] == [6, 6, 7, 7, 8, 8]
    assert [sample.num_tokens for sample in group.samples] == [6, 11] * 3
    assert group.rewards[::2] == group.rewards[1::2] and len(set(group.rewards)) == 3
    assert set(rewards_by_group([group])[2]) == {6, 7, 8}


async def never_done_in_training(prompt: Prompt, policy: Policy) -> list[Sample]:
    if policy.group_id >= 0:
        await asyncio.Event().wait()
    return await single_turn.run(prompt, policy)


def test_an_evaluation_does_not_wait_for_rollouts_of_training(open_worker) -> None:
    worker = open_worker(environment=f"{HERE}:never_done_in_training", max_inflight=1)
    worker.start([task(0), task(1), task(-1, purpose="eval")])
    assert [group.group_id for group in reports(worker, 1)] == [-1]


class Gate:
    """An engine behind a gate: requests wait until it opens."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self.name = "gate"
        self.is_open = False
        self.num_waiting = 0
        self.num_cancelled = 0
        self.num_interrupts = 0
        # So many requests pass while it is closed.
        self.let_through = 0
        self._engine = engine

    def interrupt(self) -> None:
        self.num_interrupts += 1

    async def generate(self, request: Any) -> Any:
        self.num_waiting += 1
        before = self.num_interrupts
        try:
            while not self.is_open and self.let_through == 0:
                await asyncio.sleep(0.005)
                if self.num_interrupts > before:
                    return [Generation([], [], Status.ABORTED, [])] * request.n
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_waiting -= 1
        self.let_through = max(0, self.let_through - 1)
        return await self._engine.generate(request)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_cancelled_group_ends_its_requests_and_is_not_reported(open_worker, engine) -> None:
    gate = Gate(engine)
    worker = open_worker(engines=[gate])
    worker.start([task(0), task(1)])
    wait_for(lambda: gate.num_waiting == 6)
    worker.cancel([0])
    wait_for(lambda: gate.num_cancelled == 3)
    gate.is_open = True
    [group] = reports(worker, 1)
    assert group.group_id == 1
    # A group that has ended, but was not asked for yet.
    worker.start([task(2)])
    wait_for(lambda: worker._reports)
    worker.cancel([2, 3])
    assert not worker.poll(0.05).groups and list(worker._held) == [1]


def test_groups_wait_for_engines_and_run_at_most_so_many_at_once(open_worker, engine) -> None:
    gate = Gate(engine)
    worker = open_worker(engines=[], max_inflight=4)
    worker.start([task(0), task(1), task(2)])
    assert not worker.poll(0.05).groups
    worker.set_engines([gate])
    wait_for(lambda: gate.num_waiting == 4)
    assert not worker.poll(0.05).groups and gate.num_waiting == 4
    gate.is_open = True
    assert len(reports(worker, 3)) == 3


def test_a_fault_of_the_worker_is_told_by_poll(open_worker) -> None:
    worker = open_worker()
    worker.finish_step(0, [FinishedGroup(7, [])])
    with pytest.raises(RunError, match="rollout worker 0 failed: KeyError: 7"):
        reports(worker, 1)


def by_id(restored: Sequence[RestoredGroup]) -> dict[int, RestoredGroup]:
    return {group.task.group_id: group for group in restored}


def test_a_saved_worker_goes_on_elsewhere_with_the_same_samples(
    open_worker, engine, tmp_path
) -> None:
    """Groups that are done come back with their samples, and others are sampled on."""
    straight = open_worker(environment=f"{HERE}:two_turns")
    straight.start([task(0), task(1), task(2)])
    expected = reports(straight, 3)

    gate = Gate(engine)
    saved = open_worker(environment=f"{HERE}:two_turns")
    saved.start([task(0)])
    reports(saved, 1)
    saved.set_engines([gate])
    saved.start([task(1), task(2), task(-1, purpose="eval")])
    wait_for(lambda: gate.num_waiting == 9)
    path = tmp_path / "state" / "worker.npz"
    saved.save(path)
    assert json.loads(json.dumps(saved.metrics()))["rollout/generated_tokens"] == 18

    resumed = open_worker(environment=f"{HERE}:two_turns", engines=[])
    restored = by_id(resumed.load(path))
    assert restored.keys() == {0, 1, 2}
    assert restored[0].task.sampling == SAMPLING
    prompts = [asdict(one.prompt) for one in (restored[0].task, task(0))]
    assert [prompt.pop("token_ids").tolist() for prompt in prompts] == [[5, 6, 7]] * 2
    assert prompts[0] == prompts[1]
    assert restored[1].report is None
    resumed.set_engines([engine])
    again = reports(resumed, 2)
    assert tokens([restored[0].report, *again]) == tokens(expected)
    resumed.finish_step(0, [FinishedGroup(n, [0.0] * 6) for n in range(3)])
    resumed.close()
    recorded = recorder.load(tmp_path / "rollouts", 0)
    assert [group.rewards for group in recorded] == [group.rewards for group in expected]


def test_a_damaged_state_is_refused_by_name(open_worker, tmp_path) -> None:
    worker = open_worker()
    worker.save(tmp_path / "worker.npz")
    assert worker.load(tmp_path / "worker.npz") == []
    (tmp_path / "worker.npz").write_bytes(b"PK")
    with pytest.raises(RunError, match=r"worker\.npz is not the state of a rollout worker"):
        worker.load(tmp_path / "worker.npz")


@pytest.mark.sglang
def test_partial_samples_of_a_server_are_saved_while_they_go_on(
    open_worker, sglang_engine, tmp_path
) -> None:
    long = Sampling(n_samples_per_prompt=2, max_new_tokens=600, temperature=1.0)
    path = tmp_path / "worker.npz"
    worker = open_worker(engines=[sglang_engine])
    worker.start([task(0, sampling=long), task(1)])
    reports(worker, 1)
    wait_until_running(sglang_engine)
    time.sleep(0.3)
    worker.save(path)
    [whole] = reports(worker, 1)
    [saved] = [group for group in worker_state.read(path) if group.task.group_id == 0]
    partial = [rollout.transcript[0].generation.token_ids for rollout in saved.rollouts]
    assert all(0 < len(token_ids) < 600 for token_ids in partial)
    starts = [[5, 6, 7, *token_ids] for token_ids in partial]
    assert [row[: len(start)] for row, start in zip(tokens([whole]), starts, strict=True)] == starts

    resumed = open_worker(engines=[sglang_engine])
    restored = by_id(resumed.load(path))
    assert restored[0].report is None
    assert restored[1].report is not None
    [again] = reports(resumed, 1)
    assert [row[: len(start)] for row, start in zip(tokens([again]), starts, strict=True)] == starts
    for sample in again.samples:
        assert sample.num_response_tokens == int(sample.arrays.loss_mask.sum()) <= 600
        assert (sample.arrays.rollout_logprobs[3:] < 0).all()


@pytest.mark.sglang
def test_a_closed_worker_leaves_no_session_of_a_server_open(
    tmp_path, tiny_model, sglang_engine, caplog
) -> None:
    """Neither that of an engine on which a request runs, nor that of one that was taken away."""
    first, second = [pickle.loads(pickle.dumps(sglang_engine)) for _ in range(2)]
    long = Sampling(n_samples_per_prompt=2, max_new_tokens=3000, temperature=1.0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        worker = RolloutWorker(setup(tmp_path, tiny_model))
        worker.set_engines([first])
        worker.start([task(0)])
        reports(worker, 1)
        worker.set_engines([second])
        del first
        worker.start([task(1, sampling=long)])
        wait_until_running(second)
        worker.close()
        del worker, second
        gc.collect()
    told = [str(one.message) for one in warned] + [one.getMessage() for one in caplog.records]
    assert not [line for line in told if "nclosed" in line or "destroyed" in line]
