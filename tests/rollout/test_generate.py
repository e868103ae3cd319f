"""Prompts to scored groups, on the embedded engine."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanoslime.config.rollout import RolloutConfig
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.generate import Reward, sample_groups
from nanoslime.types import Prompt, RunError, SampleGroup, Status
from tests.serving import reference_logprobs

PROMPTS = [
    Prompt(4, np.array([5, 6, 7], np.int32), "", "a"),
    Prompt(9, np.array([8], np.int32), "", "b", {"k": 1}),
]
NUM_NEW_TOKENS = 6
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> EmbeddedEngine:
    return EmbeddedEngine(str(tiny_model), "float32", "cpu", seed=0)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def length_reward(text: str, label: Any, metadata: dict[str, Any]) -> float:
    return float(len(text))


def label_reward(text: str, label: Any, metadata: dict[str, Any]) -> float:
    return float(label == "b") + metadata.get("k", 0)


def dividing_reward(text: str, label: Any, metadata: dict[str, Any]) -> float:
    return 1 / 0


def undefined_reward(text: str, label: Any, metadata: dict[str, Any]) -> float:
    return float("nan")


def sample(
    engine: EmbeddedEngine,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reward: Reward = length_reward,
    prompts: list[Prompt] = PROMPTS,
) -> list[SampleGroup]:
    config = RolloutConfig(
        n_samples_per_prompt=3, max_new_tokens=NUM_NEW_TOKENS, temperature=TEMPERATURE
    )
    return asyncio.run(
        sample_groups(prompts, engine, tokenizer, config, reward, first_group_id=10, seed=(1, 0, 5))
    )


def tokens_of(groups: list[SampleGroup]) -> list[list[int]]:
    return [sample.token_ids.tolist() for group in groups for sample in group.samples]


def test_groups_are_numbered_and_scored(engine, tokenizer) -> None:
    groups = sample(engine, tokenizer, reward=label_reward)
    assert [group.group_id for group in groups] == [10, 11]
    assert [group.rewards for group in groups] == [[0.0] * 3, [2.0] * 3]
    rollout_ids = [sample.rollout_id for group in groups for sample in group.samples]
    assert rollout_ids == list(range(30, 36))


@pytest.mark.parametrize("position", [0, 1])
def test_samples_are_aligned_on_one_token_axis(engine, tokenizer, tiny_model, position) -> None:
    prompt = PROMPTS[position]
    start = len(prompt.token_ids)
    for s in sample(engine, tokenizer)[position].samples:
        response = s.token_ids[start:].tolist()
        assert s.num_tokens == start + NUM_NEW_TOKENS
        assert s.num_response_tokens == NUM_NEW_TOKENS
        assert s.status is Status.TRUNCATED
        assert s.token_ids.dtype == np.int32
        assert s.loss_mask.dtype == np.bool_
        assert s.rollout_logprobs.dtype == np.float32
        assert s.token_ids[:start].tolist() == prompt.token_ids.tolist()
        assert s.loss_mask.tolist() == [False] * start + [True] * NUM_NEW_TOKENS
        assert s.policy_versions == [(start, 0)]
        assert s.metadata["prompt_id"] == prompt.prompt_id
        assert s.label == prompt.label
        assert s.text == tokenizer.decode(response)
        assert s.rollout_logprobs[:start].tolist() == [0.0] * start
        reference = reference_logprobs(tiny_model, prompt.token_ids.tolist(), response, TEMPERATURE)
        assert (reference - torch.from_numpy(s.rollout_logprobs[start:])).abs().max() < 1e-5


def test_the_seed_decides_the_samples(engine, tokenizer) -> None:
    first = tokens_of(sample(engine, tokenizer))
    assert tokens_of(sample(engine, tokenizer)) == first
    assert len({tuple(tokens[-NUM_NEW_TOKENS:]) for tokens in first}) == 6
    same_first_prompt = tokens_of(sample(engine, tokenizer, prompts=[PROMPTS[0], PROMPTS[0]]))
    assert same_first_prompt[:3] == first[:3]
    others = same_first_prompt[3:]
    assert not any(tokens in first[:3] for tokens in others), "its place is part of the seed"


def test_a_sample_that_could_not_be_made_keeps_its_cause_and_gets_no_reward(
    engine, tokenizer
) -> None:
    over_long = Prompt(0, np.full(4096, 5, np.int32), "", "a")
    failed, fine = sample(engine, tokenizer, prompts=[over_long, PROMPTS[0]])
    for s in failed.samples:
        assert s.status is Status.ERROR
        assert "4096 tokens" in s.error
        assert s.reward is None
    assert len(fine.rewards) == 3
    assert all(s.status is Status.TRUNCATED for s in fine.samples)


@pytest.mark.parametrize("reward", [dividing_reward, undefined_reward])
def test_a_failing_reward_ends_the_run_in_one_line(engine, tokenizer, reward) -> None:
    message = r"reward tests.rollout.test_generate .* prompt 4( |$)"
    with pytest.raises(RunError, match=message) as error:
        sample(engine, tokenizer, reward=reward)
    assert "\n" not in str(error.value)


def test_stop_texts_and_tokens_of_the_configuration_reach_the_engine(engine, tokenizer) -> None:
    (plain,) = sample(engine, tokenizer, prompts=PROMPTS[:1])
    config = {"n_samples_per_prompt": 3, "max_new_tokens": NUM_NEW_TOKENS, "temperature": 0.7}
    responses = [s.token_ids[3:].tolist() for s in plain.samples]
    text = tokenizer.decode(responses[1][2:4])
    ends = [n for n in range(1, 5) if text in tokenizer.decode(responses[1][:n])]
    asked = RolloutConfig(**config, stop_token_ids=[responses[0][1]], stop=[text])
    groups = asyncio.run(
        sample_groups(
            PROMPTS[:1], engine, tokenizer, asked, length_reward, first_group_id=10, seed=(1, 0, 5)
        )
    )
    by_token, by_text, _ = groups[0].samples
    assert by_token.status is by_text.status is Status.COMPLETED
    assert by_token.token_ids[3:].tolist() == responses[0][:2]
    assert by_text.token_ids[3:].tolist() == responses[1][: ends[0]]
    assert by_text.text == tokenizer.decode(responses[1][: ends[0]])
