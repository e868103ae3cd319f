"""What a colocated engine is given: whole tensors in buckets, as SGLang takes them apart."""

import pickle

import pytest
import torch
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

from nanoslime.training.backend import RankEnv
from nanoslime.weight_sync.colocated import TensorSender
from tests.weight_sync.test_assemble import BIAS, half

pytestmark = pytest.mark.sglang


def _post(env: RankEnv) -> list[tuple[str, torch.Tensor]]:
    """What an engine's rank gets, taken apart as SGLang does."""
    payloads: list[bytes] = []
    engine = Engine(payloads)
    sender = TensorSender(half(), [engine], [[0]], 0, torch.device("cpu"), 10_000, deadline_s=77.0)
    options = sender._group._get_backend(torch.device("cpu")).options
    assert options._timeout.total_seconds() == 77
    sent = sender.send(3)
    contents = [pickle.loads(payload) for payload in payloads]
    assert engine.version == 3 and sent == sum(c["flattened_tensor"].numel() for c in contents)
    return [t for c in contents for t in FlattenedTensorBucket(**c).reconstruct_tensors()]


class Engine:
    def __init__(self, payloads: list[bytes]) -> None:
        self.payloads, self.version = payloads, 0

    def begin_update(self) -> None: ...

    def receive_payloads(self, payloads: list[bytes]) -> None:
        self.payloads += payloads

    def end_update(self, version: int) -> None:
        self.version = version


def test_a_colocated_engine_gets_both_dtypes_in_one_bucket_within_the_deadline(one_rank):
    [got] = one_rank(_post)
    expected = dict(half().tensors())
    assert [name for name, _ in got] == [BIAS, "odd", "even"]
    assert all(
        t.dtype == expected[name].dtype and torch.equal(t, expected[name]) for name, t in got
    )
