"""Prompt and response have to fit the model's context, however its config spells it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanoslime.config.load import load
from nanoslime.models.context import check_context
from nanoslime.models.shape import ModelShape
from nanoslime.types import RunError
from tests.models.published import CONFIGS
from tests.plans import QWEN3_4B

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def context_length(**changes: Any) -> int:
    return ModelShape.from_config({**CONFIGS["Qwen3-4B"], **changes}).context_length


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 40960),
        ({"rope_scaling": YARN}, 131072),
        ({"rope_scaling": YARN, "max_position_embeddings": 131072}, 131072),
        ({"rope_scaling": {"type": "yarn", **YARN}, "rope_theta": 1e6}, 131072),
        (
            {"rope_scaling": {**YARN, "factor": 40, "original_max_position_embeddings": 1024}},
            40960,
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 81920),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 81920),
        ({"use_sliding_window": True, "sliding_window": 4096}, 40960),
    ],
)
def test_the_context_is_that_of_the_config_and_its_rope_scaling(changes, length) -> None:
    assert context_length(**changes) == length


def test_a_scaling_of_llama_3_is_in_its_length_already() -> None:
    assert ModelShape.from_config(CONFIGS["Llama-3.2-1B"]).context_length == 131072


@pytest.mark.parametrize(
    ("flags", "context", "says"),
    [
        (["--max-new-tokens", "3072"], 4096, None),
        (
            ["--max-new-tokens", "3073"],
            4096,
            "data.max_prompt_tokens=1024 and rollout.max_new_tokens=3073 are 4097 tokens together, "
            "more than the 4096 that the model reads .*; lower one of them",
        ),
        (["--max-new-tokens", "65536"], 40960, "are 66560 tokens together, more than the 40960"),
        (["--max-prompt-tokens", "40000"], 40960, "are 41024 tokens together"),
        (
            ["--rollout.sglang", '{"context_length": 2000}'],
            4096,
            "more than the 2000 that rollout.sglang.context_length allows",
        ),
        (
            ["--rollout.sglang", '{"context_length": 4097}'],
            4096,
            "rollout.sglang.context_length=4097 is more than the 4096 that the model reads",
        ),
        (["--rollout.sglang", '{"context_length": 4096}'], 4096, None),
        (["--rollout.sglang", '{"context_length": 9000}', "--engine", "embedded"], 4096, None),
        (["--rollout.sglang", '{"context_length": 9000}', "--load-rollouts", "old"], 4096, None),
        (["--max-new-tokens", "65536", "--load-rollouts", "runs/old"], 4096, None),
        (["--rollout.stop-token-ids", "5", "151935"], 4096, None),
        (
            ["--rollout.stop-token-ids", "5", "151936"],
            4096,
            "rollout.stop_token_ids has 151936, which no response can hold: the model's vocab_size "
            "is 151936; take ids",
        ),
    ],
)
def test_prompt_and_response_fit_it(flags, context, says) -> None:
    shape = replace(QWEN3_4B, max_position_embeddings=context)
    config = load(None, None, flags)
    if says is None:
        check_context(config, shape)
        return
    with pytest.raises(RunError, match=says):
        check_context(config, shape)


@pytest.mark.parametrize("recipe", ["gsm8k", "qwen3_4b_h200", "colocate"])
def test_recipes_fit_the_4096_tokens_of_qwen2_5_math(recipe) -> None:
    config = load(RECIPES / f"{recipe}.yaml", None, [])
    check_context(config, replace(QWEN3_4B, max_position_embeddings=4096))
