"""Two turns of the model, with a question between them that is not in the loss."""

import asyncio
from pathlib import Path

import numpy as np

from nanoslime.rollout import environments
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.policy import Policy, ServedModel
from nanoslime.rollout.router import Router
from nanoslime.rollout.tasks import GroupTask, Sampling
from nanoslime.types import Prompt, Sample, Status
from tests.rollout.calling_model import save_calling_model, tokenizer_of

NUM_ROLLOUTS = 12


def test_the_question_is_observed_and_both_answers_are_generated(tmp_path: Path) -> None:
    path = save_calling_model(tmp_path / "model")
    engine = EmbeddedEngine(str(path), "float32", "cpu", seed=0)
    tokenizer = tokenizer_of(path)
    prompt = Prompt(0, np.array(tokenizer.encode("12="), np.int32), "12=", "3")
    sampling = Sampling(n_samples_per_prompt=NUM_ROLLOUTS, max_new_tokens=24, temperature=1.0)
    task = GroupTask(0, prompt, sampling, 5, "none")
    model = ServedModel(Router([engine]), tokenizer, 512)

    async def sampled() -> list[list[Sample]]:
        environment = environments.make("self_check", {"question": "check:="})
        policies = [Policy(task, index, model) for index in range(NUM_ROLLOUTS)]
        return await asyncio.gather(*(environment(prompt, policy) for policy in policies))

    samples = [sample for [sample] in asyncio.run(sampled())]
    for sample in samples:
        assert sample.num_response_tokens <= 24
        [first, *later] = sample.policy_versions
        assert first == (3, 0)
        if not later:
            assert sample.status is Status.TRUNCATED
            continue
        [(second, _)] = later
        end = second - len("check:=")
        assert sample.loss_mask[3:end].all() and sample.loss_mask[second:].all()
        assert not sample.loss_mask[end:second].any()
        assert tokenizer.decode(sample.token_ids[end:second]) == "check:="
        assert sample.token_ids[end - 1] == tokenizer.eos_token_id
        answers = [sample.token_ids[3:end], sample.token_ids[second:]]
        texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        assert sample.text == "\n".join(texts)
    assert sum(sample.status is Status.COMPLETED for sample in samples) > NUM_ROLLOUTS / 2
