"""The real `openai` client against the endpoint: what it makes is what is trained on."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from openai import AsyncOpenAI, AuthenticationError, BadRequestError, NotFoundError

from nanoslime.rollout.engines.embedded_model import EmbeddedEngine
from nanoslime.rollout.openai_endpoint import OpenAIEndpoint, Session
from nanoslime.rollout.openai_format import comparable
from nanoslime.rollout.policy import Policy, ServedModel
from nanoslime.rollout.tasks import GroupTask, Sampling
from nanoslime.types import Generation, Prompt, Sample, Status
from tests.rollout.calling_model import save_calling_model, tokenizer_of
from tests.rollout.interrupting import InterruptingRouter

PROMPT = Prompt(4, np.array([9], np.int32), "12=", "3", {"k": 1})
QUESTION = {"role": "user", "content": "12="}
AGAIN = {"role": "user", "content": "check:="}
Use = Callable[[AsyncOpenAI, Session], Awaitable[Any]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    path = save_calling_model(tmp_path_factory.mktemp("calling") / "model")
    engine = EmbeddedEngine(str(path), "float32", "cpu", seed=0)
    return ServedModel(InterruptingRouter(engine), tokenizer_of(path), 512)


def policy_of(served: ServedModel, limit: int = 60) -> Policy:
    sampling = Sampling(n_samples_per_prompt=4, max_new_tokens=limit, temperature=1.0)
    return Policy(GroupTask(7, PROMPT, sampling, 3, "none"), 2, served)


def used(served: ServedModel, use: Use, limit: int = 60) -> tuple[Any, list[Sample]]:
    """What `use` returned of a client and a session, and the session's samples."""

    async def run() -> tuple[Any, list[Sample]]:
        endpoint = OpenAIEndpoint()
        try:
            async with endpoint.session(PROMPT, policy_of(served, limit)) as session:
                url, token = session.url, session.token
                async with AsyncOpenAI(base_url=url, api_key=token, max_retries=0) as client:
                    return await use(client, session), session.samples()
        finally:
            await endpoint.close()

    return asyncio.run(run())


async def chat(client: AsyncOpenAI, messages: list[Any], **more: Any) -> Any:
    return await client.chat.completions.create(model="policy", messages=messages, **more)


def said(answer: Any) -> dict[str, Any]:
    """The message of an answer as clients keep it: with fields that are empty."""
    return answer.choices[0].message.model_dump()


def as_generated(*token_ids: list[int]) -> list[int]:
    return [token for ids in token_ids for token in ids]


def test_a_conversation_is_one_sample_of_exactly_its_tokens(served) -> None:
    async def use(client, session):
        first = await chat(client, [QUESTION], max_tokens=20, logprobs=True)
        second = await chat(client, [QUESTION, said(first), AGAIN], max_completion_tokens=20)
        return first, second

    (first, second), [sample] = used(served, use)
    encode = served.tokenizer.encode
    ids = [answer.choices[0].token_ids for answer in (first, second)]
    question, again = encode("12="), encode("check:=")
    assert sample.token_ids.tolist() == [*question, *ids[0], *again, *ids[1]]
    assert second.prompt_token_ids == [*question, *ids[0], *again]
    masks = [[False] * len(question), [True] * len(ids[0]), [False] * len(again)]
    assert sample.loss_mask.tolist() == [*as_generated(*masks), *[True] * len(ids[1])]
    start = len(question)
    told = [row.logprob for row in first.choices[0].logprobs.content]
    assert np.array_equal(sample.rollout_logprobs[start : start + len(told)], np.float32(told))
    assert sample.policy_versions == [(3, 0), (3 + len(ids[0]) + len(again), 0)]
    assert (sample.group_id, sample.rollout_id) == (7, 30)
    assert (sample.label, sample.metadata) == ("3", {"k": 1, "prompt_id": 4})
    contents = [answer.choices[0].message.content for answer in (first, second)]
    assert sample.text == "\n".join(contents)
    usage = second.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        len(second.prompt_token_ids),
        len(ids[1]),
    )


def test_white_space_that_a_client_drops_changes_no_token(served) -> None:
    async def use(client, session):
        first = await chat(client, [QUESTION])
        parts = [{"type": "text", "text": f" {first.choices[0].message.content}\n"}]
        await chat(client, [QUESTION, {"role": "assistant", "content": parts}, AGAIN])

    _, samples = used(served, use)
    assert len(samples) == 1


def test_an_agent_that_goes_back_gives_two_samples_and_trains_shared_turns_once(served) -> None:
    async def use(client, session):
        first = await chat(client, [QUESTION], max_tokens=9)
        told = [QUESTION, said(first)]
        one = await chat(client, [*told, AGAIN], max_tokens=9)
        other = await chat(client, [*told, {"role": "user", "content": "9="}], max_tokens=9)
        fresh = await chat(client, [{"role": "user", "content": "7="}], max_tokens=9)
        return [answer.choices[0].token_ids for answer in (first, one, other, fresh)]

    (first, one, other, fresh), samples = used(served, use)
    [a, b, c] = samples
    assert a.token_ids[a.loss_mask].tolist() == [*first, *one]
    assert b.token_ids[b.loss_mask].tolist() == other
    assert c.token_ids[c.loss_mask].tolist() == fresh
    start = 3 + len(first)
    assert b.token_ids[:start].tolist() == a.token_ids[:start].tolist()
    assert not b.rollout_logprobs[:start].any()
    assert b.policy_versions == [(start + 2, 0)]
    assert {sample.rollout_id for sample in samples} == {30}


def test_a_long_conversation_goes_on_from_its_last_turn(served) -> None:
    async def use(client, session):
        messages = [QUESTION]
        generated = []
        for _ in range(3):
            answer = await chat(client, messages, max_tokens=9)
            messages += [said(answer), AGAIN]
            generated += answer.choices[0].token_ids
        return generated

    generated, [sample] = used(served, use)
    assert sample.token_ids[sample.loss_mask].tolist() == generated


def test_a_branch_without_a_token_of_its_own_is_no_sample(served) -> None:
    async def use(client, session):
        first = await chat(client, [QUESTION], max_tokens=2)
        await chat(client, [QUESTION, said(first), AGAIN])
        await chat(client, [QUESTION, said(first), {"role": "user", "content": "9="}])

    _, samples = used(served, use, limit=2)
    assert [sample.num_response_tokens for sample in samples] == [2]


def test_a_response_that_was_asked_for_twice_is_two_samples(served) -> None:
    async def use(client, session):
        return [await chat(client, [QUESTION], max_tokens=9) for _ in range(2)]

    answers, samples = used(served, use)
    generated = [sample.token_ids[sample.loss_mask].tolist() for sample in samples]
    assert generated == [answer.choices[0].token_ids for answer in answers]


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_completions_go_on_from_text_and_from_tokens(served, kind) -> None:
    encode = served.tokenizer.encode

    async def use(client, session):
        prompt = "12=" if kind == "text" else encode("12=")
        first = await client.completions.create(model="m", prompt=prompt, max_tokens=20, logprobs=0)
        [choice] = first.choices
        assert len(choice.logprobs.token_logprobs) == len(choice.token_ids)
        if kind == "text":
            longer = prompt + choice.text + "check:="
        else:
            longer = [*prompt, *choice.token_ids, *encode("check:=")]
        second = await client.completions.create(model="m", prompt=longer, max_tokens=20)
        return choice.token_ids, second.choices[0].token_ids

    (first, second), [sample] = used(served, use)
    assert sample.token_ids.tolist() == [*encode("12="), *first, *encode("check:="), *second]
    assert sample.num_response_tokens == len(first) + len(second)


def test_stop_texts_stay_in_the_sample_and_not_in_the_answer(served) -> None:
    decode = served.tokenizer.decode

    async def use(client, session):
        while True:  # until the model has made a call
            answer = await chat(client, [QUESTION], stop="</calc>", max_tokens=9)
            if decode(answer.choices[0].token_ids).endswith("</calc>"):
                return answer.choices[0]

    choice, samples = used(served, use, limit=1000)
    assert choice.finish_reason == "stop"
    assert choice.message.content + "</calc>" == decode(choice.token_ids)
    last = samples[-1]
    assert last.token_ids[last.loss_mask].tolist() == choice.token_ids


def test_a_spent_limit_is_told_as_length(served) -> None:
    async def use(client, session):
        first = await chat(client, [QUESTION], max_tokens=2)
        second = await chat(client, [QUESTION, said(first), AGAIN])
        third = await chat(client, [QUESTION, said(first), AGAIN, said(second), AGAIN])
        return second, third

    (second, third), samples = used(served, use, limit=2)
    assert [a.choices[0].finish_reason for a in (second, third)] == ["length", "length"]
    assert third.usage.completion_tokens == 0
    [sample] = samples
    assert (sample.num_response_tokens, sample.status) == (2, Status.TRUNCATED)


def test_what_is_not_served_is_refused_in_one_sentence(served) -> None:
    requests = [
        ({"stream": True}, "stream=true is not served"),
        ({"n": 2}, "n=2 is not served"),
        ({"logprobs": True, "top_logprobs": 5}, "top_logprobs=5 is not served"),
        ({"response_format": {"type": "json_object"}}, "response_format=.* is not served"),
        ({"tool_choice": "required"}, "tool_choice=.* is not served; leave it out"),
        ({"max_tokens": 0}, "max_tokens=0 is no number of tokens; ask for 1 or more"),
        ({"max_completion_tokens": -1}, "max_tokens=-1 is no number"),
        ({"extra_body": {"max_tokens": 1.5}}, "max_tokens=1.5 is no number"),
        ({"stop": ["a", ""]}, "stop=.* has to hold texts that are not empty"),
        ({"extra_body": {"stop": [5]}}, r"stop=\[5\] has to hold texts"),
        ({"messages": []}, "a prompt without a token cannot be continued"),
        ({"messages": [{"role": "user", "content": ""}]}, "a prompt without a token"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text"),
        ({"messages": [{"content": "x"}]}, "role"),
        ({"messages": 3}, "TypeError"),
    ]

    async def use(client, session):
        for change, message in requests:
            with pytest.raises(BadRequestError, match=message):
                await chat(client, **{"messages": [QUESTION], **change})
        for prompt in ([], "", [[1], [2]], ["a", "b"], [[]]):
            with pytest.raises(BadRequestError, match="one text, or the token ids"):
                await client.completions.create(model="m", prompt=prompt)
        for change, message in (
            ({"prompt": [9999]}, "token id 9999"),
            ({"echo": True}, "echo=true is not served"),
            ({"best_of": 2}, "best_of=2 is not served"),
        ):
            with pytest.raises(BadRequestError, match=message):
                await client.completions.create(**{"model": "m", "prompt": "12=", **change})
        with pytest.raises(AuthenticationError):
            await chat(client.with_options(api_key="other"), [QUESTION])
        other = session.url.replace("/sessions/", "/sessions/other")
        with pytest.raises(NotFoundError, match="no such session"):
            await chat(client.with_options(base_url=other), [QUESTION])
        async with aiohttp.ClientSession() as http:
            for data in ("{", "[]", "null", "[" * 100_000, '{"messages": [], "n": 1e999}'):
                headers = {"Authorization": f"Bearer {session.token}"}
                url = f"{session.url}/chat/completions"
                async with http.post(url, data=data, headers=headers) as response:
                    assert response.status == 400

    _, [sample] = used(served, use)
    assert (sample.status, sample.error) == (Status.ERROR, "the environment generated nothing")


def test_a_session_is_open_to_its_own_key_only(served) -> None:
    async def use(client, session):
        url = f"{session.url}/chat/completions"
        endpoint = OpenAIEndpoint()
        async with aiohttp.ClientSession() as http, endpoint.session(PROMPT, session.policy) as two:
            for key in (None, "", "Bearer", session.token, f"Bearer {two.token}", "Bearer \udcff"):
                headers = {} if key is None else {"Authorization": key}
                async with http.post(url, json={"messages": [QUESTION]}, headers=headers) as answer:
                    assert answer.status == 401, key
            async with http.post(two.url.replace("/v1", "/v1/v1")) as answer:
                assert answer.status == 404
        await endpoint.close()

    _, [sample] = used(served, use)
    assert sample.error == "the environment generated nothing"


def test_requests_that_wait_for_tokens_do_not_hold_up_the_end(served) -> None:
    """They are of threads, for example, that nobody can end."""
    over = asyncio.Event()

    class Waiting:
        async def generate(self, request, key: str = "") -> list[Generation]:
            await over.wait()
            return []

    async def run() -> None:
        endpoint = OpenAIEndpoint()
        policy = policy_of(ServedModel(Waiting(), served.tokenizer, 512))
        async with aiohttp.ClientSession() as http:
            async with endpoint.session(PROMPT, policy) as session:
                headers = {"Authorization": f"Bearer {session.token}"}
                body = {"messages": [QUESTION]}
                url = f"{session.url}/chat/completions"
                waiting = asyncio.create_task(http.post(url, json=body, headers=headers))
                await asyncio.sleep(0.1)
            async with asyncio.timeout(10):
                await endpoint.close()
                with pytest.raises(aiohttp.ClientError):
                    await waiting

    asyncio.run(run())


def test_a_request_that_no_engine_answers_gives_its_cause(served) -> None:
    async def use(client, session):
        with pytest.raises(BadRequestError, match="fills the model's context"):
            await client.completions.create(model="m", prompt=[5] * 512)

    _, [sample] = used(served, use)
    assert sample.status is Status.ERROR
    assert "fills the model's context" in sample.error


def test_the_run_decides_on_sampling_and_says_so_once(served, caplog) -> None:
    async def use(client, session):
        for _ in range(2):
            await chat(client, [QUESTION], temperature=0.1, top_p=1.0, max_tokens=2)

    used(served, use)
    assert served.router.requests[-1].temperature == 1.0
    [warning] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warning == "an agent sets temperature: the run's configuration decides"


class Scripted:
    """A model that writes what it is told to; the rest of the way is real."""

    def __init__(self, tokenizer, *texts: str) -> None:
        self.answers = [tokenizer.encode(text) for text in texts]
        self.prompts: list[str] = []
        self.tokenizer = tokenizer

    async def generate(self, request, key: str = "") -> list[Generation]:
        self.prompts.append(self.tokenizer.decode(request.token_ids))
        ids = self.answers.pop(0)
        return [Generation(ids, [-1.0] * len(ids), Status.COMPLETED, [(0, 0)])]


def test_tools_are_told_to_the_template_and_calls_are_read_from_the_text(served) -> None:
    tokenizer = tokenizer_of(Path(served.tokenizer.name_or_path))
    tokenizer.chat_template = (
        "{% if tools %}[{{ tools[0].function.name }}]{% endif %}{% for m in messages %}"
        "<{{ m.role }}>{{ m.content }}<eos>{% endfor %}<assistant>"
    )
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    router = Scripted(tokenizer, f"Let me see. {call}<tool_call>{{no}}</tool_call><eos>", "2<eos>")
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]

    async def use(client, session):
        first = await chat(client, [QUESTION], tools=tools)
        [tool_call] = first.choices[0].message.tool_calls
        result = {"role": "tool", "tool_call_id": tool_call.id, "content": "2"}
        second = await chat(client, [QUESTION, said(first), result], tools=tools)
        return first.choices[0], second.choices[0]

    (first, second), [sample] = used(ServedModel(router, tokenizer, 512, None), use, limit=300)
    assert first.finish_reason == "tool_calls"
    assert first.message.content == "Let me see. "
    function = first.message.tool_calls[0].function
    assert (function.name, function.arguments) == ("add", '{"a": 1}')
    assert second.message.content == "2" and second.finish_reason == "stop"
    assert router.prompts[0] == "[add]<user>12=<eos><assistant>"
    assert router.prompts[1].endswith("</tool_call><eos><tool>2<eos><assistant>")
    assert sample.num_response_tokens == len(first.token_ids) + len(second.token_ids)


def test_messages_are_compared_by_what_they_say() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    spaced = {"id": "2", "function": {"name": "f", "arguments": '{"a": 1}'}}
    one = comparable({"role": "assistant", "content": None, "tool_calls": [call]})
    assert one == comparable({"role": "assistant", "content": " ", "tool_calls": [spaced]})
    assert one != comparable({"role": "assistant", "content": "", "tool_calls": None})
    assert one != comparable({"role": "user", "content": "", "tool_calls": [call]})
