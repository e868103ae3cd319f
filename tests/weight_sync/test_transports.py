"""What every entry of TRANSPORTS keeps: after a sync the engine has the trainer's weights
and their version.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from nanoslime.config.rollout import WeightSyncConfig
from nanoslime.orchestration.groups import LocalTrainGroup
from nanoslime.orchestration.worker import TrainWorker
from nanoslime.plugins import resolve
from nanoslime.processes.ports import free_port
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.run_dir import RunDir
from nanoslime.training.backend import RankEnv
from nanoslime.types import Engine
from nanoslime.weight_sync.devices import SeparateDevices
from nanoslime.weight_sync.engine_calls import EnginesFailed
from nanoslime.weight_sync.engine_pool import EnginePool
from nanoslime.weight_sync.probe import Probe
from nanoslime.weight_sync.session import SyncSession
from nanoslime.weight_sync.transport import TRANSPORTS, Delivery
from tests.orchestration.test_weight_sync import gap, run_config, sample, train_once
from tests.serving import make_server

EMBEDDED = ("in_process", "none")
CASES = [
    pytest.param(name, marks=[] if name in EMBEDDED else [pytest.mark.sglang])
    for name in TRANSPORTS
]


LAYER = "model.layers.1.mlp.down_proj.weight"


@dataclass
class Opened:
    session: SyncSession
    worker: TrainWorker


@contextmanager
def opened(
    engine: Engine,
    model: Path,
    tmp_path: Path,
    transport: str = "broadcast",
    *,
    bucket_bytes: int | None = None,
    probe: Probe | None = None,
) -> Iterator[Opened]:
    """The weight sync from one trainer rank of `model` to the engine."""
    config = run_config("fsdp")
    if bucket_bytes is not None:
        config = replace(config, weight_sync=WeightSyncConfig(bucket_bytes=bucket_bytes))
    meeting = f"tcp://127.0.0.1:{free_port('127.0.0.1')}"
    env = RankEnv(rank=0, world_size=1, local_rank=0, device="cpu", init_method=meeting)
    group = LocalTrainGroup(config, RunDir.create(tmp_path, "run"), model, env)
    session = SyncSession(
        group,
        EnginePool([engine]),
        SeparateDevices(),
        transport=transport,
        directory=tmp_path / "weights",
        deadline_s=120.0,
        probe=probe,
    )
    try:
        group.setup()
        session.open([[0]])
        yield Opened(session, group._worker)
    finally:
        group.close()


@pytest.mark.parametrize("transport", CASES)
def test_an_engine_has_the_trainers_weights_after_a_sync(
    transport: str, request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path
):
    if transport in EMBEDDED:
        engine = EmbeddedEngine(str(tiny_model), "float32", "cpu", seed=0)
    else:
        engine = request.getfixturevalue("sglang_engine")
    with opened(engine, tiny_model, tmp_path, transport) as sync:
        for version in (1, 2):
            groups = sample(engine, seed=version)
            train_once(sync.worker, groups)
            assert gap(sync.worker, groups) > 1e-2, "a stale engine would not be seen"
            sync.session.sync(version)
            if TRANSPORTS[transport].delivery is Delivery.NOTHING:
                assert sync.session.version == engine.policy_version() == 0
            else:
                assert sync.session.version == engine.policy_version() == version
                assert gap(sync.worker, sample(engine, seed=10 + version)) < 1e-4
            assert not holders_of_shared_bytes()


@pytest.mark.sglang
@pytest.mark.parametrize("fault", ["the engine's weights", "the trainer's weights"])
def test_weights_that_are_scaled_behind_our_back_end_the_run_in_the_same_sync(
    fault: str,
    sglang_engine: SGLangEngine,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """In the engine, under the right label, once it has everything; or in a layer of the trainer,
    when it has put them into buckets.
    """
    scaled = tmp_path / "scaled"
    shutil.copytree(tiny_model, scaled)
    tensors = load_file(scaled / "model.safetensors")
    tensors[LAYER] *= 1.1
    save_file(tensors, scaled / "model.safetensors", {"format": "pt"})
    resume, score = SGLangEngine.resume, TrainWorker.score

    def resumed(engine: SGLangEngine) -> None:
        engine.update_weights_from_disk(str(scaled), 2)
        resume(engine)

    def scored(worker: TrainWorker, token_ids: list[int]) -> list[float] | None:
        for shard in worker.backend.weight_shards():
            if shard.name == LAYER:
                shard.tensor.mul_(1.1)
        return score(worker, token_ids)

    probe = Probe(list(range(40, 72)), max_gap=0.01)
    message = "engine engine-0 gives 31 tokens .* version 2 .*max_logprob_gap is 0.01"
    with opened(sglang_engine, tiny_model, tmp_path, bucket_bytes=1 << 30, probe=probe) as sync:
        metrics = sync.session.sync(1)
        assert 0 <= metrics["weight_sync/logprob_gap_max"] < 1e-4
        if fault == "the engine's weights":
            monkeypatch.setattr(SGLangEngine, "resume", resumed)
        else:
            monkeypatch.setattr(TrainWorker, "score", scored)
        with pytest.raises(EnginesFailed, match=message):
            sync.session.sync(2)


OTHERWISE = {
    "dtype": ({"dtype": "bfloat16"}, "is sent as torch.float32, and the engine was loaded as"),
    "override": (
        {"json_model_override_args": '{"num_hidden_layers": 1}'},
        r"'model.layers.1.*' has shape \[.*\], and the engine loaded no such tensor",
    ),
    "model": ({}, "unknown tensor 'model.layers.1"),
}


@pytest.mark.sglang
@pytest.mark.matrix
@pytest.mark.timeout(500)
@pytest.mark.parametrize("difference", OTHERWISE)
def test_an_engine_that_was_started_otherwise_is_refused_before_anything_pauses(
    difference: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options, problem = OTHERWISE[difference]
    own = tmp_path / "model"
    shutil.copytree(tiny_model, own)
    if difference == "model":
        config = json.loads((own / "config.json").read_text())
        config |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
        (own / "config.json").write_text(json.dumps(config))
    paused: list[str] = []
    monkeypatch.setattr(SGLangEngine, "pause", lambda engine, mode: paused.append(mode))
    server = make_server(own, tmp_path / "engine.log", free_port("127.0.0.1"), **options)
    try:
        engine = server.start(deadline_s=280)
        with opened(engine, tiny_model, tmp_path) as sync:
            with pytest.raises(EnginesFailed, match=f"engine engine-0 .*{problem}"):
                sync.session.sync(1)
        assert not paused and engine.health()
    finally:
        server.close()


def holders_of_shared_bytes() -> list[psutil.Process]:
    """Of this process and its servers, those that still have memory of a trainer rank mapped."""
    this = psutil.Process()
    holders = []
    for process in [this, *this.children(recursive=True)]:
        with suppress(OSError):
            if "/memfd:nanoslime" in Path(f"/proc/{process.pid}/maps").read_text():
                holders.append(process)
    return holders


@pytest.mark.sglang
@pytest.mark.parametrize("name", [name for name, way in TRANSPORTS.items() if way.sender])
def test_a_sender_has_the_methods_of_its_protocol(name):
    sender = resolve(TRANSPORTS[name].sender, {}, "weight_sync.transport")
    assert callable(sender.send) and callable(sender.close)
