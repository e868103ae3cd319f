"""Which transport "auto" stands for, and which are refused before anything starts; the batches
that a run's configuration makes of its samples.
"""

import pickle
import signal
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from nanoslime import algorithms
from nanoslime.batch import BatchPlan
from nanoslime.config import RolloutConfig, RunConfig, TrainingConfig
from nanoslime.config.algorithm import AlgorithmConfig, GRPOConfig
from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.deadlines import Deadline
from nanoslime.config.rollout import WeightSyncConfig
from nanoslime.engine_kind import resolve_transport
from nanoslime.models.shape import ModelShape
from nanoslime.orchestration import groups as groups_module
from nanoslime.orchestration import torchrun_group
from nanoslime.orchestration.groups import TrainGroup
from nanoslime.orchestration.torchrun_group import Answer, Call, Ranks
from nanoslime.run_dir import RunDir
from nanoslime.types import RunError, Status, local_reports
from nanoslime.weight_sync.devices import SeparateDevices
from nanoslime.weight_sync.transport import TRANSPORTS
from tests.algorithms.made import group
from tests.models.hf import save_model


def config(transport: str = "auto", colocate: bool = False, gpus: int = 0, **rollout: Any):
    return RunConfig(
        rollout=RolloutConfig(**rollout),
        weight_sync=WeightSyncConfig(transport=transport),
        cluster=ClusterConfig(colocate=colocate, gpus_per_node=gpus),
    )


@pytest.mark.parametrize(
    ("settings", "same_process", "expected"),
    [
        ({"engine": "sglang"}, False, "broadcast"),
        ({"engine": "sglang", "colocate": True}, False, "tensor"),
        ({"engine": "sglang", "transport": "disk"}, False, "disk"),
        ({"engine": "embedded"}, True, "in_process"),
        ({"engine": "embedded"}, False, "disk"),
        ({"engine": "sglang", "rollout_only": True}, False, "none"),
        ({"load_rollouts": "runs/a"}, True, "none"),
    ],
)
def test_auto_is_decided_by_engine_and_place(settings, same_process, expected):
    transport = resolve_transport(config(**settings), same_process=same_process)
    assert transport == expected and transport in TRANSPORTS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transport": "tensor", "engine": "sglang"}, "needs engines on the trainers' own GPUs"),
        ({"transport": "broadcast", "engine": "embedded"}, "engine=embedded cannot take weights"),
        (
            {"transport": "broadcast", "engine": "sglang", "colocate": True, "gpus": 2},
            "NCCL refuses two ranks on one GPU",
        ),
        (
            {"transport": "in_process", "engine": "embedded"},
            "in the process of the only trainer rank",
        ),
    ],
)
def test_a_transport_that_cannot_work_is_refused_with_a_way_out(settings, message):
    with pytest.raises(RunError, match=f"weight_sync.transport=.*{message}.*choose"):
        resolve_transport(config(**settings), same_process=False)


def test_ranks_that_never_answer_are_named_with_the_setting():
    ends = [Pipe() for _ in range(3)]
    ranks = Ranks.__new__(Ranks)
    ranks._connections = [ours for ours, _ in ends]
    ends[1][1].send_bytes(pickle.dumps(Answer(result="fast")))
    handler = signal.getsignal(signal.SIGTERM)
    late = "trainer ranks 0, 2 did not train within training.train_deadline_s=0.2 seconds"
    try:
        with pytest.raises(RunError, match=late):
            calls = [Call("train", ())] * 3
            ranks.ask(calls, "train", Deadline(0.2, "training.train_deadline_s"))
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_a_rank_that_fails_since_another_hangs_names_the_one_that_hangs(monkeypatch):
    """Rank 0 lives in the driver."""
    monkeypatch.setattr(torchrun_group, "NEWS_OF_A_DEATH_S", 0.2)
    ends = [Pipe() for _ in range(4)]
    ranks = Ranks.__new__(Ranks)
    ranks._connections = [ours for ours, _ in ends]
    ends[1][1].send_bytes(pickle.dumps(Answer(failure="the collective timed out")))
    ends[3][1].send_bytes(pickle.dumps(Answer(failure="the collective timed out")))
    handler = signal.getsignal(signal.SIGTERM)
    told = (
        "trainer rank 1 failed to train: the collective timed out; "
        "trainer ranks 2 have not answered"
    )
    try:
        with pytest.raises(RunError, match=told):
            ranks.ask([Call("train", ())] * 4, "train", Deadline(5.0, "training.train_deadline_s"))
    finally:
        signal.signal(signal.SIGTERM, handler)


class Batches(TrainGroup):
    """Keeps the batches that it would give to its ranks."""

    def __init__(self, config: RunConfig, run: RunDir, model_dir: Path, dp_size: int):
        super().__init__(config, run, model_dir, num_ranks=dp_size)
        self.dp_size = dp_size
        self.shards: list[list[BatchPlan]] = []

    def _train(self, shards: list[list[BatchPlan]]) -> dict[str, float]:
        self.shards = shards
        return {}

    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> None: ...

    def close(self) -> None: ...


def batches(
    tmp_path: Path,
    dp_size: int = 1,
    algorithm: AlgorithmConfig | None = None,
    mask_stale_tokens: bool = False,
    version: int = 0,
    **training: Any,
) -> list[list[BatchPlan]]:
    """By rank and optimizer step: five groups of two samples, each of three tokens."""
    made = RunConfig(
        rollout=RolloutConfig(
            temperature=0.7, max_new_tokens=9, mask_stale_tokens=mask_stale_tokens
        ),
        training=TrainingConfig(**training),
        algorithm=algorithm or GRPOConfig(),
    )
    model = save_model(tmp_path / "model", "qwen3")
    groups = [group(number, [1.0, 0.0]) for number in range(5)]
    algorithms.make(made.algorithm).advantages(groups)
    trainer = Batches(made, RunDir(tmp_path), model, dp_size)
    trainer.train(local_reports(groups), version)
    return trainer.shards


def test_batches_are_of_the_sampling_temperature(tmp_path):
    assert {step.temperature for rank in batches(tmp_path) for step in rank} == {0.7}


@pytest.mark.parametrize(
    ("denominator", "expected"), [("tokens", 20), ("sequences", 10), ("fixed", 10 * 9)]
)
def test_the_denominator_is_the_one_that_is_asked_for(tmp_path, denominator, expected):
    [[batch]] = batches(tmp_path, algorithm=GRPOConfig(denominator=denominator))
    assert batch.denominator == expected


def test_only_tokens_of_the_current_weights_are_trained_on_where_asked(tmp_path):
    """The samples are of version 0."""
    [[batch]] = batches(tmp_path, mask_stale_tokens=True, version=0)
    assert (batch.num_tokens, batch.oldest_version_in_loss) == (20, 0)
    assert batches(tmp_path, mask_stale_tokens=True, version=1) == [[]]
    [[batch]] = batches(tmp_path, version=1)
    assert (batch.num_tokens, batch.oldest_version_in_loss) == (20, None)


def test_samples_whose_tokens_are_all_masked_are_counted_and_a_rollout_of_them_is_told(
    tmp_path, caplog
):
    made = RunConfig(algorithm=GRPOConfig(truncated="mask"))
    trainer = Batches(made, RunDir(tmp_path), save_model(tmp_path / "model", "qwen3"), 2)
    groups = [group(number, [1.0, 0.0]) for number in range(5)]
    algorithms.make(made.algorithm).advantages(groups)
    samples = [sample for one in groups for sample in one.samples]
    for left_out in (0, 3, 10):
        for sample in samples[:left_out]:
            sample.status = Status.TRUNCATED
        assert not caplog.records
        metrics = trainer.train(local_reports(groups), 0)
        assert metrics["rollout/dropped_sample_masked"] == left_out
    assert "none of 10 samples is left to train on: rollout.mask_stale_tokens or" in caplog.text


def test_every_rank_gets_its_own_share_of_every_step(tmp_path):
    ranks = batches(tmp_path, dp_size=2, num_steps_per_rollout=2)
    assert [len(steps) for steps in ranks] == [2, 2]
    shares = [[len(step.arrays) for step in steps] for steps in ranks]
    assert [sum(of_step) for of_step in zip(*shares, strict=True)] == [4, 6]


@pytest.mark.parametrize(
    ("sizes", "multiple"),
    [({"pp_size": 2, "vpp_size": 2}, 2), ({"pp_size": 4, "vpp_size": 2}, 4), ({"pp_size": 2}, 1)],
)
def test_an_interleaved_schedule_has_a_multiple_of_its_stages_of_micro_batches(
    tmp_path, sizes, multiple
):
    """Ten sequences that go two by two are five micro-batches, where nothing asks for more."""
    [[batch]] = batches(tmp_path, max_tokens_per_microbatch=6, **sizes)
    assert len(batch.microbatches) == -(-5 // multiple) * multiple


def test_context_parallel_ranks_share_the_tokens_of_a_micro_batch(tmp_path):
    [[batch]] = batches(tmp_path, max_tokens_per_microbatch=6, cp_size=2)
    assert len(batch.microbatches) == 3


def test_what_a_sequence_costs_is_the_models(tmp_path, monkeypatch):
    """Packs are balanced by the cost of attention beside that of matrix products."""
    seen = []
    made = groups_module.BatchingOptions

    def options(**values: Any) -> Any:
        seen.append(values["parity_tokens"])
        return made(**values)

    monkeypatch.setattr(groups_module, "BatchingOptions", options)
    batches(tmp_path)
    assert seen == [ModelShape.read(tmp_path / "model").attention_parity_tokens]


def test_what_needs_the_trainers_memory_takes_the_devices_first(tmp_path):
    """Training, a save and an export wake the trainer, and its seconds are in the row."""
    trainer = Batches(RunConfig(), RunDir(tmp_path), save_model(tmp_path / "m", "qwen3"), 1)
    turns = []

    class Devices(SeparateDevices):
        def give_to_trainer(self) -> dict[str, float]:
            turns.append("trainer")
            return {"time/wake_s": 3.0}

    trainer.devices = Devices()
    trainer.call = lambda method, *args, what: turns.append(method)
    assert trainer.train([], 0)["time/wake_s"] == 3.0
    trainer.save(tmp_path / "save")
    trainer.export_hf(tmp_path / "hf")
    assert turns == ["trainer", "trainer", "save", "trainer", "write_hf"]
