"""Requests go to the engine with the fewest sequences in flight, and away from a lost
one."""

import asyncio
import json
from pathlib import Path

import pytest

from nanoslime.rollout import router as router_module
from nanoslime.rollout.engines import sglang_client
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.router import LeastInflightRouter
from nanoslime.types import GenerateRequest, Generation, RequestFailed, RunError, Status
from tests.rollout.engines.fake_sglang import FakeSGLang, fine, one_sample, serving


class Scripted:
    """An engine for the router only: counts, waits for `gate`, and fails when it is told to."""

    def __init__(self, name: str, *, is_open: bool = False) -> None:
        self.name = name
        self.served = 0
        self.fails = False
        self.is_gone = False
        self.num_bad_checks = 0
        self.num_checks = 0
        self.gate = asyncio.Event()
        if is_open:
            self.gate.set()

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        self.served += request.n
        await self.gate.wait()
        if self.fails:
            raise RequestFailed(f"engine {self.name} failed; log: {self.name}.log")
        return [Generation([1], [0.0], Status.COMPLETED, [(0, 0)])] * request.n

    def health(self) -> bool:
        self.num_checks += 1
        return not self.is_gone and self.num_checks > self.num_bad_checks


@pytest.fixture(scope="module")
def embedded(tiny_model: Path) -> EmbeddedEngine:
    return EmbeddedEngine(str(tiny_model), "float32", "cpu", seed=0)


@pytest.fixture
def quick_health(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "_HEALTH_PAUSE_S", 0.01)


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


def test_counts_are_given_back() -> None:
    async def run() -> None:
        a = Scripted("a")
        b = Scripted("b")
        router = LeastInflightRouter([a, b])
        tasks = [asyncio.create_task(router.generate(make_request(8))) for _ in range(100)]
        await asyncio.sleep(0)
        assert (a.served, b.served) == (400, 400)
        assert router.inflight == {"a": 400, "b": 400}
        a.gate.set()
        b.gate.set()
        await asyncio.gather(*tasks)
        assert router.inflight == {"a": 0, "b": 0}

    asyncio.run(run())


def test_a_lost_engine_leaves_the_rotation_with_its_name(
    caplog: pytest.LogCaptureFixture, quick_health: None
) -> None:
    async def run() -> None:
        a = Scripted("a", is_open=True)
        b = Scripted("b", is_open=True)
        router = LeastInflightRouter([a, b])
        a.fails = a.is_gone = True
        answers = await asyncio.gather(*(router.generate(make_request()) for _ in range(6)))
        assert [answer[0].status for answer in answers] == [Status.COMPLETED] * 6
        assert b.served == 6
        assert a.num_checks == 2
        cause = "engine a failed; log: a.log; it failed 2 health checks"
        assert router.lost == {"a": cause}
        assert router.inflight == {"a": 0, "b": 0}

        served_before = a.served
        await router.generate(make_request())
        assert a.served == served_before

        b.fails = b.is_gone = True
        message = "no engine is left: engine a failed.*; engine b failed; log: b.log"
        with pytest.raises(RunError, match=message):
            await router.generate(make_request())

    asyncio.run(run())
    assert caplog.text.count("out of rotation: engine a failed") == 1


def test_a_request_that_finds_the_last_engines_dead_ends_the_run(quick_health: None) -> None:
    engines = [Scripted("a", is_open=True), Scripted("b", is_open=True)]
    for engine in engines:
        engine.fails = engine.is_gone = True
    with pytest.raises(RunError, match="no engine is left: engine a failed.*; engine b failed"):
        asyncio.run(LeastInflightRouter(engines).generate(make_request()))


def test_one_failed_health_check_does_not_cost_an_engine(quick_health: None) -> None:
    a = Scripted("a", is_open=True)
    a.fails = True
    a.num_bad_checks = 1
    router = LeastInflightRouter([a])
    [answer] = asyncio.run(router.generate(make_request()))
    assert answer.status is Status.ERROR
    assert not router.lost


def test_a_request_that_fails_everywhere_costs_two_tries_and_no_engine() -> None:
    engines = [Scripted(f"e{i}", is_open=True) for i in range(8)]
    for engine in engines:
        engine.fails = True
    router = LeastInflightRouter(engines)
    answers = asyncio.run(router.generate(make_request(n=3)))
    assert [answer.status for answer in answers] == [Status.ERROR] * 3
    assert sum(engine.served for engine in engines) == 2 * 3
    assert max(engine.served for engine in engines) == 3  # the second try went elsewhere
    assert answers[0].error == "engine e1 failed; log: e1.log"
    assert not router.lost


def test_many_requests_are_shared_equally_and_leave_nothing_in_flight() -> None:
    async def run() -> None:
        engines = [Scripted("a"), Scripted("b")]
        router = LeastInflightRouter(engines)
        for number in (1, 2):  # the second round finds no count of the first
            requests = [asyncio.create_task(router.generate(make_request(8))) for _ in range(100)]
            await asyncio.sleep(0)
            assert [engine.served for engine in engines] == [number * 400] * 2
            for engine in engines:
                engine.gate.set()
            await asyncio.gather(*requests)
            for engine in engines:
                engine.gate.clear()
            assert router.inflight == {"a": 0, "b": 0}

    asyncio.run(run())


def test_a_bad_request_does_not_cost_an_engine(embedded: EmbeddedEngine) -> None:
    router = LeastInflightRouter([embedded])
    request = GenerateRequest([99999], n=1, max_new_tokens=1, temperature=1.0)
    with pytest.raises(RunError, match="token id 99999"):
        asyncio.run(router.generate(request))
    assert not router.lost


def test_engines_need_names_of_their_own(embedded: EmbeddedEngine) -> None:
    with pytest.raises(RunError, match="names of their own"):
        LeastInflightRouter([embedded, embedded])


def test_a_server_that_answers_once_with_500_keeps_its_engine() -> None:
    fake = FakeSGLang(lambda number: (500, "{}") if number == 0 else fine())
    with serving(fake) as engine:
        router = LeastInflightRouter([engine])
        [answer] = asyncio.run(router.generate(make_request()))
    assert answer.token_ids == [7]
    assert fake.num_requests == 2
    assert not router.lost


@pytest.mark.parametrize(
    "bad",
    [
        (500, "internal"),
        (503, ""),
        (429, "full"),
        (200, "{"),
        (200, "[]"),
        (200, json.dumps(one_sample(token=100))),
        (200, json.dumps(one_sample(logprob=float("nan")))),
        "hang",
        "close",
    ],
)
def test_failing_requests_become_samples_with_status_error(bad: tuple[int, str] | str) -> None:
    """The server is healthy, and fails every second request whoever it comes from."""
    fakes = [FakeSGLang(lambda number: fine()), FakeSGLang(lambda number: bad)]
    deadline_s = 0.5 if bad == "hang" else 30
    with serving(fakes[0], "good") as good, serving(fakes[1], "bad", deadline_s) as broken:
        router = LeastInflightRouter([good, broken])

        async def run() -> list[list[Generation]]:
            return await asyncio.gather(*(router.generate(make_request()) for _ in range(8)))

        answers = asyncio.run(run())
        alone = asyncio.run(LeastInflightRouter([broken]).generate(make_request()))
    assert [answer[0].token_ids for answer in answers] == [[7]] * 8
    assert (fakes[0].num_requests, fakes[1].num_requests) == (8, 4 + 2)
    assert alone[0].status is Status.ERROR
    assert "engine bad at http://127.0.0.1" in alone[0].error
    assert not router.lost


def test_a_refused_request_is_not_tried_again() -> None:
    refusal = json.dumps({"error": {"message": "top_k must be -1 or at least 1"}})
    fake = FakeSGLang(lambda number: (400, refusal))
    with serving(fake) as engine:
        answers = asyncio.run(LeastInflightRouter([engine]).generate(make_request(n=2)))
    assert [answer.status for answer in answers] == [Status.ERROR] * 2
    assert answers[0].error == "SGLang refused it (400): top_k must be -1 or at least 1"
    assert fake.num_requests == 1


def test_a_hung_engine_is_lost(quick_health: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests run out of time, and so does its health check."""
    monkeypatch.setattr(sglang_client, "_HEALTH_DEADLINE_S", 0.2)
    hung = FakeSGLang(lambda number: "hang", hangs=True)
    good = FakeSGLang(lambda number: fine())
    with serving(hung, "hung", deadline_s=0.5) as first, serving(good, "good") as second:
        router = LeastInflightRouter([first, second])
        answers = asyncio.run(router.generate(make_request()))
    assert answers[0].token_ids == [7]
    assert "/generate was not answered within 0.5 s" in router.lost["hung"]


def test_an_engine_without_a_version_says_what_it_answered() -> None:
    fake = FakeSGLang(lambda number: fine())
    with serving(fake) as engine, pytest.raises(RunError) as caught:
        engine.policy_version()
    assert "/model_info answered no weight version that is a number (200): ''" in str(caught.value)
