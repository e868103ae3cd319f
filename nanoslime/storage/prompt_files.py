"""Reads prompt files, JSONL or parquet; refuses bad ones with file and line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoslime.plugins import resolve
from nanoslime.types import RunError

SUFFIXES = (".jsonl", ".parquet")
# pyarrow is slow to import: it is imported only where a parquet file is given.
_PARQUET = {"file": "pyarrow.parquet:ParquetFile", "error": "pyarrow:ArrowException"}
_ROWS_PER_BATCH = 1024
_MAX_QUOTED_CHARS = 80


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One prompt as the file holds it.

    For messages, `place` is FILE:LINE, or FILE:row N in parquet.
    """

    place: str
    fields: dict[str, Any]


def read_prompt_file(path: Path, prompt_key: str, label_key: str) -> Iterator[PromptRecord]:
    """Every record of the file, each with `prompt_key` and, where given, `label_key`.

    Raises RunError in one line that names file and line for what cannot be used: a
    missing file, another suffix, a broken line, a missing key, a file without any record.
    """
    if not path.is_file():
        raise RunError(
            f"prompt file {path} does not exist; "
            "set data.prompts or data.eval_prompts to one that does"
        )
    if path.suffix == ".parquet":
        records = _parquet_records(path)
    elif path.suffix == ".jsonl":
        records = _jsonl_records(path)
    else:
        raise RunError(f"prompt file {path}: choose a file that ends in {' or '.join(SUFFIXES)}")
    is_empty = True
    for record in records:
        is_empty = False
        _require_key(record, "data.prompt_key", prompt_key)
        if label_key:
            _require_key(record, "data.label_key", label_key)
        yield record
    if is_empty:
        raise RunError(f"prompt file {path} holds no prompts")


def check_prompt_file(path: Path, prompt_key: str, label_key: str) -> None:
    """Raises RunError as `read_prompt_file` does, but for the first record alone.

    It is quick for a file of any size.
    """
    next(read_prompt_file(path, prompt_key, label_key))


def _require_key(record: PromptRecord, field: str, key: str) -> None:
    if key not in record.fields:
        found = ", ".join(sorted(record.fields))
        raise RunError(f"{record.place}: no key {key!r}; set {field} to one of {found}")


def _jsonl_records(path: Path) -> Iterator[PromptRecord]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                fields = json.loads(line)
            except ValueError as error:
                quoted = line.decode(errors="replace").strip()[:_MAX_QUOTED_CHARS]
                raise RunError(f"{place}: not a line of JSON ({error}): {quoted!r}") from error
            if not isinstance(fields, dict):
                raise RunError(f"{place}: a JSON object is needed, found {type(fields).__name__}")
            yield PromptRecord(place, fields)


def _parquet_records(path: Path) -> Iterator[PromptRecord]:
    open_parquet = resolve("file", _PARQUET, "data.prompts")
    arrow_error = resolve("error", _PARQUET, "data.prompts")
    number = 0
    try:
        with open_parquet(path) as file:
            for batch in file.iter_batches(_ROWS_PER_BATCH):
                for fields in batch.to_pylist():
                    yield PromptRecord(f"{path}:row {number}", fields)
                    number += 1
    except (arrow_error, OSError) as error:
        cause = str(error).partition("\n")[0]
        raise RunError(f"{path} is not a readable parquet file: {cause}") from error
