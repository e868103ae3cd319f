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
import logging
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanoslime.plugins import resolve
from nanoslime.processes.logs import last_line
from nanoslime.processes.tree import kill_all
from nanoslime.rollout.openai_endpoint import OpenAIEndpoint, Session
from nanoslime.rollout.policy import Policy
from nanoslime.types import Prompt, RunError, Sample

logger = logging.getLogger(__name__)


class Agent:
    def __init__(
        self,
        agent: str | Sequence[str],
        agent_options: Mapping[str, Any] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        """`host` is the address of this machine that the agent reaches.

        Raises ValueError for a function that cannot be loaded.
        """
        self._agent: Any = agent
        if isinstance(agent, str):
            self._agent = resolve(agent, {}, "environment_options.agent")
        self._options = dict(agent_options or {})
        self._host = host
        self._endpoint = OpenAIEndpoint(host)

    async def __call__(self, prompt: Prompt, policy: Policy) -> list[Sample]:
        """The sequences that the agent has made. Raises what the agent raises, and RunError
        where its command fails."""
        async with self._endpoint.session(prompt, policy) as session:
            reward = await self._run(prompt, session)
            samples = session.samples()
        for sample in samples:
            sample.reward = reward
        return samples

    async def close(self) -> None:
        await self._endpoint.close()

    async def _run(self, prompt: Prompt, session: Session) -> float | None:
        if not callable(self._agent):
            await self._run_command(prompt, session)
            return None
        given = {
            "prompt": prompt.text,
            "metadata": dict(prompt.metadata),
            "base_url": session.url,
            "api_key": session.token,
            **self._options,
        }
        if inspect.iscoroutinefunction(self._agent):
            reward = await self._agent(**given)
        else:
            reward = await _in_thread(self._agent, given)
        return None if reward is None else float(reward)

    async def _run_command(self, prompt: Prompt, session: Session) -> None:
        """Whatever the command has started ends with it."""
        given = json.dumps({"prompt": prompt.text, "metadata": prompt.metadata})
        environ = {"OPENAI_BASE_URL": session.url, "OPENAI_API_KEY": session.token}
        # No proxy of the environment leads to this machine.
        for name in ("NO_PROXY", "no_proxy"):
            environ[name] = ",".join([*filter(None, [os.environ.get(name)]), self._host])
        # A pipe would stay open as long as a process that the command leaves behind.
        with tempfile.NamedTemporaryFile() as told:
            process = await asyncio.create_subprocess_exec(
                *self._agent,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=told,
                env={**os.environ, **environ},
                start_new_session=True,
            )
            try:
                await process.communicate(given.encode())
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
                await _in_thread(_end_all_of, {"url": session.url})
            if process.returncode != 0:
                told_last = last_line(Path(told.name))
                raise RunError(f"the agent's command ended with {process.returncode}: {told_last}")


async def _in_thread(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """What the function returns. It runs in a thread of its own, however many others do, and one
    that never ends does not keep this process from ending.
    """
    answer: Future[Any] = Future()

    def run() -> None:
        answer.set_running_or_notify_cancel()
        try:
            answer.set_result(function(**given))
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="agent", daemon=True).start()
    return await asyncio.wrap_future(answer)


def _end_all_of(url: str) -> None:
    """Kills the processes that have this URL in their environment, in whatever session."""
    left = kill_all(lambda process: process.environ().get("OPENAI_BASE_URL") == url)
    if left:
        logger.error("of an agent, %s", left)
