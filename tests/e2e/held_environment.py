"""An environment that waits, after the policy's answer, for as long as a file is there."""

import asyncio
from pathlib import Path

from nanoslime.rollout.environments import single_turn
from nanoslime.rollout.policy import Policy
from nanoslime.types import Prompt, Sample


async def run(prompt: Prompt, policy: Policy, hold: str) -> list[Sample]:
    samples = await single_turn.run(prompt, policy)
    while await asyncio.to_thread(Path(hold).exists):
        await asyncio.sleep(0.05)
    return samples
