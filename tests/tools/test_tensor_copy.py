"""Boxes of stored tensors into files: against numpy, in tiny blocks, where the kernel refuses."""

import errno
import os
import random
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from nanoslime.models.rules import Box
from nanoslime.types import RunError
from tools.conversion import tensor_blocks, tensor_copy
from tools.conversion.tensor_copy import Fill, Link, TargetFile, fill, same, write
from tools.conversion.torch_dist import Chunk, StoredTensor

DTYPES = {"F32": np.dtype("u4"), "BF16": np.dtype("u2"), "F64": np.dtype("u8")}


def random_intervals(rng: random.Random, length: int) -> list[tuple[int, int]]:
    """(start, size) of the intervals between random cuts of `length`."""
    cuts = {0, length}
    for _ in range(rng.randrange(3)):
        cuts.add(rng.randrange(length + 1))
    return [(start, stop - start) for start, stop in pairwise(sorted(cuts))]


def random_grid(rng: random.Random, shape: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    """Random intervals of the first two axes; the axes after them are whole."""
    grid = []
    for axis, length in enumerate(shape):
        grid.append(random_intervals(rng, length) if axis < 2 else [(0, length)])
    return grid


def box_of(extents: list[tuple[int, int]]) -> Box:
    return tuple(slice(start, start + size) for start, size in extents)


def store(
    rng: random.Random, file: Path, dtype: str, shape: tuple[int, ...]
) -> tuple[StoredTensor, np.ndarray]:
    """A random tensor, in random chunks of rows and columns with gaps between them in the file."""
    num_bytes = int(np.prod(shape)) * DTYPES[dtype].itemsize
    array = np.frombuffer(rng.randbytes(num_bytes), DTYPES[dtype]).reshape(shape)
    chunks = []
    with open(file, "ab") as out:
        for extents in product(*random_grid(rng, shape)):
            out.write(rng.randbytes(rng.randrange(9)))
            start = tuple(first for first, _ in extents)
            chunk_shape = tuple(size for _, size in extents)
            chunks.append(Chunk(start, chunk_shape, file, out.tell()))
            out.write(array[box_of(extents)].tobytes())
    return StoredTensor(dtype, shape, tuple(chunks)), array


def whole(sizes: tuple[int, ...]) -> Box:
    return tuple(slice(0, size) for size in sizes)


def columns_of_two(
    rng: random.Random, directory: Path, dtype: str, inner: tuple[int, ...]
) -> tuple[np.ndarray, list[Link]]:
    """A tensor whose columns come from two tensors of one shape."""
    shape = (rng.randrange(1, 9), *inner)
    cut = rng.randrange(inner[0] + 1)
    left_stored, left = store(rng, directory / "source0", dtype, shape)
    right_stored, right = store(rng, directory / "source1", dtype, shape)
    links = []
    for stored, columns in ((left_stored, slice(0, cut)), (right_stored, slice(cut, inner[0]))):
        box = (slice(0, shape[0]), columns, *whole(inner[1:]))
        links.append(Link(stored, box, box))
    return np.concatenate([left[:, :cut], right[:, cut:]], axis=1), links


def rows_of_several(
    rng: random.Random, directory: Path, dtype: str, inner: tuple[int, ...]
) -> tuple[np.ndarray, list[Link]]:
    """A tensor whose rows come from up to three tensors."""
    taken = []
    links = []
    row = 0
    for number in range(rng.randrange(1, 4)):
        shape = (rng.randrange(1, 9), *inner)
        stored, array = store(rng, directory / f"source{number % 2}", dtype, shape)
        first = rng.randrange(shape[0])
        size = rng.randrange(1, shape[0] - first + 1)
        box = (slice(first, first + size), *whole(inner))
        target_box = (slice(row, row + size), *whole(inner))
        links.append(Link(stored, box, target_box))
        taken.append(array[first : first + size])
        row += size
    rng.shuffle(links)
    return np.concatenate(taken), links


def random_target(rng: random.Random, directory: Path) -> tuple[np.ndarray, list[Link], str]:
    """A tensor of one to three dimensions, the links that fill it, and its dtype."""
    dtype = rng.choice(list(DTYPES))
    inner = tuple(rng.randrange(1, 9) for _ in range(rng.randrange(3)))
    if inner and rng.random() < 0.3:
        array, links = columns_of_two(rng, directory, dtype, inner)
    else:
        array, links = rows_of_several(rng, directory, dtype, inner)
    return array, links, dtype


@pytest.mark.parametrize("block_bytes", [16, 100, 8 << 20])
def test_random_boxes_against_numpy(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(tensor_copy, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(tensor_copy, "_KERNEL_BYTES", block_bytes)
    rng = random.Random(block_bytes)
    moved_as_rows = set()
    for case in range(60):
        directory = tmp_path / str(case)
        directory.mkdir()
        array, links, dtype = random_target(rng, directory)
        extents = [rng.choice(intervals) for intervals in random_grid(rng, array.shape)]
        start = [first for first, _ in extents]
        shape = [size for _, size in extents]
        item = fill("x", dtype, start, shape, links)
        expected = array[box_of(extents)].tobytes()
        counts: list[int] = []
        target = TargetFile("target", (b"head", item, b"tail", item))
        digest = write(target, directory, checksum=True, progress=counts.append)
        content = (directory / "target").read_bytes()
        assert content == b"head" + expected + b"tail" + expected
        assert digest == xxhash.xxh3_128(content).hexdigest()
        assert sum(counts) == target.num_bytes == len(content)
        with tensor_copy.Files() as files:
            assert b"".join(bytes(view) for view in tensor_copy.blocks(item, files)) == expected
        assert write(target, directory, checksum=False, progress=counts.append) is None
        assert (directory / "target").read_bytes() == content
        moved_as_rows.add(item.ranges() is not None)
    assert moved_as_rows == {True, False}


@pytest.mark.parametrize("block_bytes", [16, 8 << 20])
def test_sameness_is_of_every_bit(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(tensor_copy, "BLOCK_BYTES", block_bytes)
    one, array = store(random.Random(5), tmp_path / "one", "F32", (9, 7))
    good = array.tobytes()
    (tmp_path / "other").write_bytes(good)
    other = StoredTensor("F32", (9, 7), (Chunk((0, 0), (9, 7), tmp_path / "other", 0),))
    box = whole((9, 7))

    def filled(stored: StoredTensor) -> Fill:
        return fill("x", stored.dtype, (0, 0), stored.shape, [Link(stored, box, box)])

    assert same(filled(one), filled(other))
    for place in (0, 100, len(good) - 1):
        bad = bytearray(good)
        bad[place] ^= 1
        (tmp_path / "other").write_bytes(bad)
        assert not same(filled(one), filled(other))
    (tmp_path / "other").write_bytes(good)
    assert not same(filled(one), Fill("F32", (7, 9), filled(other).sources))


def one_row(directory: Path, size: int) -> TargetFile:
    """A file of `size` bytes that are those of the file `source`."""
    (directory / "source").write_bytes(random.Random(0).randbytes(size))
    shape = (size // 2,)
    stored = StoredTensor("BF16", shape, (Chunk((0,), shape, directory / "source", 0),))
    link = Link(stored, whole(shape), whole(shape))
    return TargetFile("target", (fill("x", "BF16", (0,), shape, [link]),))


def ignore(num_bytes: int) -> None:
    pass


@pytest.mark.parametrize("number", ["EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP"])
def test_where_the_kernel_does_not_copy_the_bytes_go_through_memory(tmp_path, monkeypatch, number):
    monkeypatch.setattr(tensor_copy, "BLOCK_BYTES", 1000)
    target = one_row(tmp_path, 10_000)
    copy_in_kernel = os.copy_file_range
    calls = []

    def copy_file_range(source: int, out: int, count: int, *offsets: int) -> int:
        calls.append(count)
        if len(calls) % 2:  # refused also in the middle of a block
            return copy_in_kernel(source, out, min(300, count), *offsets)
        raise OSError(getattr(errno, number), "not for these files")

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    counts: list[int] = []
    assert write(target, tmp_path, checksum=False, progress=counts.append) is None
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()
    assert len(calls) >= 15
    assert sum(counts) == 10_000


@pytest.mark.parametrize("number", ["ENOSPC", "EIO", "EDQUOT"])
def test_other_refusals_are_errors(tmp_path, monkeypatch, number):
    def copy_file_range(*arguments: int) -> int:
        raise OSError(getattr(errno, number), "really")

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    with pytest.raises(OSError, match="really"):
        write(one_row(tmp_path, 100), tmp_path, checksum=False, progress=ignore)


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("columns", [5, 10])
def test_a_source_that_is_too_short_is_named(tmp_path, monkeypatch, refused, columns, checksum):
    if refused:

        def copy_file_range(*arguments: int) -> int:
            raise OSError(errno.EXDEV, "other filesystem")

        monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    (tmp_path / "source").write_bytes(bytes(99))
    stored = StoredTensor("BF16", (5, 10), (Chunk((0, 0), (5, 10), tmp_path / "source", 0),))
    box = whole((5, columns))
    item = fill("x", "BF16", (0, 0), (5, columns), [Link(stored, box, box)])
    assert (item.ranges() is None) == (columns == 5)
    with pytest.raises(RunError, match=r"source has no byte 99: it was cut while it was read"):
        write(TargetFile("target", (item,)), tmp_path, checksum=checksum, progress=ignore)


def test_elements_that_are_not_covered_once_are_named(tmp_path):
    stored, _ = store(random.Random(0), tmp_path / "source", "F32", (4, 6))
    link = Link(stored, whole((4, 6)), whole((4, 6)))
    with pytest.raises(RunError, match="x.weight: 24 of its 30 elements have a source"):
        fill("x.weight", "F32", (0, 0), (5, 6), [link])
    with pytest.raises(RunError, match="x.weight: 48 of its 24 elements"):
        fill("x.weight", "F32", (0, 0), (4, 6), [link, link])


def test_a_dtype_that_cannot_be_made_is_named(tmp_path):
    stored, _ = store(random.Random(1), tmp_path / "source", "F64", (2,))
    link = Link(stored, whole((2,)), whole((2,)))
    message = r"source: x.weight is F64; BF16 is made of \['BF16', 'F16', 'F32'\] only"
    with pytest.raises(RunError, match=message):
        fill("x.weight", "BF16", (0,), (2,), [link])


TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def interesting_bits(dtype: str) -> np.ndarray:
    """Every number of 16 bits; of 32 bits numbers where rounding is decided, and random ones."""
    upper_halves = np.arange(1 << 16, dtype=np.uint16)
    if dtype != "F32":
        return upper_halves
    shifted = upper_halves.astype(np.uint32) << 16
    near_ties = [
        0,
        1,
        0x7FFF,
        0x8000,
        0x8001,
        0xFFFF,
        0x0FFF,
        0x1000,
        0x1001,
        0x2FFF,
        0x3000,
        0x3001,
    ]
    anywhere = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, np.uint32)
    return np.concatenate([*(shifted | lower_half for lower_half in near_ties), anywhere])


def as_torch(bits: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(bits.view(f"i{bits.itemsize}").copy()).view(TORCH[dtype])


@pytest.mark.parametrize("source", TORCH)
@pytest.mark.parametrize("target", TORCH)
def test_casts_are_those_of_torch(source, target):
    bits = interesting_bits(source)
    numbers = as_torch(bits, source)
    expected = numbers.to(TORCH[target])
    if target == "F16":
        fits = ~(expected.isinf() & ~numbers.isinf())
        bits = bits[fits.numpy()]
        numbers = numbers[fits]
        expected = expected[fits]
    found = tensor_blocks.cast(bits, source, target)
    if source == target:
        assert np.array_equal(found, bits)
    found_numbers = as_torch(found, target)
    nan = numbers.isnan()
    assert torch.equal(found_numbers.isnan(), nan) and nan.any()
    kind = torch.int32 if target == "F32" else torch.int16
    assert torch.equal(found_numbers[~nan].view(kind), expected[~nan].view(kind))


@pytest.mark.parametrize("source, largest", [("F32", 0x7F7F0000), ("BF16", 0x7F7F)])
def test_a_number_beyond_f16_is_refused(source, largest):
    bits = np.array([largest], DTYPES[source])
    with pytest.raises(RunError, match=f"a {source} number is beyond the range of F16"):
        tensor_blocks.cast(bits, source, "F16")
