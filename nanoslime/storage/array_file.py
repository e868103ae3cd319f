"""Files of many small arrays and what is said of them: an .npz whose entry `tree` is JSON.

Arrays of one type and trailing shape lie end to end in one entry, and the JSON has their
places. Each entry has a CRC-32, so a damaged file is refused.
"""

import json
import os
from collections import Counter, defaultdict
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from pydantic import ConfigDict, TypeAdapter

from nanoslime.storage.shared_files import json_line, sync_directory
from nanoslime.types import RunError

# What stands in the tree for an array, and for a list of numbers: [entry, first row, last row].
_ARRAY = "\0array"
_NUMBERS = "\0numbers"
# What a list of one of these types is kept as.
_NUMBER_TYPES = {int: np.int64, float: np.float64}


def write_tree(path: Path, tree: Any) -> None:
    """Writes the file aside and renames it, so that it appears whole or not at all.

    `tree` is made of dataclasses, dicts, lists and tuples of JSON and arrays. Outside of arrays
    and of lists of numbers nan and inf become null, and other values their text.
    """
    aside = path.with_name(f".{path.name}.partial")
    packer = _Packer()
    text = json_line(packer.packed(tree))
    entries = {"tree": [np.frombuffer(text, np.uint8)], **packer.entries}
    try:
        with aside.open("wb") as file:
            with ZipFile(file, "w") as archive:
                for name, arrays in entries.items():
                    _write_entry(archive, name, arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


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


class _Packer:
    """Takes the arrays out of a tree; by the name of their entry in the file."""

    def __init__(self) -> None:
        self.entries: dict[str, list[np.ndarray]] = defaultdict(list)
        self._num_rows: Counter[str] = Counter()

    def packed(self, value: Any) -> Any:
        """`value` with a place for each array and for each list of numbers in it."""
        if isinstance(value, np.ndarray) and value.ndim and value.dtype.kind in "biuf":
            return {_ARRAY: self._place(value)}
        if isinstance(value, list) and set(map(type, value)) in ({int}, {float}):
            numbers = np.array(value)
            if numbers.dtype == _NUMBER_TYPES[type(value[0])]:  # no integer is too large
                return {_NUMBERS: self._place(numbers)}
        if isinstance(value, list | tuple):
            return [self.packed(inner) for inner in value]
        if isinstance(value, dict):
            return {key: self.packed(inner) for key, inner in value.items()}
        if is_dataclass(value) and not isinstance(value, type):
            return {field.name: self.packed(getattr(value, field.name)) for field in fields(value)}
        return value

    def _place(self, array: np.ndarray) -> list[Any]:
        entry = "_".join(str(part) for part in (array.dtype.name, *array.shape[1:]))
        first = self._num_rows[entry]
        self.entries[entry].append(array)
        self._num_rows[entry] += len(array)
        return [entry, first, self._num_rows[entry]]


def _unpacked(entries: dict[str, np.ndarray], packed: dict[str, Any]) -> Any:
    """What an object of the tree stands for. Raises ValueError or KeyError for a wrong place."""
    for kind in packed.keys() & {_ARRAY, _NUMBERS}:
        entry, first, last = packed[kind]
        values = entries[entry][first:last]
        if len(values) != last - first:
            raise ValueError(f"{entry} ends too early")
        return values if kind == _ARRAY else values.tolist()
    return packed


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
