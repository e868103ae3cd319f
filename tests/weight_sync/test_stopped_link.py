"""The link to an engine stops in the middle of a sync, with everything at both of its ends alive.

In a network namespace of its own the test has a trainer and one engine; the other engine is in a
second one, behind a pair of virtual interfaces.

    [ trainer, engine-0   v0 ]-----[ v1   engine-1 ]
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanoslime.config import ModelConfig, RolloutConfig, RunConfig, WeightSyncConfig
from nanoslime.engine_kind import EngineStart
from nanoslime.orchestration.groups import LocalTrainGroup
from nanoslime.processes.ports import free_port
from nanoslime.rollout.engines.sglang_server import SGLangServer
from nanoslime.run_dir import RunDir
from nanoslime.training.backend import RankEnv
from nanoslime.weight_sync import broadcast
from nanoslime.weight_sync.devices import SeparateDevices
from nanoslime.weight_sync.engine_pool import EnginePool
from nanoslime.weight_sync.session import SyncSession
from tests import process_table
from tests.orchestration.test_weight_sync import gap, run_config, sample, train_once

pytestmark = [pytest.mark.sglang, pytest.mark.matrix, pytest.mark.timeout(500)]
INSIDE = "TEST_IS_IN_A_NAMESPACE"
HERE = "10.9.0.1"
THERE = "10.9.0.2"
DEADLINE_S = 8.0


def test_a_link_that_stops_in_a_sync_costs_the_engine_behind_it_and_no_other() -> None:
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("a network namespace needs root")
    test = f"{__file__}::test_inside_a_namespace"
    command = ["unshare", "-n", sys.executable, "-m", "pytest", "-q", "-s", "-m", "matrix", test]
    told = subprocess.run(command, env=os.environ | {INSIDE: "1"}, capture_output=True, text=True)
    print(told.stdout[-3000:])
    assert told.returncode == 0, told.stdout[-6000:] + told.stderr[-3000:]
    assert "1 passed" in told.stdout


@pytest.fixture
def far_side() -> Iterator[list[str]]:
    """What runs a command at the other end of the link."""
    holder = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
    try:
        ours = os.readlink("/proc/self/ns/net")
        there = f"/proc/{holder.pid}/ns/net"
        assert process_table.wait_for(lambda: os.readlink(there) != ours, 20)
        inside = ["nsenter", "-t", str(holder.pid), "-n"]
        for command in (
            ["ip", "link", "set", "lo", "up"],
            ["ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"],
            ["ip", "link", "set", "v1", "netns", str(holder.pid)],
            ["ip", "addr", "add", f"{HERE}/24", "dev", "v0"],
            ["ip", "link", "set", "v0", "up"],
            [*inside, "ip", "link", "set", "lo", "up"],
            [*inside, "ip", "addr", "add", f"{THERE}/24", "dev", "v1"],
            [*inside, "ip", "link", "set", "v1", "up"],
        ):
            subprocess.run(command, check=True)
        yield inside
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.skipif(INSIDE not in os.environ, reason="the test above runs it")
def test_inside_a_namespace(
    far_side: list[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "v0")
    config = RunConfig(
        model=ModelConfig(dtype="float32"),
        rollout=RolloutConfig(sglang={"max_total_tokens": 8192, "max_running_requests": 64}),
        weight_sync=WeightSyncConfig(deadline_s=DEADLINE_S),
    )
    servers = []
    for index, host in enumerate((HERE, THERE)):
        log = tmp_path / f"engine-{index}.log"
        start = EngineStart(config, index, tiny_model, device="cpu", host=host, log=log)
        servers.append(SGLangServer(start, port=30_000 + index))
    servers[1].command = [*far_side, *servers[1].command]
    servers[1].env["GLOO_SOCKET_IFNAME"] = "v1"
    meeting = f"tcp://127.0.0.1:{free_port('127.0.0.1')}"
    env = RankEnv(rank=0, world_size=1, local_rank=0, device="cpu", init_method=meeting)
    sync = WeightSyncConfig(bucket_bytes=100_000, deadline_s=DEADLINE_S)
    settings = replace(run_config("fsdp"), weight_sync=sync)
    group = LocalTrainGroup(settings, RunDir.create(tmp_path, "run"), tiny_model, env)
    group.address = HERE
    try:
        engines = [server.start(deadline_s=200) for server in servers]
        group.setup()
        pool = EnginePool(engines)
        session = SyncSession(
            group,
            pool,
            SeparateDevices(),
            transport="broadcast",
            directory=tmp_path / "weights",
            deadline_s=DEADLINE_S,
        )
        session.open([[0], []])
        session.sync(1)
        assert pool.ready() == engines
        train_once(group._worker, sample(engines[0], seed=1))

        send = broadcast._Wire.send
        seen = []

        def stopping(wire: Any, bucket: Any, *more: Any) -> None:
            seen.append(bucket)
            if len(seen) == 2:
                subprocess.run([*far_side, "ip", "link", "set", "v1", "down"], check=True)
            send(wire, bucket, *more)

        monkeypatch.setattr(broadcast._Wire, "send", stopping)
        begin = time.monotonic()
        session.sync(2)
        seconds = time.monotonic() - begin
        [place] = [place for place in pool._places if place.cause]
        print(f"\n| broadcast, the link to engine-1 stops | {seconds:.1f} | {place.cause[:300]} |")
        assert seconds < 12 * DEADLINE_S
        assert place.engine.name == "engine-1" and THERE in place.cause
        assert pool.ready() == engines[:1]
        assert engines[0].policy_version() == session.version == 2
        assert gap(group._worker, sample(engines[0], seed=2)) < 1e-4
    finally:
        group.close()
        for server in servers:
            server.close()
