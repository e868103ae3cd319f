"""What a colocated engine is given: whole tensors in buckets, as SGLang takes them apart."""

from pathlib import Path

import megatron.core
import pytest
import torch
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

from nanoslime.sealed_bucket import HEADER, Place, broken_seal, place_of
from nanoslime.training.backend import RankEnv
from nanoslime.types import RunError
from nanoslime.weight_sync.colocated import TensorSender
from nanoslime.weight_sync.transport import EngineSide, RankSide
from tests.weight_sync.test_trainer_weights import BIAS, half

pytestmark = [pytest.mark.sglang, pytest.mark.megatron]


class Engine:
    """As a server does, it refuses to end an update before every tensor has come."""

    def __init__(self, expected: list[str]) -> None:
        self._missing = set(expected)
        self.payloads: list[bytes] = []

    def receive_payloads(self, payloads: list[bytes]) -> None:
        self.payloads += payloads
        for payload in payloads:
            content = MultiprocessingSerializer.deserialize(payload)
            self._missing -= {tensor.name for tensor in content["metadata"]}

    def end_update(self, version: int) -> None:
        if self._missing:
            raise RunError(f"version {version} is refused: {self._missing} are missing")


def post(env: RankEnv) -> list[tuple[str, torch.Tensor]]:
    """What an engine's rank gets, taken apart as SGLang does, which refuses what it does not know.

    megatron-core is imported, as in a trainer: it changes how tensors are pickled.
    """
    assert torch.storage._load_from_bytes.__module__.startswith(megatron.core.__name__)
    engine = Engine([HEADER, BIAS, "odd", "even"])
    with pytest.raises(RunError, match="version 2 is refused"):
        engine.end_update(2)
    rank = RankSide(half(), bucket_bytes=1000, model_dir=Path(), deadline_s=77.0)
    sender = TensorSender(rank, EngineSide([engine], [[0]], "127.0.0.1", Path()))
    options = sender._group._get_backend(torch.device("cpu")).options
    assert options._timeout.total_seconds() > 77, "they wait for an engine that has 77 seconds"
    sent = sender.send(3)
    engine.end_update(3)
    contents = [MultiprocessingSerializer.deserialize(payload) for payload in engine.payloads]
    assert sent.num_bytes == sum(content["flattened_tensor"].numel() for content in contents)
    last = None
    for content in contents:
        assert broken_seal(content["flattened_tensor"], last) is None
        last = place_of(content["flattened_tensor"])
    assert last == Place(3, len(contents) - 1, len(contents))
    buckets = [FlattenedTensorBucket(**content) for content in contents]
    return [named for bucket in buckets for named in bucket.reconstruct_tensors()[1:]]


def test_a_colocated_engine_gets_both_dtypes_in_one_bucket_within_the_deadline(one_rank):
    [got] = one_rank(post)
    expected = dict(half().whole_tensors())
    assert [name for name, _ in got] == [BIAS, "odd", "even"]
    for name, tensor in got:
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
