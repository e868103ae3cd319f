"""Prompts to scored groups, on the embedded engine; metrics by hand; the router; the recorder."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanoslime.config.rollout import RolloutConfig
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.generate import sample_groups
from nanoslime.rollout.recorder import record
from nanoslime.rollout.router import LeastInflightRouter
from nanoslime.types import (
    EngineLost,
    GenerateRequest,
    Generation,
    Prompt,
    RunError,
    Sample,
    SampleGroup,
    Status,
)
from tests.serving import reference_logprobs


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> EmbeddedEngine:
    return EmbeddedEngine(str(tiny_model), "float32", "cpu", seed=0)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


PROMPTS = [
    Prompt(4, np.array([5, 6, 7], np.int32), "", "a"),
    Prompt(9, np.array([8], np.int32), "", "b", {"k": 1}),
]


def sample(
    engine,
    tokenizer,
    *,
    reward=lambda text, label, metadata: float(len(text)),
    prompts=PROMPTS,
    **changes,
):
    config = RolloutConfig(
        **({"n_samples_per_prompt": 3, "max_new_tokens": 6, "temperature": 0.7} | changes)
    )
    return asyncio.run(
        sample_groups(prompts, engine, tokenizer, config, reward, first_group_id=10, seed=(1, 0, 5))
    )


def test_samples_are_aligned_on_one_token_axis(engine, tokenizer, tiny_model: Path) -> None:
    groups = sample(
        engine,
        tokenizer,
        reward=lambda text, label, metadata: float(label == "b") + metadata.get("k", 0),
    )
    assert [g.group_id for g in groups] == [10, 11]
    assert [g.rewards for g in groups] == [[0.0] * 3, [2.0] * 3]
    assert [s.rollout_id for g in groups for s in g.samples] == list(range(30, 36))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for s in group.samples:
            start = len(prompt.token_ids)
            assert (s.num_tokens, s.num_response_tokens, s.status) == (
                start + 6,
                6,
                Status.TRUNCATED,
            )
            assert (s.token_ids.dtype, s.loss_mask.dtype, s.rollout_logprobs.dtype) == (
                np.int32,
                np.bool_,
                np.float32,
            )
            assert s.token_ids[:start].tolist() == prompt.token_ids.tolist()
            assert s.loss_mask.tolist() == [False] * start + [True] * 6
            assert s.policy_versions == [(start, 0)]
            assert s.metadata["prompt_id"] == prompt.prompt_id and s.label == prompt.label
            assert s.text == tokenizer.decode(s.token_ids[start:])
            reference = reference_logprobs(
                tiny_model, prompt.token_ids.tolist(), s.token_ids[start:].tolist(), 0.7
            )
            assert s.rollout_logprobs[:start].tolist() == [0.0] * start
            assert (reference - torch.from_numpy(s.rollout_logprobs[start:])).abs().max() < 1e-5


def test_the_seed_decides_the_samples(engine, tokenizer) -> None:
    first, again = sample(engine, tokenizer), sample(engine, tokenizer)
    tokens = [
        [s.token_ids.tolist() for g in groups for s in g.samples] for groups in (first, again)
    ]
    assert tokens[0] == tokens[1]
    assert len({tuple(t[-6:]) for t in tokens[0]}) == 6
    (group, _) = sample(engine, tokenizer, prompts=[PROMPTS[0], PROMPTS[0]])
    assert [s.token_ids.tolist() for s in group.samples] == tokens[0][:3]


def test_a_sample_that_could_not_be_made_keeps_its_cause_and_gets_no_reward(
    engine, tokenizer
) -> None:
    over_long = Prompt(0, np.full(4096, 5, np.int32), "", "a")
    failed, fine = sample(engine, tokenizer, prompts=[over_long, PROMPTS[0]])
    assert all(
        s.status is Status.ERROR and "4096 tokens" in s.error and s.reward is None
        for s in failed.samples
    )
    assert len(fine.rewards) == 3
    assert all(s.status is Status.TRUNCATED for s in fine.samples)


@pytest.mark.parametrize(
    "reward", [lambda text, label, metadata: 1 / 0, lambda text, label, metadata: float("nan")]
)
def test_a_failing_reward_ends_the_run_in_one_line(engine, tokenizer, reward) -> None:
    with pytest.raises(
        RunError, match=r"reward tests.rollout.test_generate .* prompt 4( |$)"
    ) as error:
        sample(engine, tokenizer, reward=reward)
    assert "\n" not in str(error.value)


def make_sample(reward: float | None, num_response: int, status: Status) -> Sample:
    mask = np.array([False, False] + [True] * num_response)
    return Sample(
        group_id=0,
        rollout_id=0,
        token_ids=np.zeros(len(mask), np.int32),
        loss_mask=mask,
        status=status,
        rollout_logprobs=np.zeros(len(mask), np.float32),
        policy_versions=[(2, 0)],
        reward=reward,
        text="é",
        metadata={"prompt_id": 3},
    )


def test_a_record_by_hand(tmp_path: Path) -> None:
    done, cut, error = Status.COMPLETED, Status.TRUNCATED, Status.ERROR
    groups = [
        SampleGroup(
            0, [make_sample(1.0, 1, done), make_sample(0.0, 2, cut), make_sample(0.0, 3, done)]
        ),
        SampleGroup(1, [make_sample(1.0, 6, done), make_sample(None, 0, error)]),
    ]
    record(tmp_path / "rollouts", 3, groups)
    lines = [
        json.loads(line)
        for line in (tmp_path / "rollouts" / "step_3.jsonl").read_text().splitlines()
    ]
    assert [line["reward"] for line in lines] == [1.0, 0.0, 0.0, 1.0, None]
    assert (
        lines[1]
        | {"status": "truncated", "text": "é", "tokens": [4, 2], "prompt": 3, "versions": [[2, 0]]}
        == lines[1]
    )
    assert {p.name for p in (tmp_path / "rollouts").iterdir()} == {"step_3.jsonl", "step_3.npz"}


class Scripted:
    """An engine for the router only: counts, waits for `gate`, and fails when it is told to."""

    def __init__(self, name: str) -> None:
        self.name, self.served, self.fails = name, 0, False
        self.gate = asyncio.Event()

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        self.served += request.n
        await self.gate.wait()
        if self.fails:
            raise EngineLost(f"engine {self.name} is gone; log: {self.name}.log")
        return [Generation([1], [0.0], Status.COMPLETED, [(0, 0)])] * request.n


def request(n: int = 1) -> GenerateRequest:
    return GenerateRequest([1], n=n, max_new_tokens=1, temperature=1.0)


def test_least_inflight_counts_sequences_not_requests() -> None:
    async def run() -> None:
        a, b = Scripted("a"), Scripted("b")
        router = LeastInflightRouter([a, b])
        tasks = [asyncio.create_task(router.generate(request(n))) for n in (4, 1, 1, 1, 1, 8)]
        await asyncio.sleep(0)
        assert (a.served, b.served) == (4 + 8, 4)
        b.gate.set()
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(router.generate(request(2))))
        await asyncio.sleep(0)
        assert b.served == 4 + 2
        a.gate.set()
        assert len(await asyncio.gather(*tasks)) == 7

    asyncio.run(run())


def test_a_lost_engine_leaves_the_rotation_with_its_name(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        a, b = Scripted("a"), Scripted("b")
        a.fails = True
        a.gate.set()
        b.gate.set()
        router = LeastInflightRouter([a, b])
        answers = await asyncio.gather(*(router.generate(request()) for _ in range(6)))
        assert len(answers) == 6 and b.served == 6
        assert router.lost == {"a": "engine a is gone; log: a.log"}
        served_before = a.served
        await router.generate(request())
        assert a.served == served_before
        b.fails = True
        with pytest.raises(
            RunError, match="no engine is left: engine a is gone.*; engine b is gone; log: b.log"
        ):
            await router.generate(request())

    asyncio.run(run())
    assert caplog.text.count("out of rotation: engine a is gone") == 1


def test_a_bad_request_does_not_cost_an_engine(engine) -> None:
    router = LeastInflightRouter([engine])
    with pytest.raises(RunError, match="token id 99999"):
        asyncio.run(
            router.generate(GenerateRequest([99999], n=1, max_new_tokens=1, temperature=1.0))
        )
    assert not router.lost


def test_engines_need_names_of_their_own(engine) -> None:
    with pytest.raises(RunError, match="names of their own"):
        LeastInflightRouter([engine, engine])
