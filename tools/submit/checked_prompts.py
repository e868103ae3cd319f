"""Remembers what the check of prompts has found, so that the same ones are read once.

The answer lies in the user's cache directory under a hash of all that it depends on: the files of
the prompts, the tokenizer's, the settings, and the code of the check.
"""

import os
from contextlib import suppress
from pathlib import Path

import xxhash

from nanoslime.config import DataConfig
from nanoslime.storage.datasets import prompt_files
from nanoslime.storage.shared_files import publish
from tools.submit.prompts import check_prompts

_CHUNK_BYTES = 16 << 20
_OF_TOKENIZER = ("*.json", "*.jinja", "*.model", "*.txt", "*/*.jinja")


def checked_prompts(path: Path, data: DataConfig, tokenizer: Path | None) -> str:
    """What is used of a source of prompts, in one line, as `check_prompts` says and raises."""
    if tokenizer and os.path.lexists(tokenizer / "tokenizer.json"):
        # The job needs it: what cannot be opened is said here, by its OSError.
        (tokenizer / "tokenizer.json").open("rb").close()
    files = prompt_files(path) + sorted(Path(__file__).parent.glob("*prompt*.py"))
    for pattern in _OF_TOKENIZER if tokenizer else ():
        files += sorted(tokenizer.glob(pattern)) if tokenizer else []
    digest = xxhash.xxh3_128(repr((str(path), data)).encode())
    known = None
    # What cannot be read, or a user without a home: then nothing is remembered.
    with suppress(OSError, RuntimeError, ValueError):
        for file in files:
            _add(digest, file)
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        known = cache / "nanoslime" / "prompts" / digest.hexdigest()
        if known.exists():
            return known.read_text(encoding="utf-8")
    text = check_prompts(path, data, tokenizer).text
    if known is not None:
        with suppress(OSError):
            known.parent.mkdir(parents=True, exist_ok=True)
            publish(known, text.encode(), durable=False)
    return text


def _add(digest: xxhash.xxh3_128, file: Path) -> None:
    digest.update(f"{file} {file.stat().st_size}".encode())
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            digest.update(chunk)
