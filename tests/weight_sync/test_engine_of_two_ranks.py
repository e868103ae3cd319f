"""An engine of two tensor-parallel ranks: what one of them refuses, the engine refuses.

A plug-in beside ours, in the engine's own processes, changes what its second rank receives.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from nanoslime.config import ModelConfig, RolloutConfig, RunConfig, WeightSyncConfig
from nanoslime.engine_kind import EngineStart
from nanoslime.orchestration.groups import LocalTrainGroup
from nanoslime.processes.ports import free_port
from nanoslime.rollout.engines.sglang_client import SGLangEngine
from nanoslime.rollout.engines.sglang_server import SGLangServer
from nanoslime.rollout.weight_check import checkpoint_shapes
from nanoslime.run_dir import RunDir
from nanoslime.sealed_bucket import Place
from nanoslime.storage import manifest
from nanoslime.training.backend import RankEnv
from nanoslime.types import RunError
from nanoslime.weight_sync.devices import SeparateDevices
from nanoslime.weight_sync.engine_pool import EnginePool
from nanoslime.weight_sync.session import SyncSession
from tests.orchestration.test_weight_sync import gap, run_config, sample, train_once
from tests.rollout.engines.test_sglang_client import assert_serves, flat_of, shared

pytestmark = [pytest.mark.sglang, pytest.mark.matrix, pytest.mark.timeout(500)]
DEADLINE_S = 15.0
PLUGIN = """
import os
import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"


def receive(original, updater, **bucket):
    tensors = original(updater, **bucket)
    if updater.tp_rank == 1 and os.path.exists(os.environ["FLIPS"]):
        os.unlink(os.environ["FLIPS"])
        tensors[1][1].view(-1).view(torch.uint8)[0] ^= 1
    return tensors


def register():
    target = f"{UPDATER}._receive_bucketed_weights_from_distributed"
    HookRegistry.register(target, receive, HookType.AROUND)
"""


@dataclass
class TwoRanks:
    server: SGLangServer
    engine: SGLangEngine
    flips: (
        Path  # where this file is, the second rank flips a bit of what it receives, and removes it
    )


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    directory = tmp_path_factory.mktemp("two_ranks")
    plugin = directory / "plugin"
    info = plugin / "flips-1.0.dist-info"
    info.mkdir(parents=True)
    (plugin / "flips.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flips\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nflips = flips:register\n")
    config = RunConfig(
        model=ModelConfig(dtype="float32"),
        rollout=RolloutConfig(
            engine_tp_size=2, sglang={"max_total_tokens": 8192, "max_running_requests": 64}
        ),
        weight_sync=WeightSyncConfig(deadline_s=DEADLINE_S),
    )
    log = directory / "engine-0.log"
    start = EngineStart(config, 0, tiny_model, device="cpu", host="127.0.0.1", log=log)
    server = SGLangServer(start)
    flips = directory / "flip"
    path = os.pathsep.join([str(plugin), server.env["PYTHONPATH"]])
    server.env |= {"PYTHONPATH": path, "FLIPS": str(flips)}
    try:
        yield TwoRanks(server, server.start(deadline_s=280), flips)
    finally:
        server.close()


def test_both_ranks_agree_on_what_they_are_sent(two: TwoRanks, tiny_model: Path) -> None:
    shapes = checkpoint_shapes(str(tiny_model)).items()
    two.engine.agree([(name, "torch.float32", shape) for name, shape in shapes])
    with pytest.raises(RunError, match="rank 0: tensor .* is sent as torch.float16, and the"):
        two.engine.agree([(name, "torch.float16", shape) for name, shape in shapes])


def test_a_payload_that_is_wrong_for_the_second_rank_is_refused(
    two: TwoRanks, tiny_model: Path, other_model: Path
) -> None:
    tensors = load_file(other_model / "model.safetensors")
    bucket, flat = flat_of(tensors, Place(5, 0, 1))
    wrong = flat.clone()
    wrong[1000] ^= 1
    refusal = "rank 1: refused: bucket 0 of version 5 has not the bytes that were sent"
    two.engine.begin_update()
    with shared(bucket, flat) as right, shared(bucket, wrong) as other:
        with pytest.raises(RunError, match=refusal):
            two.engine.receive_payloads([right, other])
    with pytest.raises(RunError, match="rank 1: refused: 25 of 25 tensors missing"):
        two.engine.end_update(5)
    assert two.engine.policy_version() == 0

    two.engine.begin_update()
    with shared(bucket, flat) as payload:
        two.engine.receive_payloads([payload] * 2)
    two.engine.end_update(5)
    assert_serves(two.engine, other_model)
    two.engine.update_weights_from_disk(str(tiny_model), 0)
    assert_serves(two.engine, tiny_model)


def test_a_file_that_is_wrong_for_one_rank_is_loaded_by_none(
    two: TwoRanks, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    """Each of them hashes every second file; the only one with weights is the second's."""
    path = tmp_path / "weights"
    path.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(other_model / name, path)
    manifest.write(path)
    two.engine.update_weights_from_disk(str(path), 1)
    assert_serves(two.engine, other_model)
    two.engine.update_weights_from_disk(str(tiny_model), 0)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(RunError, match="rank 1: refused .*model.safetensors was altered"):
        two.engine.update_weights_from_disk(str(path), 1)
    assert_serves(two.engine, tiny_model)


def test_a_bit_that_flips_on_the_way_to_the_second_rank_is_seen_in_its_sync(
    two: TwoRanks, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine refuses what its first rank has loaded, and gets all of it once more. At last its
    second rank dies in a sync."""
    meeting = f"tcp://127.0.0.1:{free_port('127.0.0.1')}"
    env = RankEnv(rank=0, world_size=1, local_rank=0, device="cpu", init_method=meeting)
    sync = WeightSyncConfig(bucket_bytes=100_000, deadline_s=DEADLINE_S)
    config = replace(run_config("fsdp"), weight_sync=sync)
    group = LocalTrainGroup(config, RunDir.create(tmp_path, "run"), tiny_model, env)
    pool = EnginePool([two.engine])
    session = SyncSession(
        group,
        pool,
        SeparateDevices(),
        transport="broadcast",
        directory=tmp_path / "weights",
        deadline_s=DEADLINE_S,
    )
    try:
        group.setup()
        session.open([[0]])
        session.sync(1)
        train_once(group._worker, sample(two.engine, seed=1))
        two.flips.touch()
        session.sync(2)
        assert not two.flips.exists()
        assert "sent once more: engine engine-0" in caplog.text
        refusal = "rank 1: refused: bucket 0 of version 2 has not the bytes that were sent"
        assert refusal in caplog.text
        assert two.engine.policy_version() == 2
        assert gap(group._worker, sample(two.engine, seed=2)) < 1e-4

        [second] = [
            child
            for child in psutil.Process(two.server.process.pid).children(recursive=True)
            if "scheduler_TP1" in " ".join(child.cmdline())
        ]
        second.send_signal(signal.SIGKILL)
        with pytest.raises(RunError, match="no engine is left: engine engine-0 at"):
            session.sync(3)
    finally:
        group.close()
