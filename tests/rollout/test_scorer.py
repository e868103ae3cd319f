"""A reward that misbehaves costs its sample an error status, and nobody anything else."""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import psutil
import pytest
from aiohttp import web

from nanoslime.config import DataConfig
from nanoslime.config.model import REWARDS
from nanoslime.rollout import rewards
from nanoslime.rollout.rewards import pool
from nanoslime.rollout.rewards.scorer import QUICK, Scorer
from nanoslime.types import Prompt, RunError, Sample, Status

ODD = "tests.rollout.odd_rewards"
MISBEHAVE = f"{ODD}:misbehave"


def make_sample(text: str, label: object = "4", **changes) -> Sample:
    return Sample(
        group_id=0,
        rollout_id=0,
        token_ids=np.array([1, 2, 3], np.int32),
        loss_mask=np.array([False, True, True]),
        rollout_logprobs=np.zeros(3, np.float32),
        policy_versions=[(1, 0)],
        routed_experts=np.zeros((2, 4, 2), np.uint8),
        text=text,
        label=label,
        **{"status": Status.COMPLETED, **changes},
    )


def prompt(**metadata) -> Prompt:
    return Prompt(0, np.array([1], np.int32), "what?", "4", metadata)


def with_scorer[T](data: DataConfig, use: Callable[[Scorer], Awaitable[T]]) -> T:
    async def run() -> T:
        scorer = Scorer(data)
        try:
            return await use(scorer)
        finally:
            await scorer.close()

    return asyncio.run(run())


def scored(data: DataConfig, name: str, texts: list[str], *, together: bool = False):
    """Samples of these texts, scored one after another or all at the same time."""

    async def use(scorer: Scorer) -> list[Sample]:
        samples = [make_sample(text) for text in texts]
        for sample in [] if together else samples:
            await scorer.score([sample], prompt(), name)
        if together:
            await asyncio.gather(*(scorer.score([sample], prompt(), name) for sample in samples))
        return samples

    return with_scorer(data, use)


@pytest.fixture
def server() -> Iterator[Callable[[Callable[[int, dict], web.Response]], str]]:
    """Starts a reward server that answers `respond(number of the request, its JSON)`."""
    loop = asyncio.new_event_loop()
    done = Event()
    thread = ThreadPoolExecutor(1)

    def start(respond: Callable[[int, dict], web.Response]) -> str:
        requests = []

        async def handle(request: web.Request) -> web.Response:
            requests.append(await request.json())
            return respond(len(requests), requests[-1])

        async def open_server() -> str:
            app = web.Application()
            app.router.add_post("/", handle)
            runner = web.AppRunner(app)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0]
            return f"http://{host}:{port}/"

        url = loop.run_until_complete(open_server())

        async def until_done() -> None:
            while not done.is_set():
                await asyncio.sleep(0.01)

        thread.submit(loop.run_until_complete, until_done())
        return url

    yield start
    done.set()
    thread.shutdown()
    loop.close()


@pytest.mark.parametrize("name", {place: name for name, place in REWARDS.items()}.values())
def test_every_reward_pays_a_right_answer_and_no_wrong_one(name: str, server) -> None:
    url = server(lambda _, ask: web.json_response(float(ask["response"] == ask["label"])))
    samples = scored(DataConfig(reward_url=url), name, ["4", "B", ""])
    assert [(s.reward, s.status, s.error) for s in samples] == [
        (1.0, Status.COMPLETED, None),
        (0.0, Status.COMPLETED, None),
        (0.0, Status.COMPLETED, None),
    ]


FAULTS = {
    "crash": "KeyError: 'no such key'",
    "hang": "it took longer than 1 s",
    "hang asleep": "it took longer than 1 s",
    "kill": "its process ended with exit code 7",
    "fork and kill": "its process ended with exit code 7",
    "segfault": "its process was killed by SIGSEGV",
    "close": "its process",
    "exit": "SystemExit: the grader has gone",
    "unpicklable": "Unpicklable: <function",
    "nan": "the reward returned nan, which is not finite",
    "inf": "the reward returned -inf, which is not finite",
    "none": "the reward returned None, which is no number",
    "text": "the reward returned '1111",
    "list": "TypeError: float() argument",
    "huge": "OverflowError: int too large",
}
FINE = ["one", "true", "print", "fork", "child", "read", "own loop"]


def test_a_reward_that_fails_gives_its_sample_an_error_and_the_next_one_its_reward(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = DataConfig(reward_timeout_s=1, reward_processes=1)
    texts = [text for fault in FAULTS for text in (fault, "one")] + FINE

    async def use(scorer: Scorer) -> list[Sample]:
        samples = [make_sample(text) for text in texts]
        for sample in samples:
            await scorer.score([sample], prompt(), MISBEHAVE)
        assert scorer.metrics() == {
            "rollout/reward_errors": len(FAULTS),
            "rollout/reward_timeouts": 2,
        }
        assert scorer.metrics()["rollout/reward_errors"] == 0
        return samples

    for sample in with_scorer(data, use):
        if sample.text in FAULTS:
            assert (sample.status, sample.reward) == (Status.ERROR, None), sample.text
            assert f"reward {MISBEHAVE}: " in sample.error
            assert FAULTS[sample.text] in sample.error
            assert len(sample.error) < 1000
            assert "\n" not in sample.error
        else:
            assert (sample.text, sample.reward, sample.error) == (sample.text, 1.0, None)
    assert sum("KeyError" in record.message for record in caplog.records) == 1


def test_what_a_reward_prints_is_at_once_on_standard_error(capfd, monkeypatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    scored(DataConfig(), f"{ODD}:says", ["4"])
    assert capfd.readouterr().err == "said: 4\n"


def test_failures_of_one_cause_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        samples = scored(DataConfig(), MISBEHAVE, ["crash"] * 20 + ["nan"], together=True)
    assert {sample.status for sample in samples} == {Status.ERROR}
    assert len(caplog.records) == 2
    (told,) = (record.message for record in caplog.records if "KeyError" in record.message)
    assert 'return metadata["no such key"]' in told


def test_async_rewards_run_side_by_side_and_only_the_guilty_one_fails() -> None:
    data = DataConfig(reward_timeout_s=1.5, reward_processes=2)
    start = time.monotonic()
    texts = ["fine"] * 100 + ["hang", "crash"]
    *fine, hung, crashed = scored(data, f"{ODD}:waits", texts, together=True)
    assert time.monotonic() - start < 15
    assert {sample.reward for sample in fine} == {7.5}
    assert "it took longer than 1.5 s" in hung.error
    assert "KeyError" in crashed.error


@pytest.mark.parametrize(("fault", "cause"), [("block", "took longer"), ("kill", "exit code 7")])
def test_an_async_reward_that_takes_its_process_along_harms_no_other(
    fault, cause, monkeypatch
) -> None:
    monkeypatch.setattr(pool, "_GRACE_S", 0.1)
    data = DataConfig(reward_timeout_s=1, reward_processes=2)
    texts = ["fine", fault, "fine"]
    first, guilty, last = scored(data, f"{ODD}:waits", texts, together=True)
    assert (first.reward, last.reward) == (7.0, 7.0)
    assert cause in guilty.error


def test_a_reward_that_cannot_be_loaded_is_refused_or_costs_the_samples() -> None:
    for name, says in (
        (f"{ODD}:of_two", "cannot be called with"),
        (f"{ODD}:no_such", "cannot load"),
        ("tests.rollout.no_such_module:reward", "cannot load"),
        (f"{ODD}:ODD", "cannot load"),
    ):
        with pytest.raises(RunError, match=says):
            rewards.check(DataConfig(rewards={"f1": 1.0, name: 0.5}))
        start = time.monotonic()
        samples = scored(DataConfig(reward_processes=1), name, ["4"] * 50)
        assert all(says in sample.error for sample in samples)
        assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("name", "text"),
    [("math_answer", r"\boxed{9^{9^9}}"), (MISBEHAVE, "text")],
)
def test_the_event_loop_goes_on_meanwhile(name: str, text: str) -> None:
    async def use(scorer: Scorer) -> float:
        task = asyncio.create_task(scorer.score([make_sample(text)], prompt(), name))
        longest = 0.0
        while not task.done():
            start = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - start)
        return longest

    assert with_scorer(DataConfig(reward_timeout_s=1), use) < 0.5


def test_quick_rewards_stay_quick() -> None:
    async def use(scorer: Scorer) -> float:
        samples = [make_sample(text) for text in ["4", "5"] * 128]
        start = time.perf_counter()
        await asyncio.gather(*(scorer.score([s], prompt(), "exact_match") for s in samples))
        seconds = time.perf_counter() - start
        assert [sample.reward for sample in samples] == [1.0, 0.0] * 128
        return seconds

    assert min(with_scorer(DataConfig(), use) for _ in range(3)) < 0.1
    assert set(REWARDS) > QUICK


def test_a_weighted_sum_records_its_parts_and_fails_with_any_of_them() -> None:
    weights = {"exact_match": 1.0, "f1": 0.5, f"{ODD}:pid": 0.0}
    data = DataConfig(rewards=weights)
    assert data.reward == "weighted"
    (sample,) = scored(data, data.reward, ["so 4"])
    pid = sample.reward_parts.pop(f"{ODD}:pid")
    assert pid not in (0.0, os.getpid())
    assert sample.reward_parts == {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}
    assert sample.reward == pytest.approx(1 / 3)
    # A name alone is that reward, also beside a weighted sum.
    (sample,) = scored(data, "exact_match", ["4"])
    assert (sample.reward, sample.reward_parts) == (1.0, {})
    (sample,) = scored(DataConfig(rewards={"f1": 1.0, MISBEHAVE: 0.0}), "weighted", ["nan"])
    assert (sample.status, sample.reward) == (Status.ERROR, None)
    assert "nan" in sample.error


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rewards": {"f1": 1.0}, "reward": "math_answer"}, "exclude each other"),
        ({"reward": "weighted"}, "needs data.rewards"),
        ({"rewards": {"f2": 1.0}}, "data.rewards='f2' is unknown"),
        ({"rewards": {"remote": 1.0}}, "needs data.reward_url"),
        ({"reward": "remote_rm"}, "needs data.reward_url"),
        ({"reward": "remote", "reward_url": "localhost:8000/score"}, "http://.*'localhost:8000"),
        ({"rewards": {"f1": float("nan")}}, "finite"),
        ({"reward_timeout_s": 0}, "greater than 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, says) -> None:
    with pytest.raises(ValueError, match=says):
        DataConfig(**settings)


def test_a_source_may_have_a_reward_of_its_own_beside_a_weighted_sum() -> None:
    sources = [
        {"prompts": "a.jsonl"},
        {"prompts": "b.jsonl", "reward": "exact_match"},
        {"prompts": "c.jsonl", "reward": "weighted"},
    ]
    data = DataConfig(sources=sources, rewards={"f1": 1.0, "math": 0.5})
    assert [one.reward for one in data.by_source().values()] == [
        "weighted",
        "exact_match",
        "weighted",
    ]


def test_the_samples_of_a_rollout_share_the_reward_of_the_last_one() -> None:
    async def use(scorer: Scorer) -> None:
        samples = [make_sample("3"), make_sample("4"), make_sample("4", status=Status.ERROR)]
        await scorer.score(samples, prompt(), "weighted")
        assert [sample.reward for sample in samples] == [1.5, 1.5, None]
        parts = {"exact_match": 1.0, "f1": 1.0}
        assert [sample.reward_parts for sample in samples] == [parts, parts, {}]

        given = [make_sample("4", reward=0.25), make_sample("4")]
        await scorer.score(given, prompt(), "weighted")
        assert [sample.reward for sample in given] == [0.25, 0.25]

    with_scorer(DataConfig(rewards={"exact_match": 1.0, "f1": 0.5}), use)


@pytest.mark.parametrize(
    ("rewards", "cause"),
    [
        ((None, None), "KeyError"),
        ((0.5, 1.0), "share one reward, but the environment gave [0.5, 1.0]"),
        ((0.5, float("inf")), "inf"),
    ],
)
def test_a_rollout_without_one_reward_is_an_error_of_all_its_samples(rewards, cause) -> None:
    async def use(scorer: Scorer) -> dict[str, float]:
        samples = [make_sample("4", reward=reward) for reward in rewards]
        await scorer.score(samples, prompt(), "tests.orchestration.rewards:missing_key")
        assert [sample.status for sample in samples] == [Status.ERROR] * 2
        assert [sample.reward for sample in samples] == [None] * 2
        assert all(cause in sample.error for sample in samples), samples[0].error
        return scorer.metrics()

    assert with_scorer(DataConfig(), use)["rollout/reward_errors"] == 2


def test_samples_that_have_a_reward_or_an_error_are_left_alone() -> None:
    async def use(scorer: Scorer) -> None:
        broken = make_sample("4", status=Status.ERROR, error="no engine")
        await scorer.score([broken], prompt(), "exact_match")
        assert (broken.reward, broken.error) == (None, "no engine")
        judged = make_sample("4", reward=0.25)
        await scorer.score([judged], prompt(), "exact_match")
        assert judged.reward == 0.25
        odd = make_sample("4", reward=float("nan"))
        await scorer.score([odd], prompt(), "exact_match")
        assert (odd.status, odd.reward) == (Status.ERROR, None)

    with_scorer(DataConfig(), use)


def test_close_and_cancelled_calls_leave_no_process() -> None:
    async def use(scorer: Scorer) -> list[psutil.Process]:
        hanging = [make_sample("hang") for _ in range(4)]
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(scorer.score([sample], prompt(), MISBEHAVE)) for sample in hanging
            ]
            await scorer.score([make_sample("child")], prompt(), f"{ODD}:pid")
            for task in tasks[:2]:
                task.cancel()
        await scorer.score([make_sample("child")], prompt(), MISBEHAVE)
        return psutil.Process().children(recursive=True)

    before = psutil.Process().children(recursive=True)
    children = with_scorer(DataConfig(reward_timeout_s=0.5, reward_processes=2), use)
    assert any(child not in before for child in children)
    # What a reward had started is killed with it, and may be ours to bury.
    left = [c for c in psutil.Process().children(recursive=True) if c not in before]
    _, alive = psutil.wait_procs(left, timeout=5)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


def test_reward_processes_die_with_their_owner(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = f"""
import asyncio
from nanoslime.config import DataConfig
from nanoslime.rollout.rewards.scorer import Scorer
from tests.rollout.test_scorer import make_sample, prompt

async def main():
    await Scorer(DataConfig()).score(
        [make_sample({str(pids)!r})], prompt(), "{ODD}:tells_pids_and_hangs"
    )
asyncio.run(main())
"""
    owner = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (pids.exists() and pids.read_text().endswith("\n")):
        assert owner.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_reward_processes_see_what_their_owner_can_import(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "of_my_own.py").write_text(
        "import sys\ndef reward(text, label, metadata): return 'torch' in sys.modules\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (sample,) = scored(DataConfig(), "of_my_own:reward", ["4"])
    assert (sample.reward, sample.error) == (0.0, None)


def test_a_remote_reward_is_asked_again_until_its_server_is_back(server) -> None:
    asked = []

    def respond(number: int, ask: dict) -> web.Response:
        asked.append(ask)
        answers = {1: web.Response(status=503), 2: web.Response(status=429)}
        return answers.get(number, web.json_response({"score": 0.5}))

    data = DataConfig(reward_url=server(respond))
    (sample,) = scored(data, "remote", ["so 4"])
    assert (sample.reward, sample.error, len(asked)) == (0.5, None, 3)
    assert asked[0] == {"prompt": "what?", "response": "so 4", "label": "4", "metadata": {}}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"status": 404, "text": "no such page"}, "404 no such page"),
        ({"status": 500, "text": "out of memory"}, "500 out of memory"),
        ({"text": "<html>"}, "answered '<html>', which holds no number"),
        ({"text": '{"verdict": 1}'}, "which holds no number"),
        ({"text": "NaN"}, "nan, which is not finite"),
    ],
)
def test_what_a_remote_reward_answered_wrongly_is_in_the_error(server, answer, says) -> None:
    url = server(lambda number, ask: web.Response(**answer))
    (sample,) = scored(DataConfig(reward_url=url, reward_timeout_s=0.5), "remote", ["4"])
    assert (sample.status, sample.reward) == (Status.ERROR, None)
    assert says in sample.error


def test_a_remote_reward_whose_server_is_gone_or_silent_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = "http://{}:{}/".format(*silent.getsockname())
        (sample,) = scored(DataConfig(reward_url=url, reward_timeout_s=0.4), "remote", ["4"])
        assert "TimeoutError" in sample.error
    (sample,) = scored(DataConfig(reward_url=url, reward_timeout_s=0.4), "remote", ["4"])
    assert "Cannot connect" in sample.error
