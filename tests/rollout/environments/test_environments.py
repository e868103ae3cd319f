"""The table of environments, and the default one."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from nanoslime.rollout import environments
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.policy import Policy, ServedModel
from nanoslime.rollout.router import Router
from nanoslime.rollout.tasks import GroupTask, Sampling
from nanoslime.types import Prompt, RunError, Status
from tests.serving import reference_logprobs


async def with_options(prompt, policy, *, num_turns, style="plain"):
    return [num_turns, style]


class Counting:
    is_closed = False

    def __init__(self, limit: int = 3) -> None:
        if limit < 0:
            raise ValueError("limit is negative")
        self.limit = limit

    async def __call__(self, prompt, policy):
        return [self.limit]

    async def close(self) -> None:
        self.is_closed = True


HERE = "tests.rollout.environments.test_environments"


def test_options_are_the_further_arguments() -> None:
    environment = environments.make(f"{HERE}:with_options", {"num_turns": 2})
    assert asyncio.run(environment(None, None)) == [2, "plain"]
    asyncio.run(environments.close(environment))


def test_a_class_is_made_once_and_closed() -> None:
    environment = environments.make(f"{HERE}:Counting", {"limit": 5})
    assert asyncio.run(environment(None, None)) == [5]
    asyncio.run(environments.close(environment))
    assert environment.is_closed


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("single", {}, "'single' is unknown; choose one of .*single_turn"),
        ("nowhere.at_all:run", {}, "cannot load nowhere.at_all:run"),
        (f"{HERE}:HERE", {}, "name a function or a class"),
        (f"{HERE}:with_options", {}, "missing .* 'num_turns'.*: num_turns, style"),
        (f"{HERE}:with_options", {"num_turns": 1, "turns": 2}, "'turns'.*options: num_turns"),
        (f"{HERE}:with_options", {"num_turns": 1, "policy": 2}, "'policy'"),
        ("single_turn", {"n": 1}, "'n'.*its options: none"),
        (f"{HERE}:Counting", {"most": 1}, "'most'.*its options: limit"),
        (f"{HERE}:Counting", {"limit": -1}, "cannot be made: ValueError: limit is negative"),
    ],
)
def test_a_wrong_environment_is_refused_in_one_line(name, options, message) -> None:
    with pytest.raises(RunError, match=message) as caught:
        environments.make(name, options)
    assert "\n" not in str(caught.value)


def test_single_turn_is_one_response(tiny_model: Path) -> None:
    engine = EmbeddedEngine(str(tiny_model), "float32", "cpu", seed=0)
    model = ServedModel(Router([engine]), AutoTokenizer.from_pretrained(tiny_model), 64)
    prompt = Prompt(4, np.array([75, 76, 77], np.int32), "", "a", {"k": 1})
    sampling = Sampling(n_samples_per_prompt=3, max_new_tokens=6, temperature=0.7)
    task = GroupTask(2, prompt, sampling, 11, "none")
    environment = environments.make("single_turn", {})

    async def group():
        return await asyncio.gather(
            *(environment(prompt, Policy(task, i, model)) for i in range(3))
        )

    samples = [sample for [sample] in asyncio.run(group())]
    assert [sample.rollout_id for sample in samples] == [6, 7, 8]
    assert len({tuple(sample.token_ids) for sample in samples}) == 3
    again = [sample for [sample] in asyncio.run(group())]
    for sample, same in zip(samples, again, strict=True):
        assert sample.token_ids.tolist() == same.token_ids.tolist()
        response = sample.token_ids[3:].tolist()
        assert sample.text == model.tokenizer.decode(response, skip_special_tokens=True)
        assert sample.loss_mask.tolist() == [False] * 3 + [True] * 6
        assert sample.policy_versions == [(3, 0)]
        assert sample.status is Status.TRUNCATED
        reference = reference_logprobs(tiny_model, [75, 76, 77], response, 0.7)
        assert np.abs(sample.rollout_logprobs[3:] - reference.numpy()).max() < 1e-5
