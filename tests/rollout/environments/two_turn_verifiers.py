"""An environment of verifiers: the model answers, is asked to check, and answers again."""

import verifiers as vf
from datasets import Dataset


class TwoTurns(vf.MultiTurnEnv):
    async def env_response(self, messages, state, **kwargs):
        return [{"role": "user", "content": "check:="}]


async def odd(completion, answer, **kwargs) -> float:
    """The share of responses that end with an odd digit."""
    responses = [m["content"].strip() for m in completion if m["role"] == "assistant"]
    return sum(r[-1:] in "13579" for r in responses if r) / 2


def load_environment(max_turns: int = 2, fails: bool = False) -> vf.Environment:
    rows = [{"prompt": [{"role": "user", "content": "12="}], "answer": "3"}]
    environment = TwoTurns(
        dataset=Dataset.from_list(rows), rubric=vf.Rubric(funcs=[odd]), max_turns=max_turns
    )
    if fails:

        async def broken(state, **kwargs):
            raise vf.InfraError("the sandbox is gone")

        environment.setup_state = broken
    return environment
