"""Generated and observed tokens on one axis, exactly as they were sampled."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from nanoslime.rollout.policy import Policy, ServedModel
from nanoslime.rollout.sample_builder import SampleBuilder
from nanoslime.rollout.tasks import GroupTask, Sampling
from nanoslime.types import Generation, Prompt, Status

PROMPT = Prompt(9, np.array([70, 71], np.int32), "", "label", {"k": 1})


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    model = ServedModel(None, AutoTokenizer.from_pretrained(tiny_model), 4096)
    sampling = Sampling(n_samples_per_prompt=4, max_new_tokens=9, temperature=1.0)
    return Policy(GroupTask(3, PROMPT, sampling, 0, "none"), 2, model)


def generation(token_ids: list[int], version: int = 0, **more) -> Generation:
    logprobs = [-0.5 - i for i in range(len(token_ids))]
    values = {"status": Status.COMPLETED, "versions": [(0, version)], **more}
    return Generation(token_ids, logprobs, **values)


def experts(num_tokens: int) -> np.ndarray:
    return np.arange(num_tokens * 2, dtype=np.uint8).reshape(num_tokens, 2, 1)


def test_two_turns_with_a_tool_between_them(policy) -> None:
    builder = SampleBuilder(PROMPT, policy)
    builder.generated(generation([72, 73], version=5, routed_experts=experts(3)))
    builder.observed(np.array([80, 81, 82]))
    assert builder.token_ids == [70, 71, 72, 73, 80, 81, 82]
    spans = [(0, 6), (1, 7)]
    second = generation([74, 75], versions=spans, status=Status.TRUNCATED)
    builder.generated(second.__class__(**{**asdict(second), "routed_experts": experts(8)}))
    sample = builder.build()
    assert sample.token_ids.tolist() == [70, 71, 72, 73, 80, 81, 82, 74, 75]
    assert sample.loss_mask.tolist() == [False] * 2 + [True] * 2 + [False] * 3 + [True] * 2
    assert sample.rollout_logprobs.tolist() == [0, 0, -0.5, -1.5, 0, 0, 0, -0.5, -1.5]
    assert sample.policy_versions == [(2, 5), (7, 6), (8, 7)]
    assert sample.routed_experts.shape == (8, 2, 1)
    assert sample.status is Status.TRUNCATED
    assert (sample.group_id, sample.rollout_id) == (3, 3 * 4 + 2)
    assert (sample.label, sample.metadata) == ("label", {"k": 1, "prompt_id": 9})
    decode = policy.tokenizer.decode
    assert sample.text == decode([72, 73]) + "\n" + decode([74, 75])
    types = [a.dtype for a in (sample.token_ids, sample.loss_mask, sample.rollout_logprobs)]
    assert types == [np.int32, np.bool_, np.float32]


def asdict(generation: Generation) -> dict:
    names = ("token_ids", "logprobs", "status", "versions", "error")
    return {name: getattr(generation, name) for name in names}


def test_tokens_that_are_no_text_stay_as_they_were(policy) -> None:
    """Half a character does not survive decoding and encoding."""
    half = policy.encode("é")[:1]
    assert policy.encode(policy.decode(half)) != half
    builder = SampleBuilder(PROMPT, policy)
    builder.generated(generation(half))
    assert builder.build().token_ids.tolist() == [70, 71, *half]


def test_what_was_observed_last_is_left_out(policy) -> None:
    """The experts of these tokens are not known, and no loss depends on them."""
    builder = SampleBuilder(PROMPT, policy)
    builder.generated(generation([72, 73], routed_experts=experts(3)))
    builder.observed([80])
    builder.generated(generation([], versions=[], status=Status.TRUNCATED))
    sample = builder.build()
    assert sample.token_ids.tolist() == [70, 71, 72, 73]
    assert sample.status is Status.TRUNCATED
    assert len(sample.routed_experts) == 3


def test_experts_of_another_sequence_are_refused(policy) -> None:
    builder = SampleBuilder(PROMPT, policy)
    with pytest.raises(ValueError, match="experts of 4 tokens cannot follow 2 tokens"):
        builder.generated(generation([72, 73], routed_experts=experts(4)))


def test_a_failed_turn_gives_its_cause(policy) -> None:
    builder = SampleBuilder(PROMPT, policy)
    builder.generated(generation([72]))
    builder.observed([80])
    builder.generated(generation([], versions=[], status=Status.ERROR, error="no engine"))
    sample = builder.build()
    assert (sample.status, sample.error) == (Status.ERROR, "no engine")
    assert sample.token_ids.tolist() == [70, 71, 72]


def test_a_rollout_without_a_generation_is_an_error(policy) -> None:
    sample = SampleBuilder(PROMPT, policy).build()
    assert (sample.status, sample.error) == (Status.ERROR, "the environment generated nothing")
    assert sample.num_response_tokens == 0


def test_an_environment_may_decide_the_status_and_the_first_tokens(policy) -> None:
    builder = SampleBuilder(PROMPT, policy, token_ids=[90])
    builder.generated(generation([72]))
    sample = builder.build(Status.TRUNCATED)
    assert sample.token_ids.tolist() == [90, 72]
    assert sample.policy_versions == [(1, 0)]
    assert sample.status is Status.TRUNCATED
