"""Tensors put together in memory, block by block: where columns are split, or the dtype changes."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from nanoslime.storage.safetensors_file import DTYPE_BYTES
from nanoslime.types import RunError

if TYPE_CHECKING:
    from tools.conversion.tensor_copy import Files, Fill, Source

_FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.float32}  # BF16: the upper half of one


def blocks(item: Fill, files: Files, block_bytes: int) -> Iterator[memoryview]:
    """The bytes of `item`, some rows at a time. Boxes may be a part of the first two dimensions."""
    columns = _columns(item.shape)
    row_bytes = max(DTYPE_BYTES[s.dtype] * _columns(s.chunk.shape) for s in item.sources)
    row_bytes = max(row_bytes, columns * DTYPE_BYTES[item.dtype])
    height, step = item.shape[0] if item.shape else 1, max(1, block_bytes // row_bytes)
    for first in range(0, height, step):
        out = np.empty((min(step, height - first), columns), _raw(item.dtype))
        for source in item.sources:
            _place(source, item, first, out, files)
        yield out.data.cast("B")


def _place(source: Source, item: Fill, first: int, out: np.ndarray, files: Files) -> None:
    """The rows of `source` that belong to the block `out`, whose first row is row `first` of the target."""
    rows = source.to[0] if source.to else slice(0, 1)
    low, high = max(rows.start, first), min(rows.stop, first + len(out))
    if low >= high:
        return
    width, size = _columns(source.chunk.shape), DTYPE_BYTES[source.dtype]
    start = low - rows.start + (source.box[0].start if source.box else 0)
    raw = np.empty((high - low, width), _raw(source.dtype))
    files.read(source.chunk.file, source.chunk.offset + start * width * size, raw.data.cast("B"))
    taken, put = _flat(source.box, source.chunk.shape), _flat(source.to, item.shape)
    out[low - first : high - first, put] = cast(raw[:, taken], source.dtype, item.dtype)


def cast(values: np.ndarray, source: str, target: str) -> np.ndarray:
    """Bits of `source` floats as bits of `target` floats (of CAST), rounded to the nearest, ties to even.

    RunError for a number that is beyond the range of F16.
    """
    if source == target:
        return values
    wide = values.astype(np.uint32) << 16 if source == "BF16" else np.ascontiguousarray(values)
    numbers = wide.view(_FLOATS[source])
    if target != "BF16":
        try:
            with np.errstate(over="raise"):
                return numbers.astype(_FLOATS[target]).view(_raw(target))
        except FloatingPointError as e:
            raise RunError(
                f"a {source} number is beyond the range of {target}; choose BF16 or F32"
            ) from e
    bits = numbers.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(numbers), bits >> 16 | 0x40, rounded).astype(np.uint16)


def _raw(dtype: str) -> np.dtype:
    return np.dtype(f"u{DTYPE_BYTES[dtype]}")


def _columns(shape: tuple[int, ...]) -> int:
    return prod(shape[1:])


def _flat(box: tuple[slice, ...], shape: tuple[int, ...]) -> slice:
    """A box's columns in the rows of a tensor, flattened; dimensions from the third on are whole."""
    if len(shape) < 2:
        return slice(0, 1)
    inner = prod(shape[2:])
    return slice(box[1].start * inner, box[1].stop * inner)
