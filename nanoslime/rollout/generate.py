"""From prompts to scored groups: ask for samples, put each on one token axis with its
prompt, and score it."""

import asyncio
import math
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from nanoslime.config import DataConfig, RolloutConfig
from nanoslime.failures import summary
from nanoslime.rollout.rewards import Reward, call
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


async def sample_groups(
    prompts: Sequence[Prompt],
    router: LeastInflightRouter | Engine,
    tokenizer: PreTrainedTokenizerBase,
    config: RolloutConfig,
    reward: Reward,
    *,
    first_group_id: int,
    seed: Sequence[int] = (),
    seeds: Sequence[int] = (),
) -> list[SampleGroup]:
    """A group of config.n_samples_per_prompt scored samples per prompt, in order; all
    are asked for at once.

    `seed` decides the samples of an engine that honours seeds, or `seeds`, one for each prompt.
    A response ends with the
    tokenizer's end of sequence, or with a token that the model's own generation config
    names. A sample that the engine could not make has status error, its cause in
    `error`, and no reward. Raises RunError when no engine is left or when the reward
    fails.
    """
    stop_token_ids = tuple(config.stop_token_ids)
    if tokenizer.eos_token_id is not None:
        stop_token_ids += (tokenizer.eos_token_id,)
    seeds = seeds or [_request_seed(seed, position) for position in range(len(prompts))]
    requests = [
        _request(prompt, config, stop_token_ids, own)
        for prompt, own in zip(prompts, seeds, strict=True)
    ]
    answers = await asyncio.gather(*(router.generate(request) for request in requests))

    groups = []
    for position, (prompt, generations) in enumerate(zip(prompts, answers, strict=True)):
        group_id = first_group_id + position
        first_rollout_id = group_id * config.n_samples_per_prompt
        samples = []
        for i, generation in enumerate(generations):
            sample = make_sample(prompt, generation, group_id, first_rollout_id + i, tokenizer)
            if sample.status is not Status.ERROR:
                sample.reward = _score(reward, sample, prompt)
            samples.append(sample)
        groups.append(SampleGroup(group_id, samples))
    return groups


def make_sample(
    prompt: Prompt,
    generation: Generation,
    group_id: int,
    rollout_id: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Sample:
    """Prompt and response on one axis [T]; the prompt's positions are masked and have
    logprob 0."""
    num_prompt = len(prompt.token_ids)
    num_response = len(generation.token_ids)
    response_ids = np.asarray(generation.token_ids, dtype=np.int32)
    logprobs = np.concatenate([np.zeros(num_prompt), generation.logprobs])
    return Sample(
        group_id=group_id,
        rollout_id=rollout_id,
        token_ids=np.concatenate([prompt.token_ids, response_ids]),
        rollout_logprobs=logprobs.astype(np.float32),
        loss_mask=np.arange(num_prompt + num_response) >= num_prompt,
        policy_versions=[(num_prompt + first, version) for first, version in generation.versions],
        text=tokenizer.decode(generation.token_ids, skip_special_tokens=True),
        status=generation.status,
        error=generation.error,
        routed_experts=generation.routed_experts,
        label=prompt.label,
        metadata={**prompt.metadata, "prompt_id": prompt.prompt_id},
    )


def _request(
    prompt: Prompt, config: RolloutConfig, stop_token_ids: tuple[int, ...], seed: int
) -> GenerateRequest:
    return GenerateRequest(
        token_ids=prompt.token_ids.tolist(),
        n=config.n_samples_per_prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop_token_ids=stop_token_ids,
        stop=tuple(config.stop),
        seed=seed,
    )


def _request_seed(seed: Sequence[int], position: int) -> int:
    """A seed of 63 bits for the request at this position."""
    entropy = [number % 2**32 for number in (*seed, position)]
    bits = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return int(bits >> 1)


def _score(reward: Reward, sample: Sample, prompt: Prompt) -> float:
    """The sample's reward. Raises RunError where the reward fails or is not a finite number."""
    name = getattr(reward, "__module__", reward)
    try:
        value = call(reward, sample, prompt, DataConfig())
    except (Exception, SystemExit) as e:
        raise RunError(
            f"reward {name} failed on prompt {prompt.prompt_id} with {summary(e)}; "
            f"response: {sample.text[:100]!r}"
        ) from e
    if not math.isfinite(value):
        raise RunError(f"reward {name} returned {value} on prompt {prompt.prompt_id}")
    return value
