"""From prompts to scored groups: ask for samples, put each on one token axis with its prompt, score."""

import asyncio
import math
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from nanoslime.config.rollout import RolloutConfig
from nanoslime.rollout.router import LeastInflightRouter
from nanoslime.types import (
    Engine,
    GenerateRequest,
    Generation,
    Prompt,
    RunError,
    Sample,
    SampleGroup,
    Status,
)

Reward = Callable[[str, Any, dict[str, Any]], float]


async def sample_groups(
    prompts: Sequence[Prompt],
    router: LeastInflightRouter | Engine,
    tokenizer: PreTrainedTokenizerBase,
    config: RolloutConfig,
    reward: Reward,
    *,
    first_group_id: int,
    seed: Sequence[int],
) -> list[SampleGroup]:
    """A group of config.n_samples_per_prompt scored samples per prompt, in order; all are asked at once.

    `seed` decides the samples of an engine that honours seeds. The tokenizer's end of sequence ends a
    response, in addition to what does by the model's own generation config. A sample that the engine could
    not make has status error, its cause in `error`, and no reward. Raises RunError when no engine is left or
    when the reward fails.
    """
    stop_token_ids = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)

    def request(i: int, prompt: Prompt) -> GenerateRequest:
        entropy = [value % 2**32 for value in (*seed, i)]
        return GenerateRequest(
            token_ids=prompt.token_ids.tolist(),
            n=config.n_samples_per_prompt,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            stop_token_ids=stop_token_ids,
            seed=int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1),
        )

    answers = await asyncio.gather(
        *(router.generate(request(i, prompt)) for i, prompt in enumerate(prompts))
    )
    rollout_ids = count(first_group_id * config.n_samples_per_prompt)
    groups = []
    for group_id, (prompt, answer) in enumerate(
        zip(prompts, answers, strict=True), start=first_group_id
    ):
        samples = [make_sample(prompt, g, group_id, next(rollout_ids), tokenizer) for g in answer]
        for sample in samples:
            if sample.status is not Status.ERROR:
                sample.reward = _score(reward, sample, prompt)
        groups.append(SampleGroup(group_id, samples))
    return groups


def make_sample(
    prompt: Prompt,
    generation: Generation,
    group_id: int,
    rollout_id: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Sample:
    """Prompt and response on one axis [T]; the prompt's positions are masked and have logprob 0."""
    num_prompt, num_response = len(prompt.token_ids), len(generation.token_ids)
    token_ids = np.concatenate([prompt.token_ids, np.asarray(generation.token_ids, dtype=np.int32)])
    logprobs = np.concatenate([np.zeros(num_prompt), generation.logprobs]).astype(np.float32)
    return Sample(
        group_id=group_id,
        rollout_id=rollout_id,
        token_ids=token_ids,
        rollout_logprobs=logprobs,
        loss_mask=np.arange(num_prompt + num_response) >= num_prompt,
        policy_versions=[(num_prompt + first, version) for first, version in generation.versions],
        text=tokenizer.decode(generation.token_ids, skip_special_tokens=True),
        status=generation.status,
        error=generation.error,
        routed_experts=generation.routed_experts,
        label=prompt.label,
        metadata=prompt.metadata | {"prompt_id": prompt.prompt_id},
    )


def _score(reward: Reward, sample: Sample, prompt: Prompt) -> float:
    name = getattr(reward, "__module__", reward)
    try:
        value = float(reward(sample.text, sample.label, prompt.metadata))
    except Exception as e:
        problem = f"{type(e).__name__}: {e}; response: {sample.text[:100]!r}"
        raise RunError(f"reward {name} failed on prompt {prompt.prompt_id} with {problem}") from e
    if not math.isfinite(value):
        raise RunError(f"reward {name} returned {value} on prompt {prompt.prompt_id}")
    return value
