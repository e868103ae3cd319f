"""Files of many small arrays and what is said of them: an .npz whose entry `tree` is JSON.

Arrays of one type and trailing shape lie end to end in one entry, and the JSON has their
places. Each entry has a CRC-32, so a damaged file is refused.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from nanoslime.storage.shared_files import finite_json, sync_directory
from nanoslime.types import RunError

# The entry of an array, and its first and last row there.
Place = list[Any]


class ArrayWriter:
    """Takes arrays, and writes them with a tree that has their places."""

    def __init__(self) -> None:
        self._arrays: dict[str, list[np.ndarray]] = defaultdict(list)
        self._num_rows: dict[str, int] = defaultdict(int)

    def add(self, array: np.ndarray | None) -> Place | None:
        """The place that `array` will have; it must not change before `write`."""
        if array is None:
            return None
        entry = "_".join(str(part) for part in (array.dtype.name, *array.shape[1:]))
        first = self._num_rows[entry]
        self._arrays[entry].append(array)
        self._num_rows[entry] += len(array)
        return [entry, first, self._num_rows[entry]]

    def write(self, path: Path, tree: Any) -> None:
        """Writes the file aside and renames it, so that it appears whole or not at all.

        `tree` is JSON; nan and inf in it become null, and other values their text.
        """
        aside = path.with_name(f".{path.name}.partial")
        text = finite_json(tree, default=str).encode()
        try:
            with aside.open("wb") as file:
                with zipfile.ZipFile(file, "w") as packed:
                    self._write_entry(packed, "tree", [np.frombuffer(text, np.uint8)], len(text))
                    for name, arrays in self._arrays.items():
                        self._write_entry(packed, name, arrays, self._num_rows[name])
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)

    def _write_entry(
        self, packed: zipfile.ZipFile, name: str, arrays: list[np.ndarray], num_rows: int
    ) -> None:
        """One after the other, so that no array is held twice."""
        header = {
            "descr": np.lib.format.dtype_to_descr(arrays[0].dtype),
            "fortran_order": False,
            "shape": (num_rows, *arrays[0].shape[1:]),
        }
        with packed.open(f"{name}.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            for array in arrays:
                entry.write(np.ascontiguousarray(array).data)


class ArrayFile:
    """What an ArrayWriter has written: `tree`, and the arrays by their places."""

    def __init__(self, path: Path, what: str) -> None:
        """Raises RunError for a file that is missing or damaged, and says that it is no `what`."""
        self._path = path
        self._what = what
        try:
            with np.load(path) as file:
                self._arrays = dict(file)
            self.tree = json.loads(bytes(self._arrays.pop("tree")))
        except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as e:
            raise self.error(e) from e

    def get(self, place: Place | None) -> np.ndarray | None:
        """Raises ValueError or KeyError where the file has no such place."""
        if place is None:
            return None
        entry, first, last = place
        values = self._arrays[entry][first:last]
        if len(values) != last - first:
            raise ValueError(f"{entry} ends too early")
        return values

    def error(self, cause: Exception) -> RunError:
        return RunError(f"{self._path} is not {self._what}: {type(cause).__name__}: {cause}")
