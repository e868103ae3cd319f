"""Two turns: the model answers, is asked to check its answer, and answers again.

The reward sees both responses; the tokens of both are trained on.
"""

from nanoslime.rollout.policy import Policy
from nanoslime.rollout.sample_builder import SampleBuilder
from nanoslime.types import Prompt, Sample, Status

_QUESTION = "Check your answer step by step, then give the final answer."


async def run(prompt: Prompt, policy: Policy, *, question: str = _QUESTION) -> list[Sample]:
    builder = SampleBuilder(prompt, policy)
    first = await policy.generate(builder.token_ids)
    builder.generated(first)
    if first.status is Status.COMPLETED:
        asked = [{"role": "user", "content": question}]
        builder.observed(policy.chat.following(builder.token_ids, asked))
        builder.generated(await policy.generate(builder.token_ids))
    return [builder.build()]
