"""Agents in the process and beside it: their samples, rewards, time limits and failures."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoslime.rollout import environments
from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.policy import Policy, ServedModel
from nanoslime.rollout.tasks import GroupTask, Sampling
from nanoslime.types import Prompt, RunError, Sample
from tests.rollout.calling_model import save_calling_model, tokenizer_of
from tests.rollout.environments import agents
from tests.rollout.interrupting import InterruptingRouter

PROMPT = Prompt(4, np.array([9], np.int32), "12=", "3", {"k": 0.5})
HERE = "tests.rollout.environments.agents"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    path = save_calling_model(tmp_path_factory.mktemp("calling") / "model")
    engine = EmbeddedEngine(str(path), "float32", "cpu", seed=0)
    return ServedModel(InterruptingRouter(engine), tokenizer_of(path), 512)


def rolled_out(
    served: ServedModel, n: int = 1, timeout_s: float = 60.0, **options: Any
) -> list[list[Sample]]:
    sampling = Sampling(n_samples_per_prompt=n, max_new_tokens=60, temperature=1.0)
    task = GroupTask(7, PROMPT, sampling, 3, "none")

    async def one(environment: environments.Environment, policy: Policy) -> list[Sample]:
        async with policy.time_limit(timeout_s):
            return await environment(PROMPT, policy)

    async def run() -> list[list[Sample]]:
        environment = environments.make("agent", options)
        try:
            policies = [Policy(task, index, served) for index in range(n)]
            return await asyncio.gather(*(one(environment, policy) for policy in policies))
        finally:
            await environments.close(environment)

    return asyncio.run(run())


def test_rollouts_of_one_endpoint_are_kept_apart(served) -> None:
    rollouts = rolled_out(served, n=4, agent=f"{HERE}:two_turns", agent_options={"reward": 0.25})
    question = served.tokenizer.encode("12=")
    for index, [sample] in enumerate(rollouts):
        assert sample.rollout_id == 28 + index
        assert sample.token_ids[: len(question)].tolist() == question
        assert len(sample.policy_versions) == 2
        assert 2 <= sample.num_response_tokens <= 16
        assert sample.reward == 0.25
    assert len({tuple(sample.token_ids) for [sample] in rollouts}) == 4


def test_without_a_number_the_reward_is_for_the_run_to_give(served) -> None:
    [[sample]] = rolled_out(served, agent=f"{HERE}:two_turns")
    assert sample.reward is None


def test_a_plain_function_runs_in_a_thread(served) -> None:
    rollouts = rolled_out(served, n=2, agent=f"{HERE}:plain")
    assert [sample.reward for [sample] in rollouts] == [0.5, 0.5]


def test_a_command_is_told_where_the_endpoint_is(served, no_leftovers, monkeypatch) -> None:
    """And goes there without the proxy that it may need for other addresses."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.org")
    command = [sys.executable, str(Path(agents.__file__)), "work"]
    [[sample]] = rolled_out(served, agent=command)
    assert sample.num_response_tokens > 0 and sample.reward is None


def test_a_command_that_fails_gives_its_last_line(served, no_leftovers) -> None:
    command = [sys.executable, str(Path(agents.__file__)), "fail"]
    with pytest.raises(RunError, match="command ended with 1: the tool is not there"):
        rolled_out(served, agent=command)


@pytest.mark.parametrize("agent", [f"{HERE}:endless", f"{HERE}:endless_thread", "hang"])
def test_an_agent_that_takes_too_long_is_ended_with_all_its_processes(
    served, agent, no_leftovers
) -> None:
    if agent == "hang":
        agent = [sys.executable, str(Path(agents.__file__)), "hang"]
    with pytest.raises(RunError, match="longer than rollout.environment_timeout_s=1.5"):
        rolled_out(served, agent=agent, timeout_s=1.5)


def test_what_a_command_leaves_behind_ends_with_it(served, no_leftovers) -> None:
    command = [sys.executable, str(Path(agents.__file__)), "leave"]
    [[sample]] = rolled_out(served, agent=command)
    assert sample.error == "the environment generated nothing"


def test_plain_functions_run_side_by_side_however_many_they_are(served) -> None:
    """The event loop has fewer threads."""
    rollouts = rolled_out(served, n=64, agent=f"{HERE}:together", agent_options={"n": 64})
    assert [sample.reward for [sample] in rollouts] == [1.0] * 64


def test_a_plain_function_that_hangs_keeps_no_process_from_ending() -> None:
    program = f"""
import asyncio
from {HERE} import endless_thread
from nanoslime.rollout.environments import agent
async def main():
    given = dict(prompt="", metadata={{}}, base_url="", api_key="")
    async with asyncio.timeout(0.1):
        await agent._in_thread(endless_thread, given)
asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert b"TimeoutError" in ended.stderr


def test_what_an_agent_raises_goes_to_the_worker(served) -> None:
    with pytest.raises(LookupError, match="no such page"):
        rolled_out(served, agent=f"{HERE}:broken")


def test_an_agent_that_cannot_be_loaded_is_refused_at_the_start() -> None:
    for agent, message in (("tests.nowhere:run", "cannot load"), ("nonsense", "is unknown")):
        with pytest.raises(RunError, match=f"environment_options.agent='{agent}'.*{message}"):
            environments.make("agent", {"agent": agent})
