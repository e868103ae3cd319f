"""Files made of boxes of stored tensors: planned as byte ranges, copied, and hashed on the way.

    TargetFile  a name, and the content in order: bytes given here, or tensors filled from others
    Fill        one tensor (or chunk) of the target, row-major, and the boxes that fill it

Content that is hashed passes through a block of memory that stays in the cache: read,
hashed and written, it is faster than a copy inside the kernel that is read again for its
hash. Without checksums whole rows stay in the kernel (copy_file_range). Columns that are
split, and other dtypes, are put together by tensor_blocks.py.
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

from nanoslime.models.rules import Box
from nanoslime.plugins import resolve
from nanoslime.storage.safetensors_file import DTYPE_BYTES
from nanoslime.types import RunError
from tools.conversion.torch_dist import Chunk, StoredTensor

BLOCK_BYTES = 1 << 20  # a block of this size is still in the cache when it is hashed
CAST = {"F32", "F16", "BF16"}  # dtypes that can become one another
PAGE_BYTES = (
    4096  # a copy inside the kernel between other places in the page takes half as long again
)
_KERNEL_BYTES = 64 << 20
# numpy, which tensor_blocks imports, takes longer to import than 100 MB take to copy.
_BLOCKS = "tools.conversion.tensor_blocks:blocks"
# The kernel answers so where it cannot copy between two filesystems.
_NO_COPY_RANGE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}

Progress = Callable[[int], object]  # is called often, with the number of bytes done


@dataclass(frozen=True, slots=True)
class Link:
    """A box of a stored tensor, and the box of the target tensor that gets its elements."""

    stored: StoredTensor
    box: Box
    target_box: Box


@dataclass(frozen=True, slots=True)
class Source:
    """A box of a stored chunk, and the box of the target that gets its elements."""

    chunk: Chunk
    dtype: str
    box: Box
    target_box: Box


@dataclass(frozen=True, slots=True)
class Fill:
    """A tensor of the target; the boxes of its sources cover it exactly once."""

    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    def ranges(self) -> list[tuple[Path, int, int]] | None:
        """(file, first byte, number of bytes) in the order of the target.

        None where rows do not move whole, or the dtype changes.
        """
        row_bytes = prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]
        found = []
        for source in sorted(self.sources, key=_first_target_row):
            chunk = source.chunk
            taken_columns = box_shape(source.box)[1:]
            whole_rows = taken_columns == chunk.shape[1:] == self.shape[1:]
            if source.dtype != self.dtype or not whole_rows:
                return None
            rows = source.box[0] if source.box else slice(0, 1)
            first_byte = chunk.offset + rows.start * row_bytes
            num_bytes = (rows.stop - rows.start) * row_bytes
            found.append((chunk.file, first_byte, num_bytes))
        return found


def _first_target_row(source: Source) -> int:
    return source.target_box[0].start if source.target_box else 0


def box_shape(box: Box) -> tuple[int, ...]:
    return tuple(extent.stop - extent.start for extent in box)


@dataclass(frozen=True, slots=True)
class TargetFile:
    name: str
    content: tuple[bytes | Fill, ...]

    @property
    def num_bytes(self) -> int:
        total = 0
        for item in self.content:
            total += len(item) if isinstance(item, bytes) else item.num_bytes
        return total


def fill(
    name: str, dtype: str, start: Sequence[int], shape: Sequence[int], links: Iterable[Link]
) -> Fill:
    """The box at `start`, of size `shape`, of the tensor that `links` describe.

    Raises RunError naming the tensor `name` where the links do not cover the box exactly
    once, or `dtype` cannot be made of theirs.
    """
    sources: list[Source] = []
    for link in links:
        stored = link.stored
        castable = stored.dtype in CAST and dtype in CAST
        if stored.dtype != dtype and not castable:
            file = stored.chunks[0].file
            raise RunError(
                f"{file}: {name} is {stored.dtype}; {dtype} is made of {sorted(CAST)} only"
            )
        for chunk in stored.chunks:
            source = _overlap(link, chunk, start, shape)
            if source is not None:
                sources.append(source)
    covered = sum(prod(box_shape(source.target_box)) for source in sources)
    if covered != prod(shape):
        raise RunError(f"{name}: {covered} of its {prod(shape)} elements have a source")
    return Fill(dtype, tuple(shape), tuple(sources))


def _overlap(link: Link, chunk: Chunk, start: Sequence[int], shape: Sequence[int]) -> Source | None:
    """What a chunk of the link's tensor gives to the box at `start` of size `shape`;
    None: nothing.
    """
    box = []
    target_box = []
    for axis, stored_extent in enumerate(link.box):
        chunk_start = chunk.start[axis]
        chunk_stop = chunk_start + chunk.shape[axis]
        # from a position in the stored tensor to the one in the target tensor
        shift = link.target_box[axis].start - stored_extent.start
        wanted_start = start[axis] - shift
        wanted_stop = wanted_start + shape[axis]
        low = max(stored_extent.start, chunk_start, wanted_start)
        high = min(stored_extent.stop, chunk_stop, wanted_stop)
        if low >= high:
            return None
        box.append(slice(low - chunk_start, high - chunk_start))
        target_box.append(slice(low - wanted_start, high - wanted_start))
    return Source(chunk, link.stored.dtype, tuple(box), tuple(target_box))


class Files(ExitStack):
    """Source files, each opened once; use it as a context manager, or close it."""

    def __init__(self) -> None:
        super().__init__()
        self._descriptors: dict[Path, int] = {}

    def descriptor(self, path: Path) -> int:
        if path not in self._descriptors:
            file = self.enter_context(open(path, "rb", buffering=0))
            self._descriptors[path] = file.fileno()
        return self._descriptors[path]

    def read(self, path: Path, offset: int, view: memoryview) -> None:
        """Fill `view` from byte `offset` on. Raises RunError where the file ends before."""
        done = 0
        while done < len(view):
            count = os.preadv(self.descriptor(path), [view[done:]], offset + done)
            if not count:
                raise RunError(f"{path} has no byte {offset + done}: it was cut while it was read")
            done += count


def blocks(item: Fill, files: Files) -> Iterator[memoryview]:
    """The bytes of `item`, row-major, in blocks of about BLOCK_BYTES; each is valid until
    the next.
    """
    ranges = item.ranges()
    if ranges is None:
        blocks_by_numpy = resolve(_BLOCKS, {}, "blocks")
        yield from blocks_by_numpy(item, files, BLOCK_BYTES)
        return
    buffer = memoryview(bytearray(min(BLOCK_BYTES, item.num_bytes)))
    for path, offset, num_bytes in ranges:
        for done in range(0, num_bytes, BLOCK_BYTES):
            view = buffer[: min(BLOCK_BYTES, num_bytes - done)]
            files.read(path, offset + done, view)
            yield view


def same(one: Fill, other: Fill) -> bool:
    """Whether both have the same dtype, shape and bits."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with Files() as files:
        blocks_of_one = blocks(one, files)
        blocks_of_other = blocks(other, files)
        rest_of_one = memoryview(b"")
        rest_of_other = memoryview(b"")
        left = one.num_bytes
        while left:
            rest_of_one = rest_of_one or next(blocks_of_one)
            rest_of_other = rest_of_other or next(blocks_of_other)
            count = min(len(rest_of_one), len(rest_of_other))
            # bytes are compared by memcmp, views element by element
            if rest_of_one[:count].tobytes() != rest_of_other[:count].tobytes():
                return False
            rest_of_one = rest_of_one[count:]
            rest_of_other = rest_of_other[count:]
            left -= count
        return True


def write(target: TargetFile, directory: Path, *, checksum: bool, progress: Progress) -> str | None:
    """Write the file, force it to disk, and return its XXH3-128; None without `checksum`.

    An exception that `progress` raises ends the copy.
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
    if digest is None:
        return None
    return digest.hexdigest()


def _copy_rows(item: Fill, files: Files, out: int, position: int, progress: Progress) -> None:
    """Copy whole rows within the kernel, or through memory where these filesystems do not
    allow it.
    """
    for path, offset, num_bytes in item.ranges() or ():
        stop = position + num_bytes
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
            offset += count
            position += count
            progress(count)


def _write_all(out: int, data: bytes | memoryview, position: int) -> None:
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(out, view[done:], position + done)
