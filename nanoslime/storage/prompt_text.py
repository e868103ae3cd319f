"""From a record to the text that the model sees."""

from collections.abc import Callable
from pathlib import Path

from nanoslime.config import DataConfig
from nanoslime.storage.prompt_files import Messages, PromptRecord
from nanoslime.storage.prompt_rows import Tally
from nanoslime.types import RunError

Render = Callable[[Messages], str]
"""A chat template: from messages to a text that ends where the answer begins."""


def check_template(has_template: bool, data: DataConfig) -> bool:
    """Whether the chat template is applied. Raises RunError where the configuration needs
    one and there is none."""
    if data.chat_template == "on" and not has_template:
        raise RunError(
            "data.chat_template=on, but the tokenizer has no chat template; use auto or off"
        )
    use_template = has_template and data.chat_template != "off"
    for field in ("system_prompt", "chat_template_kwargs"):
        if getattr(data, field) and not use_template:
            raise RunError(
                f"data.{field} needs a chat template: there is none, or data.chat_template=off"
            )
    return use_template


def prompt_text(record: PromptRecord, data: DataConfig, render: Render | None) -> str:
    """The prompt itself, or the chat template over it.

    Raises RunError for messages without a template, and in one line where it fails.
    """
    prompt = record.prompt
    if render is None:
        if isinstance(prompt, str):
            return prompt
        raise RunError(
            f"{record.place}: a prompt of chat messages needs a chat template; the "
            "tokenizer's is missing or off"
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if data.system_prompt:
        messages = [{"role": "system", "content": data.system_prompt}, *messages]
    try:
        return render(messages)
    except Exception as error:
        # A template is a program of the checkpoint's author.
        cause = " ".join(str(error).split())
        roles = ", ".join(message["role"] for message in messages)
        raise RunError(
            f"{record.place}: the chat template fails on messages of {roles}: {cause}; change the "
            "prompt, data.system_prompt or data.chat_template_kwargs, or set "
            "data.chat_template=off"
        ) from error


def check_length(place: str, num_tokens: int, tally: Tally) -> bool:
    """Whether a prompt of so many tokens is taken; else it is skipped and counted. Raises
    RunError for one that is too long where such are not skipped."""
    data = tally.data
    if num_tokens <= data.max_prompt_tokens:
        return True
    if data.over_long == "skip":
        tally.num_over_long += 1
        return False
    raise RunError(
        f"{place}: a prompt of {num_tokens} tokens is over "
        f"data.max_prompt_tokens={data.max_prompt_tokens}; raise it, or set data.over_long=skip"
    )


def none_left(path: Path, tally: Tally) -> RunError:
    limit = tally.data.max_prompt_tokens
    if tally.num_broken:
        return RunError(f"{path}: no prompt is left; {tally.text}")
    return RunError(f"{path}: every prompt is over data.max_prompt_tokens={limit}; raise it")
