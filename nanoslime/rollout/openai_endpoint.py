"""An OpenAI-compatible endpoint for agents that know nothing of training: token in, token out.

    agent  --messages-->  /sessions/<id>/v1/chat/completions  --token ids-->  Policy  -->  engines

Each rollout has a session. It keeps the tokens and logprobs of every turn: where a request goes
on from an earlier turn, the tokens of that turn stay as they were sampled, and only the messages
after it are tokenized. Turns form a tree, since an agent may go back, or begin anew.
"""

import asyncio
import hmac
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiohttp import web
from jinja2 import TemplateError

from nanoslime.rollout import openai_format
from nanoslime.rollout.chat import Chat
from nanoslime.rollout.openai_format import Asked
from nanoslime.rollout.policy import Policy
from nanoslime.rollout.sample_builder import SampleBuilder
from nanoslime.types import Prompt, RunError, Sample, Status

logger = logging.getLogger(__name__)

_MAX_REQUEST_BYTES = 256 << 20
# What a request can be refused for.
_REFUSED = (
    *(RunError, ValueError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, RecursionError, TemplateError),
)
# Sampling that an agent may set, and the run's configuration decides on.
_SAMPLING = """temperature top_p top_k min_p seed logit_bias stop_token_ids presence_penalty
    frequency_penalty repetition_penalty""".split()


@dataclass(eq=False, slots=True)
class Turn:
    """A sequence up to the end of a response of the model."""

    parent: "Turn | None"
    kind: str  # of history: messages (as `openai_format.comparable`), text or tokens
    history: Any
    builder: SampleBuilder


class Session:
    """The requests of one rollout."""

    def __init__(self, prompt: Prompt, policy: Policy, url: str) -> None:
        self.url = url  # the base URL of an OpenAI client
        self.token = secrets.token_urlsafe(24)  # its API key
        self.policy = policy
        self._prompt = prompt
        self._chat = policy.chat
        if policy.tokenizer.chat_template and self._chat.template_kwargs is None:
            # Where prompts are left as they are, the template is for the agent's messages.
            self._chat = Chat(policy.tokenizer, {})
        self._turns: list[Turn] = []
        self._error: str | None = None

    async def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answers /chat/completions. Raises ValueError for what is not served."""
        asked = Asked.read(body, "messages")
        messages = openai_format.messages(body["messages"])
        history = [openai_format.comparable(message) for message in messages]
        variables = dict(body.get("chat_template_kwargs") or {})
        if asked.tools:
            variables["tools"] = asked.tools
        parent = self._parent("messages", history)
        if parent is None:
            new = self._chat.start(messages, **variables)
        else:
            later = messages[len(parent.history) :]
            new = self._chat.following(parent.builder.token_ids, later, **variables)
        return await self._respond(self._turn(parent, "messages", history, new), asked)

    async def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answers /completions, to a text or to token ids."""
        asked = Asked.read(body, "prompt")
        prompt: Any = openai_format.single_prompt(body["prompt"])
        kind = "text" if isinstance(prompt, str) else "tokens"
        parent = self._parent(kind, prompt)
        new = prompt[len(parent.history) :] if parent else prompt
        if kind == "text":
            new = self.policy.tokenizer.encode(new, add_special_tokens=parent is None)
        return await self._respond(self._turn(parent, kind, prompt, new), asked)

    def samples(self) -> list[Sample]:
        """The sequences that the agent has made, one for each turn that it did not go on from.

        Where they share turns, these are in the loss of the first one only.
        """
        inner = {turn.parent for turn in self._turns}
        in_a_loss: set[Turn | None] = {None}
        samples = []
        for leaf in self._turns:
            if leaf in inner:
                continue
            turn: Turn | None = leaf
            while turn is not None and turn not in in_a_loss:
                in_a_loss.add(turn)
                turn = turn.parent
            loss_from = len(turn.builder.token_ids) if turn else 0
            samples.append(leaf.builder.build(loss_from=loss_from))
        if not samples:
            return [SampleBuilder(self._prompt, self.policy).build(error=self._error)]
        return [sample for sample in samples if sample.num_response_tokens] or samples[:1]

    def _turn(self, parent: Turn | None, kind: str, history: Any, new: Sequence[int]) -> Turn:
        """The turn that goes on from `parent`, or begins, with the tokens `new`."""
        if parent is None:
            builder = SampleBuilder(self._prompt, self.policy, new)
        else:
            builder = parent.builder.fork()
            builder.observed(new)
        return Turn(parent, kind, history, builder)

    def _parent(self, kind: str, history: Any) -> Turn | None:
        """The longest turn that a request with this history goes on from."""
        earlier = [
            turn
            for turn in self._turns
            if turn.kind == kind
            and len(turn.history) < len(history)
            and turn.history == history[: len(turn.history)]
        ]
        return max(earlier, key=lambda turn: len(turn.history), default=None)

    async def _respond(self, turn: Turn, asked: Asked) -> dict[str, Any]:
        """Adds the model's response to `turn`, and keeps the turn."""
        prompt_ids = list(turn.builder.token_ids)
        generation = await self.policy.generate(
            prompt_ids, max_new_tokens=asked.max_new_tokens, stop=asked.stop
        )
        if generation.status in (Status.ERROR, Status.ABORTED):
            self._error = generation.error or f"the response was {generation.status}"
            raise ValueError(self._error)
        turn.builder.generated(generation)
        answer = openai_format.answer(asked, prompt_ids, generation, self.policy.tokenizer)
        [choice] = answer["choices"]
        if turn.kind == "messages":
            turn.history = [*turn.history, openai_format.comparable(choice["message"])]
        elif turn.kind == "text":
            turn.history += choice["text"]
        else:
            turn.history = list(turn.builder.token_ids)
        self._turns.append(turn)
        return answer


_Method = Callable[[Session, Mapping[str, Any]], Awaitable[dict[str, Any]]]


class OpenAIEndpoint:
    """The server, in the event loop that first opens a session.

    Requests carry the token of their session, which is a client's API key:
    `Authorization: Bearer TOKEN`.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        """`host` is the address of this machine that agents reach."""
        self._host = host
        self._sessions: dict[str, Session] = {}
        self._runner: web.AppRunner | None = None
        self._starting = asyncio.Lock()
        self._has_warned = False

    @asynccontextmanager
    async def session(self, prompt: Prompt, policy: Policy) -> AsyncIterator[Session]:
        """A session of its own for one rollout; its URL is answered inside only."""
        address = await self._address()
        name = secrets.token_urlsafe(12)
        session = Session(prompt, policy, f"{address}/sessions/{name}/v1")
        self._sessions[name] = session
        try:
            yield session
        finally:
            del self._sessions[name]

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _address(self) -> str:
        async with self._starting:
            if self._runner is None:
                app = web.Application(client_max_size=_MAX_REQUEST_BYTES)
                base = "/sessions/{name}/v1"
                app.router.add_post(f"{base}/chat/completions", partial(self._answer, Session.chat))
                app.router.add_post(f"{base}/completions", partial(self._answer, Session.complete))
                # The tokens of a client that has gone are for nobody.
                runner = web.AppRunner(
                    app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0
                )
                await runner.setup()
                await web.TCPSite(runner, self._host, 0).start()
                self._runner = runner
        port = self._runner.addresses[0][1]
        return f"http://{self._host}:{port}"

    async def _answer(self, method: _Method, request: web.Request) -> web.Response:
        session = self._sessions.get(request.match_info["name"])
        if session is None:
            return _refusal(404, "there is no such session; its rollout may have ended")
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if not hmac.compare_digest(given, f"Bearer {session.token}".encode()):
            return _refusal(401, "the API key is not that of the session")
        try:
            body = await request.json()
            self._warn_of_sampling(body, session)
            return web.json_response(await method(session, body))
        except _REFUSED as error:
            return _refusal(400, f"{type(error).__name__}: {error}")

    def _warn_of_sampling(self, body: Mapping[str, Any], session: Session) -> None:
        own = session.policy.sampling
        differ = [n for n in _SAMPLING if body.get(n) not in (None, getattr(own, n, 0))]
        if differ and not self._has_warned:
            self._has_warned = True
            logger.warning("an agent sets %s: the run's configuration decides", ", ".join(differ))


def _refusal(status: int, message: str) -> web.Response:
    error = {"message": message, "type": "invalid_request_error", "code": status}
    return web.json_response({"error": error}, status=status)
