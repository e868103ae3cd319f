"""The reward that a server gives: data.reward_url, asked by POST.

The server gets JSON with prompt, response, label, metadata and status. It answers a number, or
an object with the number as "reward" or "score". It is asked again, after a pause that doubles,
where it cannot be reached or answers 408, 425, 429 or 5xx, as long as data.reward_timeout_s
lasts. Any other answer is an error at once.
"""

import asyncio
import json
from typing import Any

import aiohttp

from nanoslime.types import Status

_AGAIN = frozenset({408, 425, 429, *range(500, 600)})
_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 5.0


async def reward(
    text: str,
    label: Any,
    metadata: dict[str, Any],
    *,
    prompt: str = "",
    status: Status = Status.COMPLETED,
    reward_url: str,
    timeout_s: float,
    headers: dict[str, str] | None = None,
) -> float:
    """Raises RuntimeError that says what was wrong last where no try gives a number in time."""
    sample = {
        "prompt": prompt,
        "response": text,
        "label": label,
        "metadata": metadata,
        "status": status,
    }
    body = json.dumps(sample, default=str)
    all_headers = {"Content-Type": "application/json"} | (headers or {})
    loop = asyncio.get_running_loop()
    # The last words of a server are worth more than that the time is up.
    deadline = loop.time() + 0.95 * timeout_s
    pause_s = _FIRST_PAUSE_S
    cause = "no answer"
    async with aiohttp.ClientSession(headers=all_headers) as session:
        while loop.time() < deadline:
            left = aiohttp.ClientTimeout(total=deadline - loop.time())
            try:
                async with session.post(reward_url, data=body, timeout=left) as response:
                    answer = await response.text()
                    if response.status == 200:
                        return _number(answer)
                    cause = f"HTTP {response.status}: {answer:.200}"
                    if response.status not in _AGAIN:
                        break
            except (aiohttp.ClientError, OSError) as error:
                cause = f"{type(error).__name__}: {error}"
            await asyncio.sleep(min(pause_s, max(deadline - loop.time(), 0.0)))
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
    raise RuntimeError(f"{reward_url} gave no reward in {timeout_s:g} s; last: {cause}")


def _number(answer: str) -> float:
    """Raises RuntimeError where the server has answered none."""
    try:
        value = json.loads(answer)
    except ValueError:
        value = None
    if isinstance(value, dict):
        value = value.get("reward", value.get("score"))
    if isinstance(value, int | float):
        return float(value)
    raise RuntimeError(f"the reward server answered {answer[:200]!r}, which holds no number")
