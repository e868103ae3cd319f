"""Checks a whole prompt file on the login node, where there is neither torch nor transformers."""

from collections.abc import Iterable, Iterator
from itertools import batched
from pathlib import Path
from typing import Any

from nanoslime.config import DataConfig
from nanoslime.plugins import resolve
from nanoslime.storage.prompt_files import PromptRecord, read_prompts
from nanoslime.storage.prompt_rows import Tally
from nanoslime.storage.prompt_text import (
    Render,
    check_length,
    check_template,
    none_left,
    prompt_text,
)
from nanoslime.types import RunError
from tools.submit.tokenizer_files import TokenizerFiles

_LAZY = {
    "template": "tools.submit.chat_template:compile_template",
    "tokenizer": "tokenizers:Tokenizer",
}
# The login node counts the tokens of so many texts at most; the job counts those of all.
_MAX_COUNTED = 20_000
_BATCH = 1024


def check_prompts(path: Path, data: DataConfig, tokenizer: Path | None) -> Tally:
    """What the job will use of a source of prompts. Raises RunError for what it would refuse.

    tokenizer: a directory with its files; None where they are not here yet. The template is
    tried on one prompt of each order of roles. Tokens are counted, without special ones, of
    prompts that have more bytes than max_prompt_tokens, up to a number of them.
    """
    tally = Tally(data)
    render = _renderer(tokenizer, data) if tokenizer else None
    # What is wrong with messages of these roles.
    faults: dict[Any, RunError | None] = {}
    # Places and labels of each text that may be too long.
    long: dict[str, list[tuple[str, Any]]] = {}
    for record in read_prompts(path, data, tally):
        if tokenizer is not None:
            roles = _roles(record)
            if roles not in faults:
                faults[roles] = _fault(record, data, render)
            fault = faults[roles]
            if fault is not None:
                tally.broken(fault)
                continue
            if _num_bytes(record) > data.max_prompt_tokens and len(long) < _MAX_COUNTED:
                text = prompt_text(record, data, render)
                long.setdefault(text, []).append((record.place, record.label))
                continue
        # The whole text of each would take too much memory.
        tally.take(hash((repr(record.prompt), record.label)))
    for text, num_tokens in _count_tokens(long, tokenizer):
        for place, label in long[text]:
            if check_length(place, num_tokens, tally):
                tally.take(hash((text, label)))
    if not tally.num_used:
        raise none_left(path, tally)
    return tally


def _fault(record: PromptRecord, data: DataConfig, render: Render | None) -> RunError | None:
    try:
        prompt_text(record, data, render)
    except RunError as error:
        return error
    return None


def _count_tokens(texts: Iterable[str], directory: Path | None) -> Iterator[tuple[str, int]]:
    """Texts with their numbers of tokens; 0 where there is no tokenizer.json."""
    file = directory / "tokenizer.json" if directory else Path()
    if not texts or not file.is_file():
        yield from ((text, 0) for text in texts)
        return
    tokenizer_class = resolve("tokenizer", _LAZY, "model.hf_checkpoint")
    try:
        tokenizer = tokenizer_class.from_file(str(file))
    except Exception as error:
        # The library raises nothing more precise.
        raise RunError(f"{file} cannot be read as a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for batch in batched(texts, _BATCH):
        encodings = tokenizer.encode_batch(list(batch), add_special_tokens=False)
        for text, encoding in zip(batch, encodings, strict=True):
            yield text, len(encoding.ids)


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
