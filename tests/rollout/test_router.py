"""Requests go to the engine of their key or the least busy one, and away from a lost one."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from nanoslime.rollout import router as router_module
from nanoslime.rollout.engines import sglang_client
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.router import Router
from nanoslime.types import GenerateRequest, Generation, RequestFailed, RunError, Status
from tests.rollout.engines.fake_sglang import FakeSGLang, fine, one_sample, serving


def inflight(router: Router) -> dict[str, int]:
    """The sequences that each engine has been asked for and has not yet answered."""
    return {name: slot.inflight for name, slot in router._slots.items()}


class Scripted:
    """An engine for the router only: counts, waits for `gate`, and fails when it is told to."""

    def __init__(self, name: str, *, is_open: bool = False) -> None:
        self.name = name
        self.served = 0
        self.fails = False
        self.is_gone = False
        self.num_bad_checks = 0
        self.num_checks = 0
        self.num_interrupts = 0
        self.misses_interrupts = 0
        self.gate = asyncio.Event()
        self.is_interrupted = threading.Event()
        if is_open:
            self.gate.set()

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        self.served += request.n
        while not (self.gate.is_set() or self.is_interrupted.is_set()):
            await asyncio.sleep(0)
        if self.fails:
            raise RequestFailed(f"engine {self.name} failed; log: {self.name}.log")
        if not self.gate.is_set():
            return [Generation([1, 2], [0.0, 0.0], Status.ABORTED, [(0, 0)])] * request.n
        done = Generation([1], [0.0], Status.COMPLETED, [(0, 0)], parse_s=0.25)
        return [done] * request.n

    def interrupt(self) -> None:
        self.num_interrupts += 1
        if self.is_gone:
            raise RunError(f"engine {self.name} is gone")
        if self.num_interrupts > self.misses_interrupts:
            self.is_interrupted.set()

    def health(self) -> bool:
        self.num_checks += 1
        return not self.is_gone and self.num_checks > self.num_bad_checks


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


async def settled() -> None:
    """Lets tasks that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


def run_within(main: Coroutine[Any, Any, Any], timeout_s: float = 20.0) -> Any:
    return asyncio.run(asyncio.wait_for(main, timeout_s))


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
        router = Router([a, b])
        tasks = [asyncio.create_task(router.generate(make_request(n))) for n in (4, 1, 1, 1, 1)]
        last = asyncio.create_task(router.generate(make_request(8)))
        await settled()
        assert a.served == 4 + 8
        assert b.served == 4

        b.gate.set()
        await asyncio.gather(*tasks[1:])
        another = asyncio.create_task(router.generate(make_request(2)))
        await settled()
        assert b.served == 4 + 2

        a.gate.set()
        answers = await asyncio.gather(*tasks, last, another)
        assert len(answers) == 7

    asyncio.run(run())


def test_a_lost_engine_leaves_the_rotation_with_its_cause(
    caplog: pytest.LogCaptureFixture, quick_health: None
) -> None:
    async def run() -> None:
        a = Scripted("a", is_open=True)
        b = Scripted("b", is_open=True)
        router = Router([a, b])
        a.fails = a.is_gone = True
        answers = await asyncio.gather(*(router.generate(make_request()) for _ in range(6)))
        assert [answer[0].status for answer in answers] == [Status.COMPLETED] * 6
        assert b.served == 6
        assert a.num_checks == 2
        cause = "engine a failed; log: a.log; it failed 2 health checks"
        assert router.take_lost() == {"a": cause}
        assert router.take_lost() == {}
        assert inflight(router) == {"b": 0}

        served_before = a.served
        await router.generate(make_request())
        assert a.served == served_before

    run_within(run())
    assert caplog.text.count("out of rotation: engine a failed") == 1


def test_requests_wait_while_there_is_no_engine(quick_health: None) -> None:
    """Whether one comes back is for others to decide; then it serves what has waited."""

    async def run() -> None:
        a = Scripted("a", is_open=True)
        router = Router([a])
        a.fails = a.is_gone = True
        waiting = [asyncio.create_task(router.generate(make_request())) for _ in range(3)]
        await until(lambda: bool(router.lost))
        await settled()
        assert not any(task.done() for task in waiting)
        again = Scripted("a", is_open=True)
        router.set_engines([again])
        answers = await asyncio.gather(*waiting)
        assert [answer[0].status for answer in answers] == [Status.COMPLETED] * 3
        assert again.served == 3

    run_within(run())


def test_what_a_lost_engine_had_goes_elsewhere_at_once(
    quick_health: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is silent; nothing of it ever fails."""
    monkeypatch.setattr(router_module, "_SILENCE_S", 0.1)

    async def run() -> None:
        hung = Scripted("a")
        hung.is_gone = True
        router = Router([hung])
        tasks = [asyncio.create_task(router.generate(make_request(2))) for _ in range(3)]
        await settled()
        good = Scripted("b", is_open=True)
        router.set_engines([hung, good])
        answers = await asyncio.gather(*tasks)
        assert [len(answer) for answer in answers] == [2] * 3
        assert (hung.served, good.served) == (6, 6)
        assert "engine a answered nothing for 0 s" in router.lost["a"]
        assert inflight(router) == {"b": 0}

    run_within(run())


def test_an_engine_that_hangs_at_the_next_turn_of_its_only_rollout_is_lost(
    quick_health: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next request follows the answer at once."""
    monkeypatch.setattr(router_module, "_SILENCE_S", 0.1)

    async def run() -> None:
        a = Scripted("a", is_open=True)
        good = Scripted("b", is_open=True)
        router = Router([a])
        await router.generate(make_request())
        a.gate.clear()
        a.is_gone = True

        async def replace() -> None:
            await until(lambda: bool(router.lost))
            router.set_engines([good])

        replaced = asyncio.create_task(replace())
        [answer] = await router.generate(make_request())
        assert answer.status is Status.COMPLETED
        await replaced

    run_within(run())


def test_a_busy_engine_that_is_healthy_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "_SILENCE_S", 0.02)

    async def run() -> None:
        slow = Scripted("a")
        router = Router([slow])
        task = asyncio.create_task(router.generate(make_request()))
        await until(lambda: slow.num_checks >= 3)
        slow.gate.set()
        assert (await task)[0].status is Status.COMPLETED
        num_checks = slow.num_checks
        await asyncio.sleep(0.1)
        assert slow.num_checks == num_checks, "an idle engine is not asked"
        assert not router.lost

    run_within(run())


def test_a_request_that_costs_every_engine_is_given_up(quick_health: None) -> None:
    async def run() -> None:
        engines = [Scripted(f"e{i}", is_open=True) for i in range(6)]
        for engine in engines:
            engine.fails = engine.is_gone = True
        router = Router(engines)
        [answer] = await router.generate(make_request())
        assert answer.status is Status.ERROR and "engine e3 failed" in answer.error
        assert len(router.lost) == 4 and len(inflight(router)) == 2

    run_within(run())


def test_one_failed_health_check_does_not_cost_an_engine(quick_health: None) -> None:
    a = Scripted("a", is_open=True)
    a.fails = True
    a.num_bad_checks = 1
    router = Router([a])
    [answer] = asyncio.run(router.generate(make_request()))
    assert answer.status is Status.ERROR
    assert not router.lost


def test_a_request_that_fails_everywhere_costs_two_tries_and_no_engine() -> None:
    engines = [Scripted(f"e{i}", is_open=True) for i in range(8)]
    for engine in engines:
        engine.fails = True
    router = Router(engines)
    answers = asyncio.run(router.generate(make_request(n=3)))
    assert [answer.status for answer in answers] == [Status.ERROR] * 3
    assert sum(engine.served for engine in engines) == 2 * 3
    assert max(engine.served for engine in engines) == 3  # the second try went elsewhere
    assert answers[0].error == "engine e1 failed; log: e1.log"
    assert not router.lost


def test_many_requests_are_shared_equally_and_leave_nothing_in_flight() -> None:
    async def run() -> None:
        engines = [Scripted("a"), Scripted("b")]
        router = Router(engines, max_inflight=400)
        for number in (1, 2):  # the second round finds no count of the first
            requests = [asyncio.create_task(router.generate(make_request(8))) for _ in range(100)]
            await settled()
            assert [engine.served for engine in engines] == [number * 400] * 2
            for engine in engines:
                engine.gate.set()
            await asyncio.gather(*requests)
            for engine in engines:
                engine.gate.clear()
            assert inflight(router) == {"a": 0, "b": 0}

    asyncio.run(run())


def test_a_bad_request_does_not_cost_an_engine(embedded: EmbeddedEngine) -> None:
    router = Router([embedded])
    request = GenerateRequest([99999], n=1, max_new_tokens=1, temperature=1.0)
    with pytest.raises(RunError, match="token id 99999"):
        asyncio.run(router.generate(request))
    assert not router.lost


def test_requests_of_one_key_go_to_one_engine_unless_it_is_much_busier() -> None:
    async def run() -> None:
        a = Scripted("a")
        b = Scripted("b")
        router = Router([a, b])
        tasks = []

        async def send(key: str, n: int) -> tuple[int, int]:
            tasks.append(asyncio.create_task(router.generate(make_request(n), key)))
            await settled()
            return a.served, b.served

        assert await send("x", 4) == (4, 0)
        assert await send("y", 1) == (4, 1)
        for number in range(1, 14):
            assert await send("x", 1) == (4 + number, 1)
        assert await send("x", 1) == (17, 2), "17 - 1 = 16 is the margin"
        assert await send("x", 1) == (17, 3), "and there it stays"
        assert await send("", 1) == (17, 4)
        a.gate.set()
        b.gate.set()
        await asyncio.gather(*tasks)
        assert await send("y", 1) == (17, 5)

    run_within(run())


def test_an_engine_has_so_many_sequences_at_most_and_the_rest_waits_in_order() -> None:
    async def run() -> None:
        a = Scripted("a")
        router = Router([a], max_inflight=4)
        order: list[int] = []

        async def send(number: int, n: int) -> None:
            await router.generate(make_request(n))
            order.append(number)

        tasks = [asyncio.create_task(send(i, n)) for i, n in enumerate([3, 2, 1, 9, 1])]
        await settled()
        assert a.served == 3 and router.metrics()["router/queued"] == 4
        tasks[2].cancel()
        a.gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [0, 1, 3, 4]
        assert a.served == 3 + 2 + 9 + 1, "one that is larger than the bound goes alone"
        assert inflight(router) == {"a": 0}

    run_within(run())


def test_waiting_does_not_count_into_a_deadline() -> None:
    """Each request takes 0.3 s of the server, and may take 0.8."""

    def slowly(number: int) -> tuple[int, str]:
        time.sleep(0.3)
        return fine()

    with serving(FakeSGLang(slowly), deadline_s=0.8) as engine:
        router = Router([engine], max_inflight=1)

        async def run() -> list[list[Generation]]:
            return await asyncio.gather(*(router.generate(make_request()) for _ in range(5)))

        answers = run_within(run())
    assert [answer[0].token_ids for answer in answers] == [[7]] * 5


def test_a_drained_router_sends_nothing_and_judges_nobody(
    quick_health: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "_SILENCE_S", 0.02)

    async def run() -> None:
        a = Scripted("a")
        router = Router([a])
        running = asyncio.create_task(router.generate(make_request()))
        await settled()
        router.drain()
        waiting = asyncio.create_task(router.generate(make_request()))
        a.is_gone = a.fails = True  # as a paused engine may look
        a.gate.set()
        await asyncio.sleep(0.1)
        assert (a.served, a.num_checks) == (1, 0)
        a.is_gone = a.fails = False
        router.set_engines([a])
        answers = [*await running, *await waiting]
        assert [answer.status for answer in answers] == [Status.COMPLETED] * 2
        assert a.served == 3 and not router.lost

    run_within(run())


def test_an_engine_that_is_taken_away_gives_back_the_tokens_that_it_has() -> None:
    """One that does not answer gives none; its requests go elsewhere."""

    async def run() -> None:
        a = Scripted("a")
        b = Scripted("b")
        b.is_gone = True
        router = Router([a, b])
        tasks = [asyncio.create_task(router.generate(make_request())) for _ in range(2)]
        await settled()
        assert (a.served, b.served) == (1, 1)
        c = Scripted("c", is_open=True)
        router.set_engines([c])
        answers = [*await tasks[0], *await tasks[1]]
        assert [answer.status for answer in answers] == [Status.ABORTED, Status.COMPLETED]
        assert c.served == 1
        assert inflight(router) == {"c": 0} and not router.lost

    run_within(run())


def test_an_interrupt_ends_what_runs_and_nothing_is_sent_before_it_is_over() -> None:
    """It is said again to an engine that has missed it."""

    async def run() -> None:
        a = Scripted("a")
        a.misses_interrupts = 1
        router = Router([a])
        task = asyncio.create_task(router.generate(make_request()))
        await settled()
        interrupt = asyncio.create_task(router.interrupt())
        await until(lambda: a.num_interrupts == 1)
        later = asyncio.create_task(router.generate(make_request()))
        await settled()
        assert a.served == 1
        [answer] = await task
        assert answer.status is Status.ABORTED and answer.token_ids == [1, 2]
        await interrupt
        a.gate.set()
        assert (await later)[0].status is Status.COMPLETED
        assert (a.num_interrupts, a.served) == (2, 2)

    run_within(run())


def test_a_cancelled_request_is_cancelled_on_its_engine() -> None:
    async def run() -> None:
        a = Scripted("a")
        router = Router([a])
        task = asyncio.create_task(router.generate(make_request(3)))
        await settled()
        assert inflight(router) == {"a": 3}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert inflight(router) == {"a": 0}
        assert not [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]

    run_within(run())


def test_a_group_that_is_given_up_while_some_of_it_waits_leaves_nothing_behind() -> None:
    """All hear of it together: those that run make room for those that wait."""

    async def run() -> None:
        a = Scripted("a")
        router = Router([a], max_inflight=2)
        tasks = [asyncio.create_task(router.generate(make_request())) for _ in range(6)]
        await settled()
        for task in tasks[:5]:
            task.cancel()
        ended = await asyncio.gather(*tasks[:5], return_exceptions=True)
        assert [type(error) for error in ended] == [asyncio.CancelledError] * 5
        a.gate.set()
        assert (await tasks[5])[0].status is Status.COMPLETED
        assert inflight(router) == {"a": 0} and router.metrics()["router/queued"] == 0

    run_within(run())


def test_threads_of_environments_do_not_keep_an_engine_from_being_interrupted() -> None:
    """They wait for tokens, which are given only once the interrupt is over."""

    async def run() -> None:
        over = threading.Event()
        waiting = [asyncio.create_task(asyncio.to_thread(over.wait, 15)) for _ in range(64)]
        a = Scripted("a")
        router = Router([a])
        task = asyncio.create_task(router.generate(make_request()))
        await settled()
        async with asyncio.timeout(5):
            await router.interrupt()
            [answer] = await task
        assert answer.status is Status.ABORTED
        over.set()
        await asyncio.gather(*waiting)
        await router.close()

    run_within(run())


def test_metrics_are_by_engine_and_since_the_last_call(quick_health: None) -> None:
    async def run() -> dict[str, float]:
        a = Scripted("a", is_open=True)
        router = Router([a])
        await router.generate(make_request(2))
        a.fails = True
        await router.generate(make_request())
        counted = router.metrics()
        assert router.metrics()["router/a/requests"] == 0
        return counted

    counted = run_within(run())
    assert 0 < counted.pop("router/a/latency_s") < 1
    assert counted == {
        "router/queued": 0,
        "time/parse_s": 0.5,
        "router/a/inflight": 0,
        "router/a/requests": 3,
        "router/a/failures": 2,
        "router/a/tokens": 2,
    }


def test_the_embedded_engine_answers_requests_that_start_together_as_one_batch(
    embedded: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    run_batch = EmbeddedEngine._run_batch

    def watched(engine: EmbeddedEngine, jobs: Any) -> None:
        batches.append(len(jobs))
        run_batch(engine, jobs)

    monkeypatch.setattr(EmbeddedEngine, "_run_batch", watched)

    async def run() -> None:
        router = Router([embedded])
        await asyncio.gather(*(router.generate(make_request(), f"k{i // 4}") for i in range(32)))

    run_within(run())
    assert batches == [32]


def test_a_server_that_answers_once_with_500_keeps_its_engine() -> None:
    fake = FakeSGLang(lambda number: (500, "{}") if number == 0 else fine())
    with serving(fake) as engine:
        router = Router([engine])
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
        (307, ""),
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
        router = Router([good, broken])

        async def run() -> list[list[Generation]]:
            return await asyncio.gather(*(router.generate(make_request()) for _ in range(8)))

        answers = asyncio.run(run())
        alone = asyncio.run(Router([broken]).generate(make_request()))
    assert [answer[0].token_ids for answer in answers] == [[7]] * 8
    assert (fakes[0].num_requests, fakes[1].num_requests) == (8, 4 + 2)
    assert alone[0].status is Status.ERROR
    assert "engine bad at http://127.0.0.1" in alone[0].error
    assert not router.lost


def test_a_refused_request_is_not_tried_again() -> None:
    refusal = json.dumps({"error": {"message": "top_k must be -1 or at least 1"}})
    fake = FakeSGLang(lambda number: (400, refusal))
    with serving(fake) as engine:
        answers = asyncio.run(Router([engine]).generate(make_request(n=2)))
    assert [answer.status for answer in answers] == [Status.ERROR] * 2
    assert answers[0].error == "SGLang refused it (400): top_k must be -1 or at least 1"
    assert fake.num_requests == 1


def test_a_hung_engine_is_lost(quick_health: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its requests run out of time, and so does its health check."""
    monkeypatch.setattr(sglang_client, "_HEALTH_DEADLINE_S", 0.2)
    hung = FakeSGLang(lambda number: "hang", hangs=True)
    good = FakeSGLang(lambda number: fine())
    with serving(hung, "hung", deadline_s=0.5) as first, serving(good, "good") as second:
        router = Router([first, second])
        answers = asyncio.run(router.generate(make_request()))
    assert answers[0].token_ids == [7]
    assert "/generate was not answered within 0.5 s" in router.lost["hung"]


def test_an_engine_without_a_version_says_what_it_answered() -> None:
    fake = FakeSGLang(lambda number: fine())
    with serving(fake) as engine, pytest.raises(RunError) as caught:
        engine.policy_version()
    assert "/model_info answered no weight version that is a number (200): ''" in str(caught.value)
