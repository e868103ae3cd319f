"""What an environment samples with: the policy, for one rollout of one prompt.

An environment asks for continuations of token ids. That engines come and go, that new weights
arrive while a sequence is being sampled, and that a run is saved and resumed in the middle of
it, does not show: a request that was interrupted is asked again with the tokens it has.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from nanoslime.config import RunConfig
from nanoslime.engine_kind import engine_kind
from nanoslime.models.context import context_limit
from nanoslime.models.shape import ModelShape
from nanoslime.rollout.chat import Chat
from nanoslime.rollout.router import Router
from nanoslime.rollout.tasks import GroupTask, Sampling, seed_of
from nanoslime.storage.prompt_text import check_template
from nanoslime.types import GenerateRequest, Generation, RunError, Status

# SGLang refuses a prompt that leaves fewer tokens of the context than this.
_LEAST_ROOM = 8
# A request that is interrupted so often in a row, without a token in between, is given up.
_MAX_IN_VAIN = 100
_PAUSE_S = 0.02


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What all policies of a rollout worker share."""

    router: Router
    tokenizer: PreTrainedTokenizerBase
    # The most tokens that a sequence can have.
    context_length: int
    # Variables of the chat template; None where none is applied.
    chat_template_kwargs: Mapping[str, Any] | None = None
    # Whether the engines do; requests to others have no seed.
    honours_seeds: bool = True

    @classmethod
    def of(
        cls,
        config: RunConfig,
        router: Router,
        tokenizer: PreTrainedTokenizerBase,
        shape: ModelShape,
    ) -> "ServedModel":
        """Raises RunError where the configuration needs a chat template and there is none."""
        data = config.data
        use_template = check_template(bool(tokenizer.chat_template), data)
        kwargs = data.chat_template_kwargs if use_template else None
        honours_seeds = engine_kind(config.rollout).honours_seeds
        return cls(router, tokenizer, context_limit(config, shape), kwargs, honours_seeds)

    @property
    def chat(self) -> Chat:
        return Chat(self.tokenizer, self.chat_template_kwargs)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The token that ends a response by the tokenizer; engines know those of the model."""
        end = self.tokenizer.eos_token_id
        return () if end is None else (end,)


@dataclass(slots=True)
class Call:
    """One request of a rollout, and what it has got so far.

    While the status of the generation is ABORTED, the request goes on from its tokens.
    """

    token_ids: list[int]  # [P]
    generation: Generation = Generation([], [], Status.ABORTED, [])


class Policy:
    """The policy as one rollout sees it: the sample `index` of the group of `task`.

    All generations of a rollout share `sampling.max_new_tokens`, so its requests go one
    after another, also where an environment makes several at once.
    """

    def __init__(
        self, task: GroupTask, index: int, model: ServedModel, transcript: Sequence[Call] = ()
    ) -> None:
        """`transcript` is that of the same rollout before it was interrupted.

        The environment runs anew, and a request with the same tokens is answered from the
        transcript; what was not yet finished there goes on.
        """
        self.sampling: Sampling = task.sampling
        self.group_id = task.group_id
        self.rollout_id = task.group_id * task.sampling.n_samples_per_prompt + index
        self.model = model
        self._key = f"{task.purpose}-{task.group_id}"
        self._seed = (task.seed, index)
        self._calls: list[Call] = []
        self._not_yet_replayed = [replace(call) for call in transcript]
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._limit: asyncio.Timeout | None = None
        self._time_left_s = 0.0

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.model.tokenizer

    @property
    def transcript(self) -> list[Call]:
        """All requests so far, with the tokens that have come back."""
        return [replace(call) for call in (*self._calls, *self._not_yet_replayed)]

    @property
    def num_tokens_left(self) -> int:
        """How many tokens the rollout may still generate."""
        spent = sum(len(call.generation.token_ids) for call in self._calls)
        return max(0, self.sampling.max_new_tokens - spent)

    @property
    def chat(self) -> Chat:
        return self.model.chat

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without special tokens around them."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    @asynccontextmanager
    async def time_limit(self, seconds: float) -> AsyncIterator[None]:
        """Ends what runs in it after so many seconds, but those in which it waits in `generate`.

        Raises RunError then.
        """
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                self._limit = limit
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise RunError(
                f"it took longer than rollout.environment_timeout_s={seconds:g}, beside the time "
                "for its tokens"
            ) from error
        finally:
            self._limit = None

    @contextmanager
    def _time_stands_still(self) -> Iterator[None]:
        """What runs in it does not count into `time_limit`; several may run at once."""
        loop = asyncio.get_running_loop()
        limit = self._limit
        if limit is None or limit.expired():
            yield
            return
        deadline = limit.when()
        if deadline is not None:
            self._time_left_s = deadline - loop.time()
            limit.reschedule(None)
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1
            if self._num_waiting == 0 and self._limit is limit:
                limit.reschedule(loop.time() + self._time_left_s)

    async def generate(
        self,
        token_ids: Sequence[int],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] | None = None,
    ) -> Generation:
        """A continuation of `token_ids` [P], with the version of the weights by token.

        `max_new_tokens` is at most that of the whole rollout, less what it has generated.
        `stop` are texts that end the continuation, beside those of the configuration; they
        stay in it. The status is TRUNCATED, also without a token, where a limit or the
        model's context ends it, and ERROR with a cause where no engine could make it.
        """
        with self._time_stands_still():
            async with self._turn:
                return await self._generate(token_ids, max_new_tokens, stop)

    async def _generate(
        self, token_ids: Sequence[int], max_new_tokens: int | None, stop: Sequence[str] | None
    ) -> Generation:
        left = self.num_tokens_left
        limit = left if max_new_tokens is None else min(left, max_new_tokens)
        stop = (*self.sampling.stop, *(stop or ()))
        number = len(self._calls)
        call = self._call(token_ids)
        num_in_vain = 0
        while call.generation.status is Status.ABORTED and num_in_vain < _MAX_IN_VAIN:
            num_before = len(call.generation.token_ids)
            request = self._request(call, number, limit - num_before, stop)
            if request is None:
                call.generation = replace(call.generation, status=Status.TRUNCATED, error=None)
                break
            [more] = await self.model.router.generate(request, key=self._key)
            call.generation = self._joined(call, more, stop)
            if len(call.generation.token_ids) > num_before:
                num_in_vain = 0
            elif call.generation.status is Status.ABORTED:
                num_in_vain += 1
                await asyncio.sleep(_PAUSE_S * num_in_vain)
        return call.generation

    def _call(self, token_ids: Sequence[int]) -> Call:
        """The call for these tokens: that of the transcript, or a new one."""
        call = Call([int(token) for token in token_ids])
        for earlier in self._not_yet_replayed:
            if earlier.token_ids == call.token_ids:
                self._not_yet_replayed.remove(earlier)
                call = earlier
                break
        self._calls.append(call)
        return call

    def _request(
        self, call: Call, number: int, max_new_tokens: int, stop: tuple[str, ...]
    ) -> GenerateRequest | None:
        """The request that goes on with `call`, the rollout's `number`-th; None where nothing
        may be added.

        Whether the prompt of the data fits is for the engine to say: that is a fault, and no
        truncation.
        """
        token_ids = [*call.token_ids, *call.generation.token_ids]
        room = self.model.context_length - len(token_ids)
        is_first = number == 0 and not call.generation.token_ids
        if max_new_tokens <= 0 or (room < _LEAST_ROOM and not is_first):
            return None
        sampling = self.sampling
        seed = None
        if self.model.honours_seeds:
            seed = _seed_of(*self._seed, number, len(call.generation.token_ids))
        return GenerateRequest(
            token_ids=token_ids,
            n=1,
            max_new_tokens=max(1, min(max_new_tokens, room)),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_token_ids=(*sampling.stop_token_ids, *self.model.end_token_ids),
            stop=stop,
            seed=seed,
        )

    def _joined(self, call: Call, more: Generation, stop: tuple[str, ...]) -> Generation:
        """The generation of `call` with what came back for it."""
        first = call.generation
        if first.token_ids and stop:
            more = self._cut_at_stop(call, more, stop)
        num_first = len(first.token_ids)
        token_ids = [*first.token_ids, *more.token_ids]
        spans = [(num_first + start, version) for start, version in more.versions]
        return Generation(
            token_ids=token_ids,
            logprobs=[*first.logprobs, *more.logprobs],
            status=more.status,
            versions=_without_empty([*first.versions, *spans], len(token_ids)),
            error=more.error,
            routed_experts=more.routed_experts if more.token_ids else first.routed_experts,
        )

    def _cut_at_stop(self, call: Call, more: Generation, stop: tuple[str, ...]) -> Generation:
        """`more`, ended where a stop text is complete that began before the interruption.

        An engine looks for these texts in what it has sampled for one request only.
        """
        num_tokens = max(len(self.encode(text)) for text in stop) + 1
        before = call.generation.token_ids[-num_tokens:]
        for end in range(1, min(num_tokens, len(more.token_ids)) + 1):
            tail = self.tokenizer.decode([*before, *more.token_ids[:end]])
            if not any(text in tail for text in stop):
                continue
            num_rows = len(call.token_ids) + len(call.generation.token_ids) + end - 1
            experts = more.routed_experts
            return replace(
                more,
                token_ids=more.token_ids[:end],
                logprobs=more.logprobs[:end],
                status=Status.COMPLETED,
                routed_experts=None if experts is None else experts[:num_rows],
            )
        return more


def _without_empty(spans: Sequence[tuple[int, int]], num_tokens: int) -> list[tuple[int, int]]:
    """The (first token, version) spans that have a token; neighbours of one version are one."""
    kept: list[tuple[int, int]] = []
    for start, version in spans:
        if start >= num_tokens:
            break
        if kept and kept[-1][0] == start:
            kept.pop()
        if not kept or kept[-1][1] != version:
            kept.append((start, version))
    return kept


def _seed_of(*numbers: int) -> int:
    """A seed of 63 bits of its own for these numbers, each of 64 bits at most."""
    words = [word for number in numbers for word in (number % 2**32, number >> 32)]
    return seed_of(*words)
