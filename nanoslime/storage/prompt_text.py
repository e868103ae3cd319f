"""From a record to the text that the model sees, and the check of a whole prompt file on
the login node, where there is neither torch nor transformers."""

from collections.abc import Callable, Iterator
from itertools import batched
from pathlib import Path
from typing import Any

from nanoslime.config import DataConfig
from nanoslime.plugins import resolve
from nanoslime.storage.prompt_files import Messages, PromptRecord, read_prompt_file
from nanoslime.storage.tokenizer_files import TokenizerFiles
from nanoslime.types import RunError

Render = Callable[[Messages], str]
"""A chat template: from messages to a text that ends where the answer begins."""

_LAZY = {
    "template": "nanoslime.storage.chat_template:compile_template",
    "tokenizer": "tokenizers:Tokenizer",
}
# The login node counts the tokens of so many texts at most; the job counts those of all.
_MAX_COUNTED = 20_000
_BATCH = 1024


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


def check_length(place: str, num_tokens: int, data: DataConfig) -> bool:
    """Whether a prompt of so many tokens is taken; else it is skipped. Raises RunError for
    one that is too long where such are not skipped."""
    if num_tokens <= data.max_prompt_tokens:
        return True
    if data.over_long == "skip":
        return False
    raise RunError(
        f"{place}: a prompt of {num_tokens} tokens is over "
        f"data.max_prompt_tokens={data.max_prompt_tokens}; raise it, or set data.over_long=skip"
    )


def none_short_enough(path: Path, data: DataConfig) -> RunError:
    return RunError(
        f"{path}: every prompt is over data.max_prompt_tokens={data.max_prompt_tokens}; raise it"
    )


def check_prompt_file(path: Path, data: DataConfig, tokenizer: Path | None) -> None:
    """Raises RunError for what the job would refuse of the file.

    tokenizer: a directory with its files; None where they are not here yet. The template is
    tried on one prompt of each order of roles. Tokens are counted, without special ones, of
    prompts that have more bytes than max_prompt_tokens.
    """
    records = read_prompt_file(path, data)
    if tokenizer is None:
        for _ in records:
            pass
        return
    render = _renderer(tokenizer, data)
    is_any_short = False
    seen: set[Any] = set()
    # The place of each text that may be too long.
    long: dict[str, str] = {}
    for record in records:
        roles = _roles(record)
        if roles not in seen:
            seen.add(roles)
            prompt_text(record, data, render)
        if _num_bytes(record) <= data.max_prompt_tokens:
            is_any_short = True
        elif len(long) < _MAX_COUNTED:
            long.setdefault(prompt_text(record, data, render), record.place)
        else:
            # The job finds out.
            is_any_short = True
    if is_any_short and data.over_long == "skip":
        return
    for place, num_tokens in _count_tokens(long, tokenizer / "tokenizer.json"):
        is_any_short |= check_length(place, num_tokens, data)
    if not is_any_short:
        raise none_short_enough(path, data)


def _count_tokens(places: dict[str, str], file: Path) -> Iterator[tuple[str, int]]:
    """The places of texts, with their numbers of tokens; 0 where there is no such file."""
    if not places or not file.is_file():
        yield from ((place, 0) for place in places.values())
        return
    tokenizer_class = resolve("tokenizer", _LAZY, "model.hf_checkpoint")
    try:
        tokenizer = tokenizer_class.from_file(str(file))
    except Exception as error:
        # The library raises nothing more precise.
        raise RunError(f"{file} cannot be read as a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for texts in batched(places, _BATCH):
        for text, encoding in zip(
            texts, tokenizer.encode_batch(list(texts), add_special_tokens=False), strict=True
        ):
            yield places[text], len(encoding.ids)


def _renderer(directory: Path, data: DataConfig) -> Render | None:
    """The chat template of the tokenizer in `directory`, or None where none is applied."""
    files = TokenizerFiles.read(directory)
    has_tools = bool(data.chat_template_kwargs.get("tools"))
    source = files.chat_template(has_tools=has_tools)
    if not check_template(source is not None, data):
        return None
    compile_template = resolve("template", _LAZY, "model.hf_checkpoint")
    try:
        render: Render = compile_template(source, files.special_tokens | data.chat_template_kwargs)
    except Exception as error:
        raise RunError(f"{directory}: the chat template is not jinja2: {error}") from error
    return render


def _roles(record: PromptRecord) -> Any:
    """What a template may object to: the roles, and which fields each message has."""
    if isinstance(record.prompt, str):
        return None
    return tuple((message["role"], *sorted(message)) for message in record.prompt)


def _num_bytes(record: PromptRecord) -> int:
    if isinstance(record.prompt, str):
        return len(record.prompt.encode())
    return sum(len(message["content"].encode()) for message in record.prompt)
