"""Tensors put together in memory, block by block: where columns are split, or the dtype
changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from nanoslime.models.rules import Box
from nanoslime.storage.safetensors_file import DTYPE_BYTES
from nanoslime.types import RunError

if TYPE_CHECKING:
    from tools.conversion.tensor_copy import Files, Fill, Source

# A BF16 number is the upper half of a float32.
_FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.float32}


def blocks(item: Fill, files: Files, block_bytes: int) -> Iterator[memoryview]:
    """The bytes of `item`, some rows at a time, about `block_bytes` of them.

    The boxes may cut the first two dimensions; dimensions from the third on have to be whole.
    """
    columns = _columns(item.shape)
    row_bytes = columns * DTYPE_BYTES[item.dtype]
    for source in item.sources:
        source_row_bytes = _columns(source.chunk.shape) * DTYPE_BYTES[source.dtype]
        row_bytes = max(row_bytes, source_row_bytes)
    num_rows = item.shape[0] if item.shape else 1
    rows_per_block = max(1, block_bytes // row_bytes)
    for first in range(0, num_rows, rows_per_block):
        height = min(rows_per_block, num_rows - first)
        block = np.empty((height, columns), _bits(item.dtype))
        for source in item.sources:
            _place(source, item, first, block, files)
        yield block.data.cast("B")


def _place(source: Source, item: Fill, first: int, block: np.ndarray, files: Files) -> None:
    """Write the rows of `source` that belong to `block`, whose first row is row `first`
    of `item`.
    """
    rows = source.target_box[0] if source.target_box else slice(0, 1)
    low = max(rows.start, first)
    high = min(rows.stop, first + len(block))
    if low >= high:
        return
    chunk = source.chunk
    width = _columns(chunk.shape)
    row_bytes = width * DTYPE_BYTES[source.dtype]
    first_source_row = source.box[0].start if source.box else 0
    chunk_row = first_source_row + low - rows.start
    raw = np.empty((high - low, width), _bits(source.dtype))
    files.read(chunk.file, chunk.offset + chunk_row * row_bytes, raw.data.cast("B"))
    source_columns = _flat_columns(source.box, chunk.shape)
    target_columns = _flat_columns(source.target_box, item.shape)
    values = cast(raw[:, source_columns], source.dtype, item.dtype)
    block[low - first : high - first, target_columns] = values


def cast(values: np.ndarray, source: str, target: str) -> np.ndarray:
    """Bits of `source` floats as bits of `target` floats (dtypes of CAST).

    Numbers are rounded to the nearest, ties to even. Raises RunError for a number beyond
    the range of F16.
    """
    if source == target:
        return values
    if source == "BF16":
        numbers = (values.astype(np.uint32) << 16).view(np.float32)
    else:
        numbers = np.ascontiguousarray(values).view(_FLOATS[source])
    if target == "BF16":
        return _rounded_to_bf16(numbers)
    try:
        with np.errstate(over="raise"):
            return numbers.astype(_FLOATS[target]).view(_bits(target))
    except FloatingPointError as error:
        raise RunError(
            f"a {source} number is beyond the range of {target}; choose BF16 or F32"
        ) from error


def _rounded_to_bf16(numbers: np.ndarray) -> np.ndarray:
    """The bits of BF16 numbers nearest to `numbers`; a NaN stays one, also where its low
    half is lost.
    """
    bits = numbers.astype(np.float32).view(np.uint32)
    last_kept_bit = bits >> 16 & 1
    rounded = (bits + 0x7FFF + last_kept_bit) >> 16
    quiet_nan = bits >> 16 | 0x40
    return np.where(np.isnan(numbers), quiet_nan, rounded).astype(np.uint16)


def _bits(dtype: str) -> np.dtype:
    """The unsigned integer type of the size of `dtype`."""
    return np.dtype(f"u{DTYPE_BYTES[dtype]}")


def _columns(shape: tuple[int, ...]) -> int:
    return prod(shape[1:])


def _flat_columns(box: Box, shape: tuple[int, ...]) -> slice:
    """The columns of a box in rows of a tensor that are flattened."""
    if len(shape) < 2:
        return slice(0, 1)
    inner = prod(shape[2:])
    return slice(box[1].start * inner, box[1].stop * inner)
