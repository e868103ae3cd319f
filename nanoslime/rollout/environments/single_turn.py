"""One prompt, one response: the default environment."""

from nanoslime.rollout.policy import Policy
from nanoslime.rollout.sample_builder import SampleBuilder
from nanoslime.types import Prompt, Sample


async def run(prompt: Prompt, policy: Policy) -> list[Sample]:
    builder = SampleBuilder(prompt, policy)
    builder.generated(await policy.generate(builder.token_ids))
    return [builder.build()]
