"""Runs an agent written elsewhere, which speaks to an OpenAI-compatible endpoint.

    agent: "package.module:function"    awaited, or called in a thread, with keywords: prompt,
                                        metadata, base_url, api_key and agent_options. A number
                                        that it returns is the reward.
    agent: ["python", "agent.py"]       run with OPENAI_BASE_URL and OPENAI_API_KEY set, and
                                        {"prompt": ..., "metadata": ...} as JSON on its stdin.

`prompt` is the text of the prompt; with data.chat_template=off it is as the data has it.
"""

import asyncio
import inspect
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from nanoslime.plugins import resolve
from nanoslime.rollout.openai_endpoint import OpenAIEndpoint, Session
from nanoslime.rollout.policy import Policy
from nanoslime.types import Prompt, RunError, Sample


class Agent:
    def __init__(
        self,
        agent: str | Sequence[str],
        agent_options: Mapping[str, Any] | None = None,
        timeout_s: float = 3600.0,
        host: str = "127.0.0.1",
    ) -> None:
        """`host` is the address of this machine that the agent reaches.

        Raises ValueError for a function that cannot be loaded.
        """
        self._function = None
        self._command: Sequence[str] = ()
        if isinstance(agent, str):
            self._function = resolve(agent, {}, "environment_options.agent")
        else:
            self._command = agent
        self._options = dict(agent_options or {})
        self._timeout_s = timeout_s
        self._endpoint = OpenAIEndpoint(host)

    async def __call__(self, prompt: Prompt, policy: Policy) -> list[Sample]:
        """The sequences that the agent has made. Raises what the agent raises, and RunError
        where it takes too long or its command fails."""
        async with self._endpoint.session(prompt, policy) as session:
            try:
                async with asyncio.timeout(self._timeout_s):
                    reward = await self._run(prompt, session)
            except TimeoutError as error:
                raise RunError(
                    f"the agent was not done within timeout_s={self._timeout_s:g}"
                ) from error
            samples = session.samples()
        for sample in samples:
            sample.reward = reward
        return samples

    async def close(self) -> None:
        await self._endpoint.close()

    async def _run(self, prompt: Prompt, session: Session) -> float | None:
        if self._function is None:
            await self._run_command(prompt, session)
            return None
        given = {
            "prompt": prompt.text,
            "metadata": dict(prompt.metadata),
            "base_url": session.url,
            "api_key": session.token,
            **self._options,
        }
        if inspect.iscoroutinefunction(self._function):
            reward = await self._function(**given)
        else:
            reward = await asyncio.to_thread(self._function, **given)
        return None if reward is None else float(reward)

    async def _run_command(self, prompt: Prompt, session: Session) -> None:
        """Whatever the command has started ends with it."""
        given = json.dumps({"prompt": prompt.text, "metadata": prompt.metadata})
        environ = {"OPENAI_BASE_URL": session.url, "OPENAI_API_KEY": session.token}
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **environ},
            start_new_session=True,
        )
        try:
            _, told = await process.communicate(given.encode())
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if process.returncode != 0:
            lines = told.decode(errors="replace").strip().splitlines() or ["it wrote no error"]
            raise RunError(f"the agent's command ended with {process.returncode}: {lines[-1]}")
