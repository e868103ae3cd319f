"""The reward that a server gives: data.reward_url, asked by POST.

The server gets JSON with prompt, response, label and metadata. It answers a number, or an
object with the number as "reward" or "score". It is asked again, after a pause that doubles,
where it cannot be reached or answers 408, 425, 429 or 5xx, as long as data.reward_timeout_s
lasts. Any other answer is an error at once.
"""

import asyncio
import json
from typing import Any

import aiohttp

_AGAIN = frozenset({408, 425, 429, *range(500, 600)})
_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 5.0


async def reward(
    text: str,
    label: Any,
    metadata: dict[str, Any],
    *,
    prompt: str = "",
    reward_url: str,
    timeout_s: float,
) -> float:
    """Raises RuntimeError, with the last answer, where no try gives a number in time."""
    sample = {"prompt": prompt, "response": text, "label": label, "metadata": metadata}
    body = json.dumps(sample, default=str)
    loop = asyncio.get_running_loop()
    # What went wrong last is worth more than that the time is up.
    give_up = loop.time() + 0.95 * timeout_s
    pause_s = _FIRST_PAUSE_S
    async with aiohttp.ClientSession(headers={"Content-Type": "application/json"}) as session:
        while True:
            limit = aiohttp.ClientTimeout(total=give_up - loop.time())
            try:
                async with session.post(reward_url, data=body, timeout=limit) as response:
                    status = response.status
                    answer = await response.text()
            except (aiohttp.ClientError, OSError) as error:
                status = 503
                answer = f"{type(error).__name__}: {error}"
            if status == 200:
                return _number(answer)
            if status not in _AGAIN or loop.time() + pause_s > give_up:
                raise RuntimeError(f"{reward_url} gave no reward; last: {status} {answer[:200]}")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)


def _number(answer: str) -> float:
    """Raises RuntimeError where the server has answered none."""
    try:
        found = json.loads(answer)
        value = found.get("reward", found.get("score")) if isinstance(found, dict) else found
        return float(value)
    except (TypeError, ValueError):
        raise RuntimeError(
            f"the reward server answered {answer[:200]!r}, which holds no number"
        ) from None
