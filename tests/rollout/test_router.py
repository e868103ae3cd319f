"""Requests go to the engine with the fewest sequences in flight, and away from a lost
one."""

import asyncio
from pathlib import Path

import pytest

from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.router import LeastInflightRouter
from nanoslime.types import EngineLost, GenerateRequest, Generation, RunError, Status


class Scripted:
    """An engine for the router only: counts, waits for `gate`, and fails when it is told to."""

    def __init__(self, name: str, *, is_open: bool = False) -> None:
        self.name = name
        self.served = 0
        self.fails = False
        self.gate = asyncio.Event()
        if is_open:
            self.gate.set()

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        self.served += request.n
        await self.gate.wait()
        if self.fails:
            raise EngineLost(f"engine {self.name} is gone; log: {self.name}.log")
        return [Generation([1], [0.0], Status.COMPLETED, [(0, 0)])] * request.n


@pytest.fixture(scope="module")
def embedded(tiny_model: Path) -> EmbeddedEngine:
    return EmbeddedEngine(str(tiny_model), "float32", "cpu", seed=0)


def make_request(n: int = 1) -> GenerateRequest:
    return GenerateRequest([1], n=n, max_new_tokens=1, temperature=1.0)


def test_least_inflight_counts_sequences_not_requests() -> None:
    async def run() -> None:
        a = Scripted("a")
        b = Scripted("b")
        router = LeastInflightRouter([a, b])
        tasks = [asyncio.create_task(router.generate(make_request(n))) for n in (4, 1, 1, 1, 1)]
        last = asyncio.create_task(router.generate(make_request(8)))
        await asyncio.sleep(0)
        assert a.served == 4 + 8
        assert b.served == 4

        b.gate.set()
        await asyncio.gather(*tasks[1:])
        another = asyncio.create_task(router.generate(make_request(2)))
        await asyncio.sleep(0)
        assert b.served == 4 + 2

        a.gate.set()
        answers = await asyncio.gather(*tasks, last, another)
        assert len(answers) == 7

    asyncio.run(run())


def test_a_lost_engine_leaves_the_rotation_with_its_name(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        a = Scripted("a", is_open=True)
        b = Scripted("b", is_open=True)
        router = LeastInflightRouter([a, b])
        a.fails = True
        answers = await asyncio.gather(*(router.generate(make_request()) for _ in range(6)))
        assert len(answers) == 6
        assert b.served == 6
        assert router.lost == {"a": "engine a is gone; log: a.log"}

        served_before = a.served
        await router.generate(make_request())
        assert a.served == served_before

        b.fails = True
        message = "no engine is left: engine a is gone.*; engine b is gone; log: b.log"
        with pytest.raises(RunError, match=message):
            await router.generate(make_request())

    asyncio.run(run())
    assert caplog.text.count("out of rotation: engine a is gone") == 1


def test_a_bad_request_does_not_cost_an_engine(embedded: EmbeddedEngine) -> None:
    router = LeastInflightRouter([embedded])
    request = GenerateRequest([99999], n=1, max_new_tokens=1, temperature=1.0)
    with pytest.raises(RunError, match="token id 99999"):
        asyncio.run(router.generate(request))
    assert not router.lost


def test_engines_need_names_of_their_own(embedded: EmbeddedEngine) -> None:
    with pytest.raises(RunError, match="names of their own"):
        LeastInflightRouter([embedded, embedded])
