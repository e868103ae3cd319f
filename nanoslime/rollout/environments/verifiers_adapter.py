"""Environments of the package `verifiers`, which is installed on request.

verifiers speaks to our OpenAI-compatible endpoint, so that an environment runs unchanged, and
what is trained on is what was sampled. Its own rubric gives the reward. `verifiers==0.1.10` is
the newest that can be installed beside the `openai` that SGLang asks for; 0.4 has another API.

Prompts are those of the run. To train on the dataset of an environment, write it as such:

    for row in verifiers.load_environment(ID).get_dataset():
        line = {"prompt": row["prompt"], "label": row["answer"], "metadata": {"verifiers": row}}
        file.write(json.dumps(line) + "\n")
"""

from collections.abc import Mapping
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from nanoslime.rollout.openai_endpoint import OpenAIEndpoint
from nanoslime.rollout.policy import Policy
from nanoslime.types import Prompt, RunError, Sample

try:
    from verifiers import load_environment
except ImportError as error:
    raise ImportError(
        f"{error}; environments of verifiers need its version 0.1.10: "
        "uv pip install verifiers==0.1.10"
    ) from error


class Verifiers:
    def __init__(
        self, id: str, args: Mapping[str, Any] | None = None, host: str = "127.0.0.1"
    ) -> None:
        """`id` and `args` are those of verifiers' `load_environment`; `host` as for agents.

        Raises whatever loading the environment raises.
        """
        self._environment = load_environment(id, **(args or {}))
        self._endpoint = OpenAIEndpoint(host)

    async def __call__(self, prompt: Prompt, policy: Policy) -> list[Sample]:
        """Raises RunError, with the cause, where the environment ends with an error."""
        row = self._row(prompt, policy)
        async with self._endpoint.session(prompt, policy) as session:
            # An endpoint that refuses would refuse again, and a long response takes long.
            client = AsyncOpenAI(
                base_url=session.url,
                api_key=session.token,
                max_retries=0,
                timeout=None,
                # No proxy of the environment leads to this machine.
                http_client=DefaultAsyncHttpxClient(trust_env=False),
            )
            async with client:
                output = await self._environment.run_rollout(row, client, "policy", {})
            samples = session.samples()
        if output["error"]:
            raise RunError(f"verifiers: {output['error']['error_chain_repr']}")
        for sample in samples:
            sample.reward = output["reward"]
        return samples

    async def close(self) -> None:
        await self._endpoint.close()

    def _row(self, prompt: Prompt, policy: Policy) -> dict[str, Any]:
        """The dataset row of verifiers: metadata "verifiers", or made of prompt and label."""
        row = prompt.metadata.get("verifiers")
        if row is None and policy.chat.template_kwargs is not None:
            raise RunError(
                "verifiers applies the chat template to messages of its own: set "
                'data.chat_template=off, or give its dataset rows as metadata "verifiers"'
            )
        content: Any = prompt.text
        if self._environment.message_type == "chat":
            content = [{"role": "user", "content": prompt.text}]
        answer = "" if prompt.label is None else str(prompt.label)
        made = {"prompt": content, "answer": answer, "info": dict(prompt.metadata)}
        return {"example_id": prompt.prompt_id, "task": "default", **(row or made)}
