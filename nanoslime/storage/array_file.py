"""Files of many small arrays and what is said of them: an .npz whose entry `tree` is JSON.

Arrays of one type and trailing shape lie end to end in one entry, and the JSON has their
places. Each entry has a CRC-32, so a damaged file is refused.
"""

import json
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from pydantic import ConfigDict, TypeAdapter
from pydantic_core import to_json

from nanoslime.storage.shared_files import sync_directory, written_aside
from nanoslime.types import RunError

# What stands in the tree for an array: [entry, first row, last row].
_ARRAY = "\0array"


def write_tree(path: Path, tree: Any) -> None:
    """Writes the file aside and renames it, so that it appears whole or not at all.

    `tree` is made of dataclasses, dicts, lists and tuples of JSON and arrays of numbers. Other
    values become their text.
    """
    arrays: dict[str, list[np.ndarray]] = defaultdict(list)
    num_rows: Counter[str] = Counter()

    def place(value: Any) -> Any:
        """What stands for a value that JSON does not have."""
        if not isinstance(value, np.ndarray) or not value.ndim or value.dtype.kind not in "biuf":
            return str(value)
        entry = "_".join(str(part) for part in (value.dtype.name, *value.shape[1:]))
        first = num_rows[entry]
        num_rows[entry] += len(value)
        arrays[entry].append(value)
        return {_ARRAY: [entry, first, num_rows[entry]]}

    text = to_json(tree, inf_nan_mode="constants", bytes_mode="base64", fallback=place)
    entries = {"tree": [np.frombuffer(text, np.uint8)], **arrays}
    with written_aside(path) as file, ZipFile(file, "w") as archive:
        for name, of_entry in entries.items():
            _write_entry(archive, name, of_entry)
    sync_directory(path.parent)


def _write_entry(archive: ZipFile, name: str, arrays: list[np.ndarray]) -> None:
    """One after the other, so that no array is held twice."""
    header = {
        "descr": np.lib.format.dtype_to_descr(arrays[0].dtype),
        "fortran_order": False,
        "shape": (sum(map(len, arrays)), *arrays[0].shape[1:]),
    }
    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
        np.lib.format.write_array_header_1_0(entry, header)
        for array in arrays:
            entry.write(np.ascontiguousarray(array).data)


def read_tree[T](path: Path, what: str, content: type[T]) -> T:
    """What `write_tree` was given, as `content`.

    Raises RunError for a file that is missing, damaged or of another type, and says that it is
    no `what`.
    """
    config = ConfigDict(arbitrary_types_allowed=True)
    of_one = TypeAdapter(tuple[content], config=config)  # type: ignore[valid-type]
    of_one.rebuild(_types_namespace={"np": np})  # which nanoslime.types imports for mypy only
    try:
        with np.load(path) as file:
            entries = dict(file)
        text = bytes(entries.pop("tree"))
        tree = json.loads(text, object_hook=partial(_unpacked, entries))
        return of_one.validate_python((tree,))[0]
    except (OSError, EOFError, ValueError, LookupError, TypeError, RuntimeError, BadZipFile) as e:
        raise RunError(f"{path} is not {what}: {type(e).__name__}: {shorten(str(e), 300)}") from e


def _unpacked(entries: dict[str, np.ndarray], packed: dict[str, Any]) -> Any:
    """What an object of the tree stands for. Raises ValueError or KeyError for a wrong place."""
    if _ARRAY not in packed:
        return packed
    entry, first, last = packed[_ARRAY]
    values = entries[entry][first:last]
    if len(values) != last - first:
        raise ValueError(f"{entry} ends too early")
    return values
