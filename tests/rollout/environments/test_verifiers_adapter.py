"""Environments of verifiers, where it is installed: `uv pip install verifiers==0.1.10`.

It is no part of the environment that CI has, so that these tests carry no mark of the stack.
"""

import asyncio
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from nanoslime.rollout import environments
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.policy import Policy, ServedModel
from nanoslime.rollout.tasks import GroupTask, Sampling
from nanoslime.types import Prompt, RunError, Sample
from tests.rollout.calling_model import save_calling_model, tokenizer_of
from tests.rollout.interrupting import InterruptingRouter

needs_verifiers = pytest.mark.skipif(
    find_spec("verifiers") is None, reason="verifiers is installed on request only"
)
ID = "tests.rollout.environments.two_turn_verifiers"
PROMPT = Prompt(4, np.array([9], np.int32), "12=", "3", {"k": 0.5})


def rolled_out(
    tmp_path: Path, prompt: Prompt = PROMPT, template: dict | None = None, **args
) -> list[Sample]:
    path = save_calling_model(tmp_path / "model")
    engine = EmbeddedEngine(str(path), "float32", "cpu", seed=0)
    served = ServedModel(InterruptingRouter(engine), tokenizer_of(path), 512, template)
    sampling = Sampling(n_samples_per_prompt=4, max_new_tokens=40, temperature=1.0)
    task = GroupTask(7, prompt, sampling, 3, "none")

    async def run() -> list[list[Sample]]:
        environment = environments.make("verifiers", {"id": ID, "args": args})
        try:
            policies = [Policy(task, index, served) for index in range(4)]
            return await asyncio.gather(*(environment(prompt, policy) for policy in policies))
        finally:
            await environments.close(environment)

    return [sample for [sample] in asyncio.run(run())]


@needs_verifiers
def test_two_turns_are_one_sample_with_the_reward_of_the_rubric(tmp_path: Path) -> None:
    for sample in rolled_out(tmp_path):
        answers = [text.strip() for text in sample.text.split("\n")]
        assert sample.reward == sum(text[-1:] in "13579" for text in answers if text) / 2
        if len(sample.policy_versions) == 1:  # the first turn took all tokens
            assert sample.num_response_tokens == 40
            continue
        [(first, _), (second, _)] = sample.policy_versions
        assert (first, sample.loss_mask[first:second].sum()) == (3, second - first - 7)
        assert sample.loss_mask[second:].all()


@needs_verifiers
def test_a_row_of_the_dataset_may_come_with_the_prompt(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "7="}], "answer": "1"}
    prompt = Prompt(4, np.array([9], np.int32), "", "3", {"verifiers": row})
    for sample in rolled_out(tmp_path, prompt):
        assert tokenizer_of(tmp_path / "model").decode(sample.token_ids[:2]) == "7="


@needs_verifiers
def test_prompts_that_a_template_was_applied_to_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="set data.chat_template=off"):
        rolled_out(tmp_path, template={})


@needs_verifiers
def test_an_environment_that_fails_tells_its_cause(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="verifiers: .*the sandbox is gone"):
        rolled_out(tmp_path, fails=True)


@pytest.mark.skipif(find_spec("verifiers") is not None, reason="verifiers is installed")
def test_without_verifiers_the_run_says_how_to_install_it() -> None:
    with pytest.raises(RunError, match="uv pip install verifiers==0.1.10"):
        environments.make("verifiers", {"id": "any"})
