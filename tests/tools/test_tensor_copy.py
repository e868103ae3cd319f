"""Boxes of stored tensors into files: against numpy, in tiny blocks, and where the kernel refuses."""

import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from nanoslime.types import RunError
from tools.conversion import tensor_blocks, tensor_copy
from tools.conversion.tensor_copy import Fill, Link, TargetFile, fill, same, write
from tools.conversion.torch_dist import Chunk, StoredTensor

DTYPES = {"F32": np.dtype("u4"), "BF16": np.dtype("u2"), "F64": np.dtype("u8")}


def intervals(rng: random.Random, length: int) -> list[tuple[int, int]]:
    """`length` cut at random places: (start, size)."""
    cuts = sorted({0, length, *(rng.randrange(length + 1) for _ in range(rng.randrange(3)))})
    return [(a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]


def store(
    rng: random.Random, file: Path, dtype: str, shape: tuple[int, ...]
) -> tuple[StoredTensor, np.ndarray]:
    """A random tensor, in random chunks of rows and columns with gaps between them in the file."""
    array = np.frombuffer(
        rng.randbytes(int(np.prod(shape)) * DTYPES[dtype].itemsize), DTYPES[dtype]
    ).reshape(shape)
    grid = [intervals(rng, n) if axis < 2 else [(0, n)] for axis, n in enumerate(shape)]
    boxes = [[]]
    for axis in grid:
        boxes = [[*box, side] for box in boxes for side in axis]
    chunks = []
    with open(file, "ab") as out:
        for box in boxes:
            out.write(rng.randbytes(rng.randrange(9)))
            start, size = (tuple(side[i] for side in box) for i in (0, 1))
            chunks.append(Chunk(start, size, file, out.tell()))
            out.write(array[tuple(slice(a, a + n) for a, n in box)].tobytes())
    return StoredTensor(dtype, shape, tuple(chunks)), array


def random_target(rng: random.Random, directory: Path) -> tuple[np.ndarray, list[Link], str]:
    """A tensor of one to three dimensions, its rows from several others at random; and the links to them."""
    dtype, rest = (
        rng.choice(list(DTYPES)),
        tuple(rng.randrange(1, 9) for _ in range(rng.randrange(3))),
    )
    links: list[Link] = []
    if rest and rng.random() < 0.3:  # columns from two tensors of one shape
        shape, at = (rng.randrange(1, 9), *rest), rng.randrange(rest[0] + 1)
        (one, left), (other, right) = (
            store(rng, directory / f"source{i}", dtype, shape) for i in (0, 1)
        )
        for stored, columns in ((one, slice(0, at)), (other, slice(at, rest[0]))):
            box = (slice(0, shape[0]), columns, *(slice(0, n) for n in rest[1:]))
            links.append((stored, box, box))
        return np.concatenate([left[:, :at], right[:, at:]], axis=1), links, dtype
    parts, row = [], 0
    for number in range(rng.randrange(1, 4)):
        shape = (rng.randrange(1, 9), *rest)
        stored, array = store(rng, directory / f"source{number % 2}", dtype, shape)
        first = rng.randrange(shape[0])
        size = rng.randrange(1, shape[0] - first + 1)
        outer = tuple(slice(0, n) for n in rest)
        links.append(
            (stored, (slice(first, first + size), *outer), (slice(row, row + size), *outer))
        )
        parts.append(array[first : first + size])
        row += size
    rng.shuffle(links)
    return np.concatenate(parts), links, dtype


@pytest.mark.parametrize("block_bytes", [16, 100, 8 << 20])
def test_random_boxes_against_numpy(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(tensor_copy, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(tensor_copy, "_KERNEL_BYTES", block_bytes)
    rng, moved = random.Random(block_bytes), set()
    for case in range(60):
        directory = tmp_path / str(case)
        directory.mkdir()
        array, links, dtype = random_target(rng, directory)
        grid = [intervals(rng, n) if axis < 2 else [(0, n)] for axis, n in enumerate(array.shape)]
        start = tuple(rng.choice(axis) for axis in grid)
        box = tuple(slice(a, a + n) for a, n in start)
        item = fill("x", dtype, [a for a, _ in start], [n for _, n in start], links)
        expected = array[box].tobytes()
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
        moved.add(item.ranges() is not None)
    assert moved == {True, False}


@pytest.mark.parametrize("block_bytes", [16, 8 << 20])
def test_sameness_is_of_every_bit(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(tensor_copy, "BLOCK_BYTES", block_bytes)
    rng = random.Random(5)
    one, array = store(rng, tmp_path / "one", "F32", (9, 7))
    with open(tmp_path / "other", "wb") as file:
        file.write(array.tobytes())
    other = StoredTensor("F32", (9, 7), (Chunk((0, 0), (9, 7), tmp_path / "other", 0),))
    box = (slice(0, 9), slice(0, 7))

    def filled(stored: StoredTensor) -> Fill:
        return fill("x", stored.dtype, (0, 0), stored.shape, [(stored, box, box)])

    assert same(filled(one), filled(other))
    for place in (0, 100, 9 * 7 * 4 - 1):
        content = bytearray(array.tobytes())
        content[place] ^= 1
        (tmp_path / "other").write_bytes(content)
        assert not same(filled(one), filled(other))
    (tmp_path / "other").write_bytes(array.tobytes())
    assert not same(filled(one), Fill("F32", (7, 9), filled(other).sources))


def one_row(tmp_path: Path, size: int) -> TargetFile:
    (tmp_path / "source").write_bytes(random.Random(0).randbytes(size))
    chunk = Chunk((0,), (size // 2,), tmp_path / "source", 0)
    box = (slice(0, size // 2),)
    return TargetFile(
        "t",
        (
            fill(
                "x",
                "BF16",
                (0,),
                (size // 2,),
                [(StoredTensor("BF16", (size // 2,), (chunk,)), box, box)],
            ),
        ),
    )


@pytest.mark.parametrize("number", ["EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP"])
def test_where_the_kernel_does_not_copy_the_bytes_go_through_memory(tmp_path, monkeypatch, number):
    monkeypatch.setattr(tensor_copy, "BLOCK_BYTES", 1000)
    target, real, calls = one_row(tmp_path, 10_000), os.copy_file_range, []

    def copy_file_range(*arguments: int) -> int:
        calls.append(arguments)
        if len(calls) % 2:  # also in the middle of a block
            return real(*arguments[:2], min(300, arguments[2]), *arguments[3:])
        raise OSError(getattr(errno, number), "not for these files")

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    counts: list[int] = []
    assert write(target, tmp_path, checksum=False, progress=counts.append) is None
    assert (tmp_path / "t").read_bytes() == (tmp_path / "source").read_bytes() and len(calls) >= 15
    assert sum(counts) == 10_000


@pytest.mark.parametrize("number", ["ENOSPC", "EIO", "EDQUOT"])
def test_other_refusals_are_errors(tmp_path, monkeypatch, number):
    def copy_file_range(*arguments: int) -> int:
        raise OSError(getattr(errno, number), "really")

    monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    with pytest.raises(OSError, match="really"):
        write(one_row(tmp_path, 100), tmp_path, checksum=False, progress=lambda count: None)


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_a_source_that_is_too_short_is_named(tmp_path, monkeypatch, refused, columns, checksum):
    if refused:

        def copy_file_range(*arguments: int) -> int:
            raise OSError(errno.EXDEV, "other filesystem")

        monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    (tmp_path / "source").write_bytes(bytes(99))
    stored = StoredTensor("BF16", (5, 10), (Chunk((0, 0), (5, 10), tmp_path / "source", 0),))
    rows, taken = slice(0, 5), slice(0, 5 if columns else 10)
    item = fill("x", "BF16", (0, 0), (5, taken.stop), [(stored, (rows, taken), (rows, taken))])
    assert (item.ranges() is None) == columns
    with pytest.raises(RunError, match=r"source has no byte 99: it was cut while it was read"):
        write(TargetFile("t", (item,)), tmp_path, checksum=checksum, progress=lambda count: None)


def test_what_is_not_covered_is_named(tmp_path):
    stored, _ = store(random.Random(0), tmp_path / "source", "F32", (4, 6))
    box = (slice(0, 4), slice(0, 6))
    with pytest.raises(RunError, match="x.weight: 24 of its 30 elements have a source"):
        fill("x.weight", "F32", (0, 0), (5, 6), [(stored, box, box)])
    with pytest.raises(RunError, match="x.weight: 48 of its 24 elements"):
        fill("x.weight", "F32", (0, 0), (4, 6), [(stored, box, box)] * 2)
    with pytest.raises(
        RunError, match=r"source: x.weight is F64; BF16 is made of \['BF16', 'F16', 'F32'\] only"
    ):
        fill(
            "x.weight",
            "BF16",
            (0,),
            (2,),
            [
                (
                    store(random.Random(1), tmp_path / "source", "F64", (2,))[0],
                    (slice(0, 2),),
                    (slice(0, 2),),
                )
            ],
        )


TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("source, target", [(a, b) for a in TORCH for b in TORCH])
def test_casts_are_those_of_torch(source, target):
    """Every number of 16 bits; of 32 bits those around them, where rounding is decided, and random ones."""
    width = 4 if source == "F32" else 2
    bits = np.arange(1 << 16, dtype=np.uint16)
    if source == "F32":
        high = bits.astype(np.uint32) << 16
        rng = np.random.default_rng(0)
        low = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001]
        bits = np.concatenate(
            [*(high | n for n in low), rng.integers(0, 1 << 32, 1 << 16, np.uint32)]
        )
    numbers = torch.from_numpy(bits.view(f"i{width}").copy()).view(TORCH[source])
    expected = numbers.to(TORCH[target])
    fits = (
        ~(expected.isinf() & ~numbers.isinf())
        if target == "F16"
        else torch.ones_like(numbers, dtype=bool)
    )
    numbers, bits, expected = numbers[fits], bits[fits.numpy()], expected[fits]
    found = tensor_blocks.cast(bits, source, target)
    got = torch.from_numpy(found.view(f"i{found.itemsize}").copy()).view(TORCH[target])
    nan = numbers.isnan()
    assert torch.equal(got.isnan(), nan) and nan.any()
    kind = torch.int32 if target == "F32" else torch.int16
    assert torch.equal(got[~nan].view(kind), expected[~nan].view(kind))
    if source == target:
        assert np.array_equal(found, bits)
    if not fits.all():
        large = np.array([0x7F7F0000], np.uint32) if width == 4 else np.array([0x7F7F], np.uint16)
        with pytest.raises(RunError, match=f"a {source} number is beyond the range of F16"):
            tensor_blocks.cast(large, source, target)
