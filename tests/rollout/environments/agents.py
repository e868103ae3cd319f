"""Agents that know nothing of nanoslime: functions, and as a script a command."""

import asyncio
import json
import subprocess
import sys
import threading
import time

from openai import AsyncOpenAI, OpenAI


async def two_turns(*, prompt, metadata, base_url, api_key, reward=None):
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        messages = [{"role": "user", "content": prompt}]
        for _ in range(2):
            answer = await client.chat.completions.create(
                model="m", messages=messages, max_tokens=8
            )
            messages += [answer.choices[0].message, {"role": "user", "content": "check:="}]
    return reward


def plain(*, prompt, metadata, base_url, api_key):
    with OpenAI(base_url=base_url, api_key=api_key) as client:
        client.completions.create(model="m", prompt=prompt, max_tokens=8)
    return metadata["k"]


_barriers: dict[int, threading.Barrier] = {}


def together(*, prompt, metadata, base_url, api_key, n):
    """Returns when so many are in it at once."""
    _barriers.setdefault(n, threading.Barrier(n)).wait(30)
    return 1


def endless_thread(*, prompt, metadata, base_url, api_key):
    time.sleep(3600)


async def endless(*, prompt, metadata, base_url, api_key):
    await asyncio.sleep(3600)


async def broken(*, prompt, metadata, base_url, api_key):
    raise LookupError("no such page")


def main(what: str) -> None:
    given = json.load(sys.stdin)
    if what == "fail":
        sys.exit("the tool is not there")
    if what == "hang":
        # A child of its own must not outlive it.
        subprocess.run([sys.executable, "-c", "import time; time.sleep(3600)"])
        time.sleep(3600)
    if what == "leave":
        # A process of another session, which holds this one's output.
        subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True
        )
        return
    assert given["metadata"] == {"k": 0.5}
    with OpenAI() as client:  # OPENAI_BASE_URL and OPENAI_API_KEY say where and as whom
        messages = [{"role": "user", "content": given["prompt"]}]
        client.chat.completions.create(model="m", messages=messages, max_tokens=8)


if __name__ == "__main__":
    main(sys.argv[1])
