"""A rollout worker as an actor of Ray, with a real server: the driver plans with numbers,
and each rank fetches its own arrays.
"""

import os
import re
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch

from nanoslime import algorithms
from nanoslime.batch import TrainBatch
from nanoslime.config import RunConfig
from nanoslime.orchestration.ray import cluster
from nanoslime.orchestration.ray.actors import ActorPlace, Actors, RunOnRay
from nanoslime.orchestration.ray.trainers import Delivery, order, receive
from nanoslime.orchestration.ray.workers import RayWorker, WorkerActor
from nanoslime.rollout import recorder
from nanoslime.rollout.tasks import FinishedGroup, GroupTask, Sampling, WorkerSetup
from nanoslime.run_dir import RunDir
from nanoslime.training.batching import (
    BatchingOptions,
    fill,
    kept_arrays,
    plan_train_batches,
)
from nanoslime.types import KeptArrays, Prompt, RunError
from tests.training.batches import make_train_batches

CONFIG = RunConfig(
    rollout={"max_new_tokens": 20, "n_samples_per_prompt": 3},
    data={"reward": "tests.orchestration.rewards:by_length"},
)
OPTIONS = BatchingOptions(
    num_steps=2, dp_size=2, max_tokens=40, denominator="sequences", temperature=1.0
)


@ray.remote(num_cpus=0)
class Rank:
    """Has nothing but its plans and what was ordered for it."""

    def batches(self, plans, deliveries: list[Delivery]) -> list[TrainBatch]:
        fetched = receive(deliveries)
        return [fill(plan, fetched) for plan in plans]


def task(group_id: int) -> GroupTask:
    prompt = Prompt(group_id, np.array([5, 6, 7 + group_id], np.int32), "p", "l")
    sampling = Sampling.of(CONFIG.rollout)
    return GroupTask(group_id, prompt, sampling, seed=group_id, reward=CONFIG.data.reward)


def assert_same(one: TrainBatch, other: TrainBatch) -> None:
    for field in fields(TrainBatch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, list) and isinstance(a[0], torch.Tensor):
            assert all(x.dtype == y.dtype and x.equal(y) for x, y in zip(a, b, strict=True))
        else:
            assert a == b, field.name


def assert_obeys_in_order_and_keeps_nobody_waiting(worker: RayWorker, log: Path) -> None:
    """Also while its process stands still."""
    [pid] = re.findall(r"rollout worker 0, pid (\d+)", log.read_text())
    process = psutil.Process(int(pid))
    process.suspend()
    try:
        begin = time.monotonic()
        for number in range(20, 30):
            worker.start([task(number)])
            worker.cancel([number])
        worker.start([task(30)])
        assert time.monotonic() - begin < 10
    finally:
        process.resume()
    reports = []
    while not reports:
        assert time.monotonic() - begin < 120
        reports = worker.poll(1.0).groups
    assert [report.group_id for report in reports] == [30]
    worker.finish_step(9, [FinishedGroup(999, [])])
    with pytest.raises(RunError, match="rollout worker 0 failed: .*999"):
        while True:
            assert time.monotonic() - begin < 120
            worker.poll(1.0)


@pytest.mark.ray
@pytest.mark.sglang
def test_arrays_go_from_the_worker_to_the_ranks_past_the_driver(
    tmp_path, tiny_model, sglang_engine
) -> None:
    attempt = RunDir.create(tmp_path, "run").new_attempt()
    cluster.start_local(2, "cpu", attempt.make_ray_token())
    try:
        assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)
        places = [ActorPlace(index=0, node=0, num_slots=0)]
        actors = Actors(
            WorkerActor,
            "rollout worker",
            "worker",
            places,
            RunOnRay(CONFIG, attempt, tiny_model),
            8,
        )
        setup = WorkerSetup(CONFIG, tiny_model, attempt.run.rollouts)
        ray.get(actors.actors[0].open_worker.remote(setup))
        worker = RayWorker(actors, 0)
        worker.set_engines([sglang_engine])
        worker.start([task(number) for number in range(4)])
        reports = []
        deadline = time.monotonic() + 120
        while len(reports) < 4:
            assert time.monotonic() < deadline
            reports += worker.poll(1.0).groups
        reports.sort(key=lambda group: group.group_id)
        samples = [sample for group in reports for sample in group.samples]
        assert all(isinstance(sample.arrays, KeptArrays) for sample in samples)

        algorithms.make(CONFIG.algorithm).advantages(reports)
        steps = plan_train_batches(reports, OPTIONS)
        worker.finish_step(
            0,
            [
                FinishedGroup(g.group_id, [sample.advantage for sample in g.samples])
                for g in reports
            ],
        )
        got = []
        for dp_rank in range(2):
            plans = [step[dp_rank] for step in steps]
            deliveries = order(kept_arrays(plans), actors.actors)
            assert len(deliveries) == 1
            got.append(ray.get(Rank.remote().batches.remote(plans, deliveries)))
        while not list(attempt.run.rollouts.glob("*.npz")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        expected = make_train_batches(recorder.load(attempt.run.rollouts, 0), OPTIONS)
        for step in range(2):
            for dp_rank in range(2):
                assert_same(got[dp_rank][step], expected[step][dp_rank])
        with pytest.raises(
            RunError, match="rollout worker 0 on node 0 failed to answer to load: .*absent"
        ):
            worker.load(tmp_path / "absent.npz")

        assert_obeys_in_order_and_keeps_nobody_waiting(worker, attempt.log("worker", 0))
        ray.kill(actors.actors[0])
        with pytest.raises(
            RunError, match=r"rollout worker 0 on node 0 died .* poll; log: .*worker-0\.log"
        ):
            worker.poll(1.0)
        message = "arrays of 2 samples by rollout worker 0 cannot be fetched.* has died.*ActorDied"
        with pytest.raises(RunError, match=message):
            receive(order([samples[7].arrays, samples[8].arrays], actors.actors))
    finally:
        cluster.disconnect()
