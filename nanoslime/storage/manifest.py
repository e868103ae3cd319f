"""manifest.json of a directory: size and XXH3-128 of every file in it, and the check against it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from nanoslime.storage.shared_files import publish_json, read_json
from nanoslime.types import RunError

NAME = "manifest.json"
_CHUNK_BYTES = 4 << 20


class DamagedError(RunError):
    """A directory is not what its manifest says; the message names the first file that differs."""


def write(directory: Path) -> None:
    """Hash every file below `directory` and write its manifest."""
    names = _files(directory)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        entries = pool.map(lambda name: _entry(directory / name), names)
        publish_json(directory / NAME, {"hash": "xxh3_128", "files": dict(zip(names, entries, strict=True))})


def verify(directory: Path, *, contents: bool = True) -> None:
    """Raise DamagedError for a file that is missing, truncated, altered or not in the manifest.

    contents=False compares names and sizes only.
    """
    try:
        expected = read_json(directory / NAME)["files"]
    except FileNotFoundError as error:
        raise DamagedError(f"{directory} has no {NAME}: it was never completed") from error
    present = set(_files(directory))
    for name, entry in sorted(expected.items()):
        if name not in present:
            raise DamagedError(f"{directory / name} is missing; {NAME} lists it with {entry['bytes']} bytes")
        size = (directory / name).stat().st_size
        if size != entry["bytes"]:
            kind = "truncated" if size < entry["bytes"] else "too long"
            raise DamagedError(f"{directory / name} is {kind}: {size} bytes, {NAME} says {entry['bytes']}")
    for name in sorted(present - set(expected)):
        raise DamagedError(f"{directory / name} is not listed in {NAME}; it does not belong here")
    if not contents:
        return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda name: _entry(directory / name), expected)
        for name, entry in zip(expected, found, strict=True):
            if entry["xxh3_128"] != expected[name]["xxh3_128"]:
                raise DamagedError(f"{directory / name} was altered: its XXH3-128 differs from {NAME}")


def _files(directory: Path) -> list[str]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(directory)) for path in found if path != directory / NAME)


def _entry(path: Path) -> dict[str, int | str]:
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return {"bytes": size, "xxh3_128": digest.hexdigest()}
