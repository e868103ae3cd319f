"""What every entry of TRANSPORTS keeps: after a sync the engine has the trainer's weights
and their version.
"""

from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from nanoslime.orchestration.devices import SeparateDevices
from nanoslime.orchestration.engine_pool import EnginePool
from nanoslime.orchestration.local_group import LocalTrainGroup
from nanoslime.plugins import resolve
from nanoslime.processes.ports import free_port
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.run_dir import RunDir
from nanoslime.training.backend import RankEnv
from nanoslime.weight_sync.session import SyncSession
from nanoslime.weight_sync.transport import TRANSPORTS, Delivery
from tests.orchestration.test_weight_sync import gap, run_config, sample, train_once

EMBEDDED = ("in_process", "none")
CASES = [
    pytest.param(name, marks=[] if name in EMBEDDED else [pytest.mark.sglang])
    for name in TRANSPORTS
]


@pytest.mark.parametrize("transport", CASES)
def test_an_engine_has_the_trainers_weights_after_a_sync(
    transport: str, request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path
):
    if transport in EMBEDDED:
        engine = EmbeddedEngine(str(tiny_model), "float32", "cpu", seed=0)
    else:
        engine = request.getfixturevalue("sglang_engine")
    meeting = f"tcp://127.0.0.1:{free_port('127.0.0.1')}"
    env = RankEnv(rank=0, world_size=1, local_rank=0, device="cpu", init_method=meeting)
    group = LocalTrainGroup(run_config("fsdp"), RunDir.create(tmp_path, "run"), tiny_model, env)
    engines = EnginePool([engine])
    session = SyncSession(
        group,
        engines,
        SeparateDevices(),
        transport=transport,
        directory=tmp_path / "weights",
        deadline_s=120.0,
    )
    try:
        group.setup()
        session.open([[0]])
        worker = group._worker
        for version in (1, 2):
            groups = sample(engine, seed=version)
            train_once(worker, groups)
            assert gap(worker, groups) > 1e-2, "a stale engine would not be seen"
            session.sync(version)
            if TRANSPORTS[transport].delivery is Delivery.NOTHING:
                assert session.version == engine.policy_version() == 0
            else:
                assert session.version == engine.policy_version() == version
                assert gap(worker, sample(engine, seed=10 + version)) < 1e-4
            assert not holders_of_shared_bytes()
    finally:
        group.close()


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
