"""Writes a checkpoint tensor by tensor, as benchmarks and tests make theirs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanoslime.storage.safetensors_file import (
    INDEX_FILE,
    MAX_SHARD_BYTES,
    Spec,
    parse_head,
    plan_files,
)
from nanoslime.storage.shared_files import publish_json


def write_files(
    directory: Path,
    specs: Iterable[Spec],
    tensors: Iterable[tuple[str, Any]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Stream (name, contiguous buffer), in the order of `specs`, into the files of
    `plan_files`.

    At most one tensor is in memory: the caller's. Raises ValueError for a tensor that is
    missing or not declared.
    """
    heads, index = plan_files(specs, max_shard_bytes)
    incoming = iter(tensors)
    for file_name, head in heads.items():
        path = directory / file_name
        with open(path, "wb") as file:
            file.write(head)
            for expected, info in parse_head(path, head).items():
                name, buffer = next(incoming, ("no further tensor", b""))
                if name != expected:
                    raise ValueError(
                        f"{name} was handed over where {expected} is next in the declared order"
                    )
                data = memoryview(buffer)
                declared_bytes = info.stop - info.start
                if data.nbytes != declared_bytes:
                    raise ValueError(
                        f"{name}: {data.nbytes} bytes came, "
                        f"its dtype and shape declare {declared_bytes}"
                    )
                if declared_bytes:  # an empty view cannot be cast
                    file.write(data.cast("B"))
    extra = next(incoming, None)
    if extra is not None:
        raise ValueError(f"{extra[0]} was handed over after the last declared tensor")
    if index is not None:
        publish_json(directory / INDEX_FILE, index)
