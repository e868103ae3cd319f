"""manifest.json of a directory: size and XXH3-128 of every file in it, and the check against it."""

import hashlib
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from nanoslime.storage.shared_files import publish_json, read_json
from nanoslime.types import RunError

NAME = "manifest.json"


class DamagedError(RunError):
    """A directory is not what its manifest says; the message names the first file that differs."""


def write(directory: Path, known: Mapping[str, str] | None = None) -> None:
    """Hash every file below `directory` and write its manifest; `known` are hashes by relative path."""
    hashes = dict(known or {})
    hashes |= _hashes(directory, [name for name in _files(directory) if name not in hashes])
    entries = {
        n: {"bytes": (directory / n).stat().st_size, "xxh3_128": h}
        for n, h in sorted(hashes.items())
    }
    publish_json(directory / NAME, {"hash": "xxh3_128", "files": entries})


def verify(directory: Path) -> None:
    """Raise DamagedError for a file that is missing, truncated, altered or not in the manifest."""
    try:
        entries = read_json(directory / NAME)["files"]
        expected = {
            name: {key: e[key] for key in ("bytes", "xxh3_128")} for name, e in entries.items()
        }
    except FileNotFoundError as error:
        raise DamagedError(
            f"{directory} has no {NAME}: it was never completed, or lost it"
        ) from error
    except (RunError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"{directory / NAME} is not a manifest: {error}") from error
    present = set(_files(directory))
    for name, entry in sorted(expected.items()):
        if name not in present:
            raise DamagedError(
                f"{directory / name} is missing; {NAME} lists it with {entry['bytes']} bytes"
            )
        if (size := (directory / name).stat().st_size) != entry["bytes"]:
            kind = "truncated" if size < entry["bytes"] else "too long"
            raise DamagedError(
                f"{directory / name} is {kind}: {size} bytes, {NAME} says {entry['bytes']}"
            )
    for name in sorted(present - set(expected)):
        raise DamagedError(f"{directory / name} is not listed in {NAME}; it does not belong here")
    for name, digest in _hashes(directory, expected).items():
        if digest != expected[name]["xxh3_128"]:
            raise DamagedError(f"{directory / name} was altered: its XXH3-128 differs from {NAME}")


def _files(directory: Path) -> list[str]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(directory)) for path in found if path != directory / NAME)


def _hashes(directory: Path, names: Collection[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with open(directory / name, "rb", buffering=0) as file:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))
