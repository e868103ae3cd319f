"""Which transport "auto" stands for, and which are refused before anything starts."""

import pickle
import signal
from multiprocessing import Pipe
from typing import Any

import pytest

from nanoslime.config import RolloutConfig, RunConfig
from nanoslime.config.cluster import ClusterConfig
from nanoslime.config.deadlines import Deadline
from nanoslime.config.rollout import WeightSyncConfig
from nanoslime.orchestration.groups import resolve_transport
from nanoslime.orchestration.torchrun_group import Answer, Call, Ranks
from nanoslime.types import RunError
from nanoslime.weight_sync.transport import TRANSPORTS


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
    with pytest.raises(ValueError, match=f"weight_sync.transport=.*{message}.*choose"):
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
