"""Arithmetic without `eval`, and a response with results in it that are not in the loss."""

import asyncio
import re
from pathlib import Path

import numpy as np
import pytest

from nanoslime.rollout import environments
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.environments.calculator import answer
from nanoslime.rollout.policy import Policy, ServedModel
from nanoslime.rollout.tasks import GroupTask, Sampling
from nanoslime.types import Prompt, Sample
from tests.rollout.calling_model import save_calling_model, tokenizer_of
from tests.rollout.interrupting import InterruptingRouter

NUM_ROLLOUTS = 24
RESULT = re.compile(r"<calc>([^<]*)</calc><result>([^<]*)</result>")


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("12 * (3 + 4)", "84"),
        ("-2**2", "-4"),
        ("7 // 2 + 7 % 4", "6"),
        ("6 / 3", "2"),
        ("0.1 + 0.2", "0.3"),
        (" 1e3\n", "1000"),
        ("2 ** -1", "0.5"),
        ("1_000", "1000"),
        ("9 ** 999", str(9**999)),
    ],
)
def test_arithmetic_is_evaluated(expression: str, expected: str) -> None:
    assert answer(expression) == expected


@pytest.mark.parametrize(
    "expression, problem",
    [
        ("", "not an arithmetic expression"),
        ("1 +", "not an arithmetic expression"),
        ("(" * 150 + "1" + ")" * 40, "not an arithmetic expression"),
        ("007", "not an arithmetic expression"),
        ("1\x00", ""),
        ("1 / 0", "division by zero"),
        ("0 ** -1", ""),
        ("9 ** 9 ** 9", "too large"),
        ("(9 ** 999) * (9 ** 999)", "too large"),
        ("10.0 ** 400", ""),
        ("1e999", "too large"),
        ("1e999 - 1e999", "too large"),
        ("(9 ** 999) * 1.5", ""),
        ("(-8) ** 0.5", "not a real number"),
        ("1 + " * 100 + "1", "more than 200 characters"),
        ("True + 1", "only numbers"),
        ("2j", "only numbers"),
        ("'a' * 9", "only numbers"),
        ("1 << 9", "only numbers"),
        ("1 < 2", "only numbers"),
        ("abs(1)", "only numbers"),
        ("().__class__", "only numbers"),
        ("__import__('os').getpid()", "only numbers"),
        ("[1 for _ in 'ab']", "only numbers"),
        ("1,000", "only numbers"),
        ("x := 1", "not an arithmetic expression"),
    ],
)
def test_anything_else_is_answered_by_its_fault(expression: str, problem: str) -> None:
    found = answer(expression)
    assert found.startswith("error: ")
    assert problem in found


def test_results_are_those_of_the_calls_and_not_in_the_loss(tmp_path: Path) -> None:
    path = save_calling_model(tmp_path / "model")
    engine = EmbeddedEngine(str(path), "float32", "cpu", seed=0)
    tokenizer = tokenizer_of(path)
    prompt = Prompt(0, np.array(tokenizer.encode("12="), np.int32), "12=", "3")
    sampling = Sampling(n_samples_per_prompt=NUM_ROLLOUTS, max_new_tokens=40, temperature=1.0)
    task = GroupTask(0, prompt, sampling, 5, "none")
    # New weights arrive in the second turn, after its first token.
    routers = [InterruptingRouter(engine, [99, 1]) for _ in range(NUM_ROLLOUTS)]

    async def sampled() -> list[list[Sample]]:
        environment = environments.make("calculator", {"max_calls": 2})
        policies = [
            Policy(task, index, ServedModel(router, tokenizer, 512))
            for index, router in enumerate(routers)
        ]
        return await asyncio.gather(*(environment(prompt, policy) for policy in policies))

    num_calls = 0
    for [sample], router in zip(asyncio.run(sampled()), routers, strict=True):
        text = tokenizer.decode(sample.token_ids)
        results = RESULT.findall(text)
        num_calls += len(results)
        assert all(answer(expression) == result for expression, result in results)
        written = [f"<result>{result}</result>" for _, result in results]
        observed = sample.token_ids[3:][~sample.loss_mask[3:]]
        assert tokenizer.decode(observed) == "".join(written)
        assert (sample.rollout_logprobs[sample.loss_mask] < 0).all()
        assert not sample.rollout_logprobs[~sample.loss_mask].any()
        # Every request is the beginning of the sample, token by token.
        for request in router.requests:
            assert sample.token_ids[: len(request.token_ids)].tolist() == request.token_ids
        starts = [len(request.token_ids) for request in router.requests]
        versions = [0, 1, 2, 2][: len(starts)]
        spans = [(s, v) for s, v in zip(starts, versions, strict=True) if s < sample.num_tokens]
        assert sample.policy_versions == spans
    assert num_calls > NUM_ROLLOUTS / 4
