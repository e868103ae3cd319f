"""Reads prompts: files of JSON lines, parquet or Arrow; refuses bad ones with file and line.

The login node reads a file through this module before submission, and the job before any
engine starts, so both say the same of it.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from nanoslime.config import DataConfig
from nanoslime.config.model import ONE_LABEL
from nanoslime.storage.datasets import prompt_files
from nanoslime.storage.prompt_rows import MAX_QUOTED_CHARS, Row, Tally, from_json, read_rows
from nanoslime.types import RunError

# Kinds of parts of a message's content that are text.
_TEXT_PARTS = (None, "text", "input_text", "output_text")

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One row of the file: what the keys of the configuration lead to, checked.

    For errors, `place` is FILE:LINE, or FILE:row N where the file has no lines.
    """

    place: str
    # A text, or messages of which each has a role and a text as content.
    prompt: str | Messages
    label: str | int | float | tuple[str, ...] | None
    metadata: dict[str, Any]


def read_prompts(
    path: Path, data: DataConfig, tally: Tally | None = None
) -> Iterator[PromptRecord]:
    """Every record of a file, or of the files of a directory (`datasets.prompt_files`).

    `tally` counts the rows that are left out. Raises RunError in one line that names file and
    line for what cannot be used: a missing or unreadable file, another suffix, no record at
    all; and, unless such rows are left out, a broken line, a key that leads nowhere, a prompt,
    a label or metadata of another kind.
    """
    tally = tally or Tally(data)
    is_empty = True
    for file in prompt_files(path):
        try:
            for row in read_rows(file, tally):
                record = tally.unless_broken(_record, row, data)
                if record is not None:
                    is_empty = False
                    yield record
        except OSError as error:
            raise RunError(f"prompt file {file} cannot be read: {error}") from error
    if is_empty and tally.num_broken:
        raise RunError(f"{path}: each of {tally.num_broken} rows is broken: {tally.first_fault}")
    if is_empty:
        raise RunError(f"prompt file {path} holds no prompts")


def _record(row: Row, data: DataConfig) -> PromptRecord:
    return PromptRecord(row.place, _prompt(row, data), _label(row, data), _meta(row, data))


def _find(value: Any, words: list[str]) -> Any:
    """What the words of a dotted key lead to. A name with a dot in it goes before a way
    through several, and a text may be JSON. Raises LookupError where they lead nowhere."""
    if not words:
        return value
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, list) and words[0].isdecimal():
        return _find(value[int(words[0])], words[1:])
    if isinstance(value, dict):
        for length in range(len(words), 0, -1):
            name = ".".join(words[:length])
            if name in value:
                return _find(value[name], words[length:])
    raise LookupError


def _parsed(text: str) -> Any:
    """What the text holds as JSON; itself where it is none."""
    try:
        return from_json(text)
    except (ValueError, RecursionError):
        return text


def _require(row: Row, field: str, key: str) -> Any:
    if key in row.fields:
        return row.fields[key]
    try:
        return _find(row.fields, key.split("."))
    except LookupError:
        choices = ", ".join(_choices(row.fields)) or "its keys: it has none"
        raise RunError(f"{row.place}: no key {key!r}; set {field} to one of {choices}") from None


def _choices(fields: dict[str, Any]) -> list[str]:
    """The keys of a row, of structs with the names in them behind a dot."""
    found = []
    for key, value in sorted(fields.items()):
        names = value if isinstance(value, dict) else ()
        found.extend([f"{key}.{name}" for name in names] or [key])
    return found


def _prompt(row: Row, data: DataConfig) -> str | Messages:
    prompt = _require(row, "data.prompt_key", data.prompt_key)
    if isinstance(prompt, str) and prompt.lstrip().startswith("["):
        # Some data sets hold messages as their JSON text.
        parsed = _parsed(prompt)
        are_messages = isinstance(parsed, list) and parsed and all(map(_has_role, parsed))
        prompt = parsed if are_messages else prompt
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RunError(f"{row.place}: the prompt is empty")
        return prompt
    if not isinstance(prompt, list):
        raise RunError(
            f"{row.place}: a prompt is a string or a list of {{role, content}} messages, "
            f"not {_quoted(prompt)}"
        )
    if not prompt:
        raise RunError(f"{row.place}: the prompt has no messages")
    messages = [_message(row.place, message) for message in prompt]
    asked = [message for message in messages if message["role"] != "system"] or messages
    if not any(message["content"].strip() or "tool_calls" in message for message in asked):
        raise RunError(f"{row.place}: the prompt is empty: its messages have no text")
    if data.system_prompt and any(message["role"] == "system" for message in messages):
        raise RunError(
            f"{row.place}: the prompt has a system message of its own, and data.system_prompt is "
            "set; leave one of them out"
        )
    return messages


def _has_role(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)


def _message(place: str, message: Any) -> dict[str, Any]:
    """The message with its content as text, without what a parquet file fills in as null."""
    if not _has_role(message):
        raise RunError(
            f"{place}: a prompt is a string or a list of {{role, content}} messages, "
            f"but one of them is {_quoted(message)}"
        )
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if content is None and "tool_calls" in message:
        content = ""
    parts = content if isinstance(content, list) else [content]
    texts = [_text_of_part(part) for part in parts]
    joined = "".join(text for text in texts if isinstance(text, str))
    if not all(isinstance(text, str) for text in texts):
        raise RunError(
            f"{place}: a prompt is a string or a list of {{role, content}} messages; the content "
            f"of a {message['role']} message is {_quoted(content)}, not text or parts of text"
        )
    return {**message, "content": joined}


def _text_of_part(part: Any) -> Any:
    """Its text; nothing for an image and other parts that are no text."""
    if isinstance(part, dict):
        return part.get("text") if part.get("type") in _TEXT_PARTS else None
    return part


def _label(row: Row, data: DataConfig) -> str | int | float | tuple[str, ...] | None:
    """Raises RunError for a label that is neither text nor number, with a key that may lead
    to one; a list of texts is one where no reward needs a single label."""
    if not data.label_key:
        return None
    label = _require(row, "data.label_key", data.label_key)
    if isinstance(label, Decimal):
        return str(label)
    if isinstance(label, str | int) or (isinstance(label, float) and math.isfinite(label)):
        return label
    needs_one = not ONE_LABEL.isdisjoint(data.reward_weights(data.reward))
    if isinstance(label, list) and label and not needs_one:
        if all(isinstance(one, str) for one in label):
            return tuple(label)
    if isinstance(label, dict):
        names = [name for name, value in label.items() if isinstance(value, str | int | float)]
        keys = [f"{data.label_key}.{name}" for name in names]
        way_out = f"set data.label_key to {' or '.join(keys) or 'one'}"
    elif isinstance(label, list):
        way_out = f"set data.label_key to {data.label_key}.0 for its first item"
    else:
        way_out = "write one, or set data.label_key='' where the reward needs none"
    raise RunError(
        f"{row.place}: the label {_quoted(label)} is neither a text nor a number; {way_out}"
    )


def _meta(row: Row, data: DataConfig) -> dict[str, Any]:
    """The row's metadata; none where nobody asked for a key that the row has not."""
    key = data.metadata_key
    if not key or (key == DataConfig.metadata_key and key not in row.fields):
        return {}
    value = _require(row, "data.metadata_key", key)
    if isinstance(value, str):
        value = _parsed(value or "{}")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RunError(
            f"{row.place}: {key} is {_quoted(value)}, not an object or its JSON text; "
            "set data.metadata_key to another key, or to '' for none"
        )
    try:
        json.dumps(value)
    except TypeError:
        # Dates and the like become text, as rollouts are recorded as JSON.
        value = json.loads(json.dumps(value, default=str))
    return value


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_QUOTED_CHARS else text[:MAX_QUOTED_CHARS] + "..."
