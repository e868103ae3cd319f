"""JSON files that other programs write, such as config.json: read whole, or refused by name."""

import json
from pathlib import Path
from typing import Any

from nanoslime.types import RunError


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    if not file.is_file():
        return {}
    text = read_text(file)
    try:
        values = json.loads(text)
    except ValueError as error:
        raise RunError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RunError(f"{file} should hold one JSON object, not {type(values).__name__}")
    return values


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{file} cannot be read: {error}") from error
