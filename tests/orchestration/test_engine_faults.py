"""Two real SGLang servers under a router, a pool and a weight sync; one of them is killed, stopped
or lies, at any time. The other serves on, no request is lost, and the one that is started again
has the current weights before it serves.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanoslime.config.rollout import WeightSyncConfig
from nanoslime.orchestration.groups import LocalTrainGroup
from nanoslime.processes.ports import free_port
from nanoslime.rollout import router as router_module
from nanoslime.rollout.engines import sglang_client
from nanoslime.rollout.engines.sglang_server import SGLangServer
from nanoslime.rollout.router import Router
from nanoslime.run_dir import RunDir
from nanoslime.training.backend import RankEnv
from nanoslime.types import Engine, GenerateRequest, Generation, Status
from nanoslime.weight_sync import broadcast
from nanoslime.weight_sync.devices import SeparateDevices
from nanoslime.weight_sync.engine_pool import EnginePool, EngineState
from nanoslime.weight_sync.session import SyncSession
from tests.orchestration.test_weight_sync import gap, run_config, sample, train_once
from tests.serving import make_server, num_running

pytestmark = [pytest.mark.sglang, pytest.mark.matrix, pytest.mark.timeout(600)]
DEADLINE_S = 10.0


@dataclass
class Place:
    """Where one engine runs, again and again."""

    name: str
    model: Path
    log: Path
    server: SGLangServer | None = None

    def start(self) -> Engine:
        self.close()
        index = int(self.name[-1])
        self.server = make_server(self.model, self.log, index=index, deadline_s=DEADLINE_S)
        return self.server.start(deadline_s=280)

    def signal(self, number: signal.Signals, part: str = "") -> None:
        """Sends it to the server, or to the one of its processes whose title has `part`."""
        pid = self.server.process.pid
        if not part:
            os.killpg(pid, number)
            return
        children = psutil.Process(pid).children(recursive=True)
        [child] = [child for child in children if part in " ".join(child.cmdline())]
        child.send_signal(number)

    def close(self) -> None:
        if self.server is not None:
            self.server.close()


@dataclass
class Run:
    """What a driver has: the pool, the sync and a trainer; the router is the worker's."""

    places: list[Place]
    pool: EnginePool
    session: SyncSession
    group: LocalTrainGroup
    version: int = 0
    told: list[list[Engine]] = field(default_factory=list)

    def sync(self) -> None:
        """A step that moves the weights, and their sync."""
        engine = self.pool.ready()[0] if self.version else self.pool.in_sync()[0]
        train_once(self.group._worker, sample(engine, seed=self.version))
        self.version += 1
        self.session.sync(self.version)

    def all_ready(self) -> None:
        end = time.monotonic() + 200
        while len(self.pool.ready()) < len(self.places):
            assert time.monotonic() < end, self.pool.states()
            self.pool.service(self.session.join)
            time.sleep(0.1)
        for engine in self.pool.ready():
            assert engine.policy_version() == self.version
            assert gap(self.group._worker, sample(engine, seed=100)) < 1e-4


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    directory = tmp_path_factory.mktemp("faults")
    places = [Place(f"engine-{i}", tiny_model, directory / f"engine-{i}.log") for i in range(2)]
    meeting = f"tcp://127.0.0.1:{free_port('127.0.0.1')}"
    env = RankEnv(rank=0, world_size=1, local_rank=0, device="cpu", init_method=meeting)
    sync = WeightSyncConfig(bucket_bytes=100_000, deadline_s=DEADLINE_S)
    config = replace(run_config("fsdp"), weight_sync=sync)
    group = LocalTrainGroup(config, RunDir.create(directory, "run"), tiny_model, env)
    try:
        with ThreadPoolExecutor() as threads:
            engines = list(threads.map(Place.start, places))
        group.setup()
        pool = EnginePool(engines, [place.start for place in places], max_restarts=20)
        session = SyncSession(
            group,
            pool,
            SeparateDevices(),
            transport="broadcast",
            directory=directory / "weights",
            deadline_s=DEADLINE_S,
        )
        session.open([[0], []])
        run = Run(places, pool, session, group)
        run.sync()
        run.all_ready()
        yield run
        pool.close()
    finally:
        group.close()
        for place in places:
            place.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "_SILENCE_S", 2.0)
    monkeypatch.setattr(sglang_client, "_HEALTH_DEADLINE_S", 4.0)
    monkeypatch.setattr("nanoslime.weight_sync.engine_pool._LONGER", 1.0)


def request(tokens: int) -> GenerateRequest:
    return GenerateRequest([40, 41, 42], n=1, max_new_tokens=tokens, temperature=1.0)


async def under_fault(
    run: Run, fault: Callable[[], None]
) -> tuple[list[Generation], dict[str, str]]:
    """Twelve groups' requests over both engines; the fault comes once all run.

    Returns the answers, and the engines that the router lost.
    """
    router = Router(run.pool.ready(), max_inflight=8)
    tasks = [asyncio.create_task(router.generate(request(1200), f"{i}")) for i in range(12)]
    async with asyncio.timeout(60):
        while not all([await asyncio.to_thread(num_running, e) for e in run.pool.ready()]):
            await asyncio.sleep(0.05)
    await asyncio.to_thread(fault)
    start = time.monotonic()
    async with asyncio.timeout(60):
        while not router.lost:
            await asyncio.sleep(0.05)
    print(f"; noticed after {time.monotonic() - start:.1f} s", end="")
    answers = await asyncio.wait_for(asyncio.gather(*tasks), 200)
    await router.close()
    return [generation for answer in answers for generation in answer], router.lost


FAULTS = {
    "SIGKILL of the server": (signal.SIGKILL, ""),
    "SIGSTOP of the server": (signal.SIGSTOP, ""),
    "SIGKILL of the scheduler": (signal.SIGKILL, "scheduler"),
    "SIGSTOP of the scheduler": (signal.SIGSTOP, "scheduler"),
    "SIGSTOP of the detokenizer": (signal.SIGSTOP, "detokenizer"),
}
# The detokenizer has no part in a sync.
SYNC_FAULTS = [fault for fault in FAULTS if "detokenizer" not in fault]


@pytest.mark.parametrize("fault", FAULTS)
def test_requests_of_an_engine_that_fails_are_answered_by_the_other(run: Run, fault: str) -> None:
    run.all_ready()
    print(f"\n{fault} under requests", end="")
    answers, lost = asyncio.run(under_fault(run, lambda: run.places[1].signal(*FAULTS[fault])))
    assert lost.keys() == {"engine-1"}
    run.pool.lost("engine-1", lost["engine-1"])
    assert [answer.status for answer in answers] == [Status.TRUNCATED] * 12
    assert {len(answer.token_ids) for answer in answers} == {1200}
    assert {version for answer in answers for _, version in answer.versions} == {run.version}
    assert run.pool.states() == [EngineState.READY, EngineState.STARTING]
    start = time.monotonic()
    run.all_ready()
    print(f"; served again after {time.monotonic() - start:.0f} s")


@pytest.mark.parametrize("fault", SYNC_FAULTS)
def test_a_sync_ends_well_without_an_engine_that_fails_during_it(
    run: Run, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails after the first of several buckets; another hangs in the broadcast then."""
    run.all_ready()
    send = broadcast._Wire.send
    num_buckets = 0

    def faulty(*arguments: Any) -> None:
        nonlocal num_buckets
        num_buckets += 1
        if num_buckets == 2:
            run.places[1].signal(*FAULTS[fault])
        send(*arguments)

    monkeypatch.setattr(broadcast._Wire, "send", faulty)
    healthy = run.pool.ready()[0]
    start = time.monotonic()
    run.sync()
    sync_s = time.monotonic() - start
    assert sync_s < 12 * DEADLINE_S
    assert num_buckets >= 2
    serving = [engine.name for engine in run.pool.ready()]
    assert "engine-1" not in serving
    run.all_ready()
    print(f"\n{fault} in a sync: it took {sync_s:.1f} s and {serving} served after it")
    assert serving == ["engine-0"] and run.pool.ready()[0] == healthy
