"""manifest.json of a directory: size and XXH3-128 of every file in it, and the check
against it.
"""

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from nanoslime.storage.shared_files import publish_json, read_json
from nanoslime.types import RunError

NAME = "manifest.json"
_FILE_OF_RANK = re.compile(r"__(\d+)_")


class DamagedError(RunError):
    """A directory differs from its manifest; the message names the first file that does."""


def write(directory: Path, known: Mapping[str, str] | None = None) -> None:
    """Hash every file below `directory` and write its manifest.

    `known` are hashes, by relative path, that need not be computed again.
    """
    hashes = dict(known or {})
    unknown = [name for name in _files(directory) if name not in hashes]
    hashes.update(hashes_of(directory, unknown))
    entries = {}
    for name in sorted(hashes):
        size = (directory / name).stat().st_size
        entries[name] = {"bytes": size, "xxh3_128": hashes[name]}
    publish_json(directory / NAME, {"hash": "xxh3_128", "files": entries})


def hash_own(directory: Path, rank: int) -> dict[str, str]:
    """Hashes of the files that a rank wrote into a distributed checkpoint, by relative path.

    The torch library calls a rank's files __<rank>_<number>.distcp; rank 0 wrote what has
    another name.
    """
    of_rank = {name: _FILE_OF_RANK.match(name) for name in _files(directory)}
    own = [name for name, found in of_rank.items() if (int(found[1]) if found else 0) == rank]
    return hashes_of(directory, own)


def verify(directory: Path, share: int = 0, num_shares: int = 1) -> None:
    """Raise DamagedError for a file that is missing, truncated, altered or not in the
    manifest.

    Of the files only every `num_shares`-th is hashed, where others do so with the rest.
    """
    listed = _read(directory)
    present = set(_files(directory))
    for name, (num_bytes, _) in sorted(listed.items()):
        path = directory / name
        if name not in present:
            raise DamagedError(f"{path} is missing; {NAME} lists it with {num_bytes} bytes")
        size = path.stat().st_size
        if size < num_bytes:
            raise DamagedError(f"{path} is truncated: {size} bytes, {NAME} says {num_bytes}")
        if size != num_bytes:
            raise DamagedError(f"{path} is too long: {size} bytes, {NAME} says {num_bytes}")
    for name in sorted(present - listed.keys()):
        raise DamagedError(f"{directory / name} is not listed in {NAME}; it does not belong here")
    for name, digest in hashes_of(directory, sorted(listed)[share::num_shares]).items():
        if digest != listed[name][1]:
            raise DamagedError(f"{directory / name} was altered: its XXH3-128 differs from {NAME}")


def _read(directory: Path) -> dict[str, tuple[int, str]]:
    """(size, hash) of every file by name, as the manifest has them."""
    try:
        files = read_json(directory / NAME)["files"]
        return {name: (entry["bytes"], entry["xxh3_128"]) for name, entry in files.items()}
    except FileNotFoundError as error:
        raise DamagedError(
            f"{directory} has no {NAME}: it was never completed, or lost it"
        ) from error
    except (RunError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"{directory / NAME} is not a manifest: {error}") from error


def _files(directory: Path) -> list[str]:
    """The relative paths of all files below `directory`, without its manifest."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(directory)) for path in files if path != directory / NAME)


def hashes_of(directory: Path, names: Collection[str]) -> dict[str, str]:
    """The XXH3-128 of these files, by name."""

    def digest(name: str) -> str:
        with open(directory / name, "rb", buffering=0) as file:
            return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))
