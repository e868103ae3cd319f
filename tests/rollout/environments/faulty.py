"""An environment that goes wrong on some prompts, by their labels: it raises, it hangs, or it
does either in one rollout of a group only."""

import asyncio

from nanoslime.rollout.environments import single_turn
from nanoslime.rollout.policy import Policy
from nanoslime.types import Prompt, Sample


async def run(prompt: Prompt, policy: Policy, num_samples: int) -> list[Sample]:
    samples = await single_turn.run(prompt, policy)
    is_first = policy.rollout_id % num_samples == 0
    match int(prompt.label) % 4:
        case 1:
            raise ConnectionError("the tool's server is gone")
        case 2:
            await asyncio.Event().wait()
        case 3 if is_first:
            await asyncio.Event().wait()
    return samples
