"""Files made of boxes of stored tensors: planned as byte ranges, copied, and hashed on the way.

    TargetFile  a name and its content in order: bytes given here, or tensors filled from boxes of others
    Fill        one tensor (or chunk) of the target, row-major, with the boxes that fill it, each exactly once

What is hashed passes through a block of memory that stays in the cache, read, hashed and written: faster than
a copy inside the kernel that is read again for its hash. Without checksums whole rows stay in the kernel
(copy_file_range). Parts of columns and other dtypes are put together by tensor_blocks.py.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path

import xxhash

from nanoslime.plugins import resolve
from nanoslime.storage.safetensors_file import DTYPE_BYTES
from nanoslime.types import RunError
from tools.conversion.torch_dist import Chunk, StoredTensor

BLOCK_BYTES = 1 << 20  # still in the cache when it is hashed
CAST = {"F32", "F16", "BF16"}  # dtypes that become one another
_KERNEL_BYTES = 64 << 20
PAGE_BYTES = (
    4096  # inside the kernel, a copy between other places in the page costs half as much again
)
Box = tuple[slice, ...]  # one slice per dimension, start and stop set
Progress = Callable[[int], object]  # is called with the number of bytes done, often
Link = tuple[
    StoredTensor, Box, Box
]  # a box of a stored tensor, and the same box of the target tensor
_BLOCKS = "tools.conversion.tensor_blocks:blocks"  # numpy, which takes longer to import than 100 MB to copy
_NO_COPY_RANGE = {
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
}  # of this pair of filesystems


@dataclass(frozen=True, slots=True)
class Source:
    """A box of a stored chunk and where it goes."""

    chunk: Chunk
    dtype: str
    box: Box  # in the chunk
    to: Box  # in what it fills


@dataclass(frozen=True, slots=True)
class Fill:
    """`shape` elements of `dtype` from boxes that cover them exactly once."""

    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    def ranges(self) -> list[tuple[Path, int, int]] | None:
        """(file, first byte, number of bytes) in the order of the target; None if rows do not move whole."""
        found, row = [], prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]
        for source in sorted(self.sources, key=lambda s: s.to[0].start if s.to else 0):
            sides = tuple(side.stop - side.start for side in source.box[1:])
            if source.dtype != self.dtype or not sides == source.chunk.shape[1:] == self.shape[1:]:
                return None
            first, stop = (source.box[0].start, source.box[0].stop) if source.box else (0, 1)
            found.append(
                (source.chunk.file, source.chunk.offset + first * row, (stop - first) * row)
            )
        return found


@dataclass(frozen=True, slots=True)
class TargetFile:
    name: str
    content: tuple[bytes | Fill, ...]

    @property
    def num_bytes(self) -> int:
        return sum(
            len(item) if isinstance(item, bytes) else item.num_bytes for item in self.content
        )


def fill(
    what: str, dtype: str, start: Sequence[int], shape: Sequence[int], links: Iterable[Link]
) -> Fill:
    """The sources of the box at `start` of size `shape` of a tensor whose boxes `links` describe.

    Raises RunError naming `what` where they do not cover it.
    """
    found: list[Source] = []
    for stored, box, to in links:
        if stored.dtype != dtype and not {stored.dtype, dtype} <= CAST:
            file = stored.chunks[0].file
            raise RunError(
                f"{file}: {what} is {stored.dtype}; {dtype} is made of {sorted(CAST)} only"
            )
        overlaps = (_overlap(stored.dtype, chunk, box, to, start, shape) for chunk in stored.chunks)
        found += filter(None, overlaps)
    covered = sum(prod(side.stop - side.start for side in source.to) for source in found)
    if covered != prod(shape):
        raise RunError(f"{what}: {covered} of its {prod(shape)} elements have a source")
    return Fill(dtype, tuple(shape), tuple(found))


def _overlap(
    dtype: str, chunk: Chunk, box: Box, to: Box, start: Sequence[int], shape: Sequence[int]
) -> Source | None:
    inside, out = [], []
    for b, t, first, size, c, n in zip(
        box, to, start, shape, chunk.start, chunk.shape, strict=True
    ):
        shift = t.start - b.start  # from the source tensor to the target tensor
        low = max(b.start, c, first - shift)
        high = min(b.stop, c + n, first + size - shift)
        if low >= high:
            return None
        inside.append(slice(low - c, high - c))
        out.append(slice(low + shift - first, high + shift - first))
    return Source(chunk, dtype, tuple(inside), tuple(out))


class Files(ExitStack):
    """Source files, each opened once; close it, or use it as a context manager."""

    def __init__(self) -> None:
        super().__init__()
        self._open = dict[Path, int]()

    def descriptor(self, path: Path) -> int:
        if path not in self._open:
            self._open[path] = self.enter_context(open(path, "rb", buffering=0)).fileno()
        return self._open[path]

    def read(self, path: Path, offset: int, view: memoryview) -> None:
        """Fill `view` from byte `offset` on. RunError where the file ends before."""
        done = 0
        while done < len(view):
            count = os.preadv(self.descriptor(path), [view[done:]], offset + done)
            if not count:
                raise RunError(f"{path} has no byte {offset + done}: it was cut while it was read")
            done += count


def blocks(item: Fill, files: Files) -> Iterator[memoryview]:
    """The bytes of `item`, row-major, in pieces of about BLOCK_BYTES; a piece is valid until the next."""
    ranges = item.ranges()
    if ranges is None:
        yield from resolve(_BLOCKS, {}, "blocks")(item, files, BLOCK_BYTES)
        return
    buffer = memoryview(bytearray(min(BLOCK_BYTES, item.num_bytes)))
    for path, offset, size in ranges:
        for at in range(0, size, BLOCK_BYTES):
            view = buffer[: min(BLOCK_BYTES, size - at)]
            files.read(path, offset + at, view)
            yield view


def same(one: Fill, other: Fill) -> bool:
    """Whether both have the same bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with Files() as files:
        a, b = blocks(one, files), blocks(other, files)
        x = y = memoryview(b"")  # what is left of the two blocks
        left = one.num_bytes
        while left:
            x, y = x or next(a), y or next(b)
            n = min(len(x), len(y))
            left -= n
            if x[:n].tobytes() != y[:n].tobytes():  # memcmp; views are compared byte by byte
                return False
            x, y = x[n:], y[n:]
        return True


def write(target: TargetFile, directory: Path, *, checksum: bool, progress: Progress) -> str | None:
    """Write the file, force it to disk, and return its XXH3-128 (None without `checksum`).

    An exception of `progress` ends the copy.
    """
    digest = xxhash.xxh3_128() if checksum else None
    with Files() as files, open(directory / target.name, "wb", buffering=0) as out:
        position = 0

        def put(data: bytes | memoryview) -> None:
            nonlocal position
            _write_all(out.fileno(), data, position)
            if digest is not None:
                digest.update(data)
            position += len(data)
            progress(len(data))

        for item in target.content:
            if isinstance(item, bytes):
                put(item)
            elif digest is None and item.ranges() is not None:
                _copy_rows(item, files, out.fileno(), position, progress)
                position += item.num_bytes
            else:
                for view in blocks(item, files):
                    put(view)
        os.fsync(out.fileno())
    return digest.hexdigest() if digest is not None else None


def _copy_rows(item: Fill, files: Files, out: int, position: int, progress: Progress) -> None:
    """Copy whole rows within the kernel, and through memory where these filesystems do not let it."""
    for path, offset, size in item.ranges() or ():
        stop = position + size
        while position < stop:
            count = min(_KERNEL_BYTES, stop - position)
            try:
                count = os.copy_file_range(files.descriptor(path), out, count, offset, position)
            except OSError as error:
                if error.errno not in _NO_COPY_RANGE:
                    raise
                view = memoryview(bytearray(min(BLOCK_BYTES, count)))
                files.read(path, offset, view)
                _write_all(out, view, position)
                count = len(view)
            if not count:
                raise RunError(f"{path} has no byte {offset}: it was cut while it was read")
            offset, position = offset + count, position + count
            progress(count)


def _write_all(out: int, data: bytes | memoryview, position: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(out, view[done:], position + done)
