"""Reads prompt files, JSONL or parquet; refuses bad ones with file and line.

The login node reads a file through this module before submission, and the job before any
engine starts, so both say the same of it.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from nanoslime.config import DataConfig
from nanoslime.plugins import resolve
from nanoslime.types import RunError

SUFFIXES = (".jsonl", ".parquet")
# pyarrow is slow to import: it is imported only where a parquet file is given.
_PARQUET = {"file": "pyarrow.parquet:ParquetFile", "error": "pyarrow:ArrowException"}
_ROWS_PER_BATCH = 1024
_MAX_QUOTED_CHARS = 80
# An escaped half of a surrogate pair in JSON; two halves make a character.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One row of the file: what the keys of the configuration lead to, checked.

    For errors, `place` is FILE:LINE, or FILE:row N in parquet.
    """

    place: str
    # A text, or messages of which each has a role and a text as content.
    prompt: str | Messages
    label: str | int | float | None
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Row:
    place: str
    fields: dict[str, Any]


def read_prompt_file(path: Path, data: DataConfig) -> Iterator[PromptRecord]:
    """Every record of the file.

    Raises RunError in one line that names file and line for what cannot be used: a
    missing or unreadable file, another suffix, a broken line, a key that leads nowhere, a
    prompt, a label or metadata of another kind, a file without any record.
    """
    is_empty = True
    try:
        for row in _rows(path, data):
            is_empty = False
            yield PromptRecord(row.place, _prompt(row, data), _label(row, data), _meta(row, data))
    except OSError as error:
        raise RunError(f"prompt file {path} cannot be read: {error}") from error
    if is_empty:
        raise RunError(f"prompt file {path} holds no prompts")


def _rows(path: Path, data: DataConfig) -> Iterator[_Row]:
    if not path.is_file():
        raise RunError(
            f"prompt file {path} does not exist; "
            "set data.prompts or data.eval_prompts to one that does"
        )
    if path.suffix == ".parquet":
        return _parquet_rows(path, data)
    if path.suffix == ".jsonl":
        return _jsonl_rows(path)
    raise RunError(f"prompt file {path}: choose a file that ends in {' or '.join(SUFFIXES)}")


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                fields = _from_json(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise RunError(
                    f"{place}: not a line of JSON (not UTF-8, byte 0x{line[error.start]:02x}: "
                    f"{error.reason}): convert the file (iconv -f ENCODING -t utf-8)"
                ) from error
            except UnicodeEncodeError as error:
                raise RunError(
                    f"{place}: \\u{ord(error.object[error.start]):04x} is half of a surrogate pair "
                    "and no character; remove it"
                ) from error
            except (ValueError, RecursionError) as error:
                quoted = line.decode(errors="replace").strip()[:_MAX_QUOTED_CHARS]
                raise RunError(f"{place}: not a line of JSON ({error}): {quoted!r}") from error
            if not isinstance(fields, dict):
                raise RunError(f"{place}: a JSON object is needed, found {type(fields).__name__}")
            yield _Row(place, fields)


def _from_json(text: str) -> Any:
    """Raises UnicodeEncodeError for half of a surrogate pair, which no file of the run can hold;
    ValueError or RecursionError for what is no JSON."""
    value = json.loads(text)
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _parquet_rows(path: Path, data: DataConfig) -> Iterator[_Row]:
    open_parquet = resolve("file", _PARQUET, "data.prompts")
    arrow_error = resolve("error", _PARQUET, "data.prompts")
    number = 0
    try:
        with open_parquet(path, page_checksum_verification=True) as file:
            columns = _needed(file.schema_arrow.names, data)
            for batch in file.iter_batches(_ROWS_PER_BATCH, columns=columns):
                for fields in _rows_of(batch):
                    yield _Row(f"{path}:row {number}", fields)
                    number += 1
    except UnicodeDecodeError as error:
        raise RunError(
            f"{path}:row {number}: a text is not UTF-8 ({error.reason}); write the file anew"
        ) from error
    except (arrow_error, OSError) as error:
        cause = str(error).partition("\n")[0]
        raise RunError(f"{path} is not a readable parquet file: {cause}") from error


def _needed(names: list[str], data: DataConfig) -> list[str] | None:
    """The columns that the keys may lead into; None, for all, where one leads nowhere."""
    needed: set[str] = set()
    for key in (data.prompt_key, data.label_key, data.metadata_key):
        found = {name for name in names if key == name or key.startswith(f"{name}.")}
        if key and not found and key != DataConfig.metadata_key:
            return None
        needed |= found
    return sorted(needed)


def _rows_of(batch: Any) -> Iterable[dict[str, Any]]:
    """The rows of an Arrow batch; where one is no text, those before it, and its error."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist(maps_as_pydicts="lossy")
    except UnicodeDecodeError:
        return (
            batch.slice(i, 1).to_pylist(maps_as_pydicts="lossy")[0] for i in range(batch.num_rows)
        )
    return rows


def _find(value: Any, words: list[str]) -> Any:
    """What the words of a dotted key lead to. A name with a dot in it goes before a way
    through several. Raises LookupError where they lead nowhere."""
    if not words:
        return value
    if isinstance(value, list) and words[0].isdecimal():
        return _find(value[int(words[0])], words[1:])
    if isinstance(value, dict):
        for length in range(len(words), 0, -1):
            name = ".".join(words[:length])
            if name in value:
                return _find(value[name], words[length:])
    raise LookupError


def _require(row: _Row, field: str, key: str) -> Any:
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


def _prompt(row: _Row, data: DataConfig) -> str | Messages:
    prompt = _require(row, "data.prompt_key", data.prompt_key)
    if isinstance(prompt, str):
        if not prompt:
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
    if data.system_prompt and any(message["role"] == "system" for message in messages):
        raise RunError(
            f"{row.place}: the prompt has a system message of its own, and data.system_prompt is "
            "set; leave one of them out"
        )
    return messages


def _message(place: str, message: Any) -> dict[str, Any]:
    """The message with its content as text, without what a parquet file fills in as null."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RunError(
            f"{place}: a prompt is a string or a list of {{role, content}} messages, "
            f"but one of them is {_quoted(message)}"
        )
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if content is None and "tool_calls" in message:
        content = ""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    joined = "".join(text for text in texts if isinstance(text, str))
    if not all(isinstance(text, str) for text in texts):
        raise RunError(
            f"{place}: a prompt is a string or a list of {{role, content}} messages; the content "
            f"of a {message['role']} message is {_quoted(content)}, not text or parts of text"
        )
    return {**message, "content": joined}


def _label(row: _Row, data: DataConfig) -> str | int | float | None:
    """Raises RunError for a label that is neither text nor number, with a key that may lead
    to one."""
    if not data.label_key:
        return None
    label = _require(row, "data.label_key", data.label_key)
    if isinstance(label, Decimal):
        return str(label)
    is_finite = isinstance(label, int | float) and math.isfinite(label)
    if isinstance(label, str) or is_finite:
        return label
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


def _meta(row: _Row, data: DataConfig) -> dict[str, Any]:
    """The row's metadata; none where nobody asked for a key that the row has not."""
    key = data.metadata_key
    if not key or (key == DataConfig.metadata_key and key not in row.fields):
        return {}
    value = _require(row, "data.metadata_key", key)
    if isinstance(value, str):
        try:
            value = _from_json(value or "{}")
        except (ValueError, RecursionError):
            pass
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RunError(
            f"{row.place}: {key} is {_quoted(value)}, not an object or its JSON text; "
            "set data.metadata_key to another key, or to '' for none"
        )
    return value


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_QUOTED_CHARS else text[:_MAX_QUOTED_CHARS] + "..."
