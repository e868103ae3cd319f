"""What a colocated engine is given: whole tensors in buckets, as SGLang takes them apart."""

import gc
from pathlib import Path

import pytest
import torch
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

from nanoslime.sealed_bucket import HEADER, Place, broken_seal, place_of
from nanoslime.shared_bytes import shared_bytes
from nanoslime.training.backend import RankEnv
from nanoslime.types import RunError
from nanoslime.weight_sync.colocated import TensorSender
from nanoslime.weight_sync.engine_calls import EnginesFailed
from nanoslime.weight_sync.transport import EngineSide, RankSide
from tests.weight_sync.gathered import whole_tensors
from tests.weight_sync.test_trainer_weights import BIAS, half

pytestmark = pytest.mark.sglang


class Engine:
    """As a server does, it reads a payload before it answers, and refuses to end an update before
    every tensor has come."""

    def __init__(self, expected: list[str]) -> None:
        self._missing = set(expected)
        self.payloads: list[bytes] = []
        self.buckets: list[FlattenedTensorBucket] = []
        self.flats: list[torch.Tensor] = []

    def receive_payloads(self, payloads: list[bytes]) -> None:
        self.payloads += payloads
        for payload in payloads:
            content = MultiprocessingSerializer.deserialize(payload)
            flat = shared_bytes(content["flattened_tensor"]).clone()
            self.flats.append(flat)
            self.buckets.append(FlattenedTensorBucket(None, flat, content["metadata"]))
            self._missing -= {tensor.name for tensor in content["metadata"]}

    def end_update(self, version: int) -> None:
        if self._missing:
            raise RunError(f"version {version} is refused: {self._missing} are missing")


def post(env: RankEnv) -> list[tuple[str, torch.Tensor]]:
    """What an engine's rank gets, read as SGLang does, which refuses what it does not know."""
    engine = Engine([HEADER, BIAS, "odd", "even"])
    with pytest.raises(RunError, match="version 2 is refused"):
        engine.end_update(2)
    rank = RankSide(half(), bucket_bytes=1000, model_dir=Path(), deadline_s=77.0)
    sender = TensorSender(rank, EngineSide([engine], [[0]], "127.0.0.1", Path()))
    options = sender._group._get_backend(torch.device("cpu")).options
    assert options._timeout.total_seconds() > 77, "they wait for an engine that has 77 seconds"
    sent = sender.send(3)
    engine.end_update(3)
    assert sent.num_bytes == sum(flat.numel() for flat in engine.flats)
    last = None
    for flat in engine.flats:
        assert broken_seal(flat, last) is None
        last = place_of(flat)
    assert last == Place(3, len(engine.flats) - 1, len(engine.flats))
    for payload in engine.payloads:
        [path, *_] = MultiprocessingSerializer.deserialize(payload)["flattened_tensor"]
        assert not Path(path).exists(), "the sender keeps no memory between two updates"
    return [named for bucket in engine.buckets for named in bucket.reconstruct_tensors()[1:]]


class Refusing:
    name = "engine-0"

    def __init__(self) -> None:
        self.path = Path()

    def receive_payloads(self, payloads: list[bytes]) -> None:
        content = MultiprocessingSerializer.deserialize(payloads[0])
        self.path = Path(content["flattened_tensor"][0])
        assert self.path.exists()
        raise RunError("engine-0 refuses")


def refused(env: RankEnv) -> bool:
    """Whether memory is left after an update that the engine refuses."""
    engine = Refusing()
    rank = RankSide(half(), bucket_bytes=1000, model_dir=Path(), deadline_s=77.0)
    sender = TensorSender(rank, EngineSide([engine], [[0]], "127.0.0.1", Path()))
    gc.disable()  # memory is freed at once, not when the collector comes by
    try:
        with pytest.raises(EnginesFailed, match="engine-0 refuses"):
            sender.send(3)
        return engine.path.exists() or "/memfd:" in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


def test_an_update_that_is_refused_leaves_no_memory(one_rank):
    [is_left] = one_rank(refused)
    assert not is_left


def test_a_colocated_engine_gets_both_dtypes_in_one_bucket_within_the_deadline(one_rank):
    [got] = one_rank(post)
    expected = whole_tensors(half())
    assert [name for name, _ in got] == [BIAS, "odd", "even"]
    for name, tensor in got:
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
