"""Requests and answers as OpenAI's API writes them; nothing here knows of engines."""

import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from nanoslime.types import Generation, Status

# As Hermes and Qwen write the call of a tool.
_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)

# What is not served, by its name: the values that do not ask for it, and the way out.
_NOT_SERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "stream": ((None, False), "send requests without it"),
    "n": ((None, 1), "send one request for each sample"),
    "best_of": ((None, 1), "leave it out"),
    "echo": ((None, False), "leave it out"),
    "suffix": ((None, ""), "leave it out"),
    "top_logprobs": ((None, 0), "leave it out; logprobs are those of the sampled tokens"),
    "response_format": ((None, {"type": "text"}), "ask for the format in a message"),
    "tool_choice": ((None, "auto"), "leave it out, and the tools where none may be called"),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for, beside its prompt."""

    is_chat: bool
    model: str
    max_new_tokens: int | None
    stop: tuple[str, ...]
    tools: list[Any]
    has_logprobs: bool

    @classmethod
    def read(cls, body: Mapping[str, Any], prompt: str) -> "Asked":
        """`prompt` names the field that the request must have. Raises ValueError for what is
        not served."""
        if prompt not in body:
            raise ValueError(f"the request has no {prompt!r}")
        for name, (served, way_out) in _NOT_SERVED.items():
            if body.get(name) not in served:
                raise ValueError(f"{name}={json.dumps(body[name])} is not served; {way_out}")
        limit = body.get("max_completion_tokens")
        if limit is None:
            limit = body.get("max_tokens")
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError(f"max_tokens={limit!r} is no number of tokens; ask for 1 or more")
        stop = body.get("stop") or ()
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop={list(stop)!r} has to hold texts that are not empty")
        return cls(
            is_chat=prompt == "messages",
            model=str(body.get("model", "policy")),
            max_new_tokens=limit,
            stop=stop,
            tools=list(body.get("tools") or ()),
            # The number 0 asks for those of the sampled tokens, too.
            has_logprobs=body.get("logprobs") is not None and body["logprobs"] is not False,
        )


def messages(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a request, each content one text. Raises ValueError for images and such."""
    return [{**message, "content": _text(message.get("content"))} for message in given]


def comparable(message: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two writings of the same message share: clients drop white space and empty fields."""
    calls = [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message.get("tool_calls") or ()
    ]
    return message["role"], _text(message.get("content")).strip(), calls


def single_prompt(prompt: Any) -> str | list[int]:
    """The prompt of /completions: a text or token ids, also as the only one of a list."""
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        [prompt] = prompt
    is_tokens = isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)
    if not prompt or not (is_tokens or isinstance(prompt, str)):
        raise ValueError("prompt has to be one text, or the token ids of one prompt")
    return prompt


def answer(
    asked: Asked, prompt_ids: list[int], generation: Generation, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The answer to a request. Beside OpenAI's fields it has the token ids, as vLLM's."""
    token_ids = generation.token_ids
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    for stop in asked.stop:
        text = text.partition(stop)[0]
    is_truncated = generation.status is Status.TRUNCATED
    choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if is_truncated else "stop"}
    if asked.is_chat:
        choice["message"] = {"role": "assistant", "content": text}
        calls = _tool_calls(text) if asked.tools else []
        if calls:
            choice["message"] |= {"content": text.partition("<tool_call>")[0], "tool_calls": calls}
            choice["finish_reason"] = "tool_calls"
    else:
        choice["text"] = text
    choice["token_ids"] = token_ids
    choice["logprobs"] = None
    if asked.has_logprobs:
        tokens = [tokenizer.decode([token]) for token in token_ids]
        choice["logprobs"] = _logprobs(asked, tokens, generation.logprobs)
    return {
        "id": secrets.token_hex(8),
        "object": "chat.completion" if asked.is_chat else "text_completion",
        "created": int(time.time()),
        "model": asked.model,
        "prompt_token_ids": prompt_ids,
        "choices": [choice],
        "usage": {
            "prompt_tokens": len(prompt_ids),
            "completion_tokens": len(token_ids),
            "total_tokens": len(prompt_ids) + len(token_ids),
        },
    }


def _logprobs(asked: Asked, tokens: list[str], logprobs: list[float]) -> dict[str, Any]:
    if not asked.is_chat:
        return {"tokens": tokens, "token_logprobs": logprobs}
    rows = zip(tokens, logprobs, strict=True)
    return {"content": [{"token": t, "logprob": p, "top_logprobs": []} for t, p in rows]}


def _text(content: Any) -> str:
    """The text of a message's content, which may be a list of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if any(part.get("type") != "text" for part in content):
        raise ValueError("only text can be a part of a message")
    return "".join(part["text"] for part in content)


def _tool_calls(text: str) -> list[dict[str, Any]]:
    """The calls in a response; what is no JSON is no call, and stays in the text."""
    calls = []
    for match in _TOOL_CALL.finditer(text):
        try:
            call = json.loads(match[1])
            function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
        except (ValueError, LookupError, TypeError):
            continue
        name = f"call_{secrets.token_hex(4)}"
        calls.append({"id": name, "type": "function", "function": function})
    return calls
