"""Safetensors headers and the streaming writer, against the safetensors library itself."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nanoslime.storage.safetensors_file import (
    plan_files,
    read_headers,
)
from nanoslime.types import RunError
from tools.conversion.stream import write_files

TENSORS = {
    "embed": np.arange(12, dtype=np.float32).reshape(3, 4),
    "empty": np.zeros((0, 4), dtype=np.float16),
    "scalar": np.array(7, dtype=np.int64),
    "bytes": np.arange(5, dtype=np.uint8),
}
DTYPES = {"embed": "F32", "empty": "F16", "scalar": "I64", "bytes": "U8"}


def write(directory: Path, max_shard_bytes: int = 1 << 30) -> None:
    declared = [(name, DTYPES[name], array.shape) for name, array in TENSORS.items()]
    write_files(directory, declared, TENSORS.items(), max_shard_bytes)


@pytest.mark.parametrize(("max_shard_bytes", "files"), [(1 << 30, 1), (20, 2), (1, 4)])
def test_what_is_written_loads_in_the_library(
    tmp_path: Path, max_shard_bytes: int, files: int
) -> None:
    write(tmp_path, max_shard_bytes)
    shards = sorted(tmp_path.glob("*.safetensors"))
    loaded = {}
    for shard in shards:
        loaded.update(load_file(shard))
    assert len(shards) == files
    assert loaded.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype
    assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)
    with safe_open(shards[0], "np") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it


def test_headers_tell_where_each_tensor_lies(tmp_path: Path) -> None:
    write(tmp_path, max_shard_bytes=20)
    headers = read_headers(tmp_path)
    assert headers.keys() == TENSORS.keys()
    for name, info in headers.items():
        assert (info.dtype, info.shape) == (DTYPES[name], TENSORS[name].shape)
        with open(info.file, "rb") as file:
            file.seek(info.start)
            assert file.read(info.stop - info.start) == TENSORS[name].tobytes()


def test_headers_of_the_librarys_own_files(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    shapes = {name: info.shape for name, info in read_headers(tmp_path).items()}
    assert shapes == {name: array.shape for name, array in TENSORS.items()}


def edit_header(file: Path, old: str, new: str) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].decode()
    tensors = data[8 + length :]
    assert old in header
    header = header.replace(old, new, 1)
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode() + tensors)


def truncate(file: Path, count: int) -> None:
    file.write_bytes(file.read_bytes()[:-count])


def edit_index(folder: Path, name: str, file: str | None) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].pop(name, None)
    if file:
        index["weight_map"][name] = file
    path.write_text(json.dumps(index))


FIRST = "model-00001-of-00002.safetensors"
DAMAGES = {
    "a shard is missing": (lambda d: (d / FIRST).unlink(), [FIRST, "missing"]),
    "a shard is truncated": (lambda d: truncate(d / FIRST, 1), [FIRST, "truncated"]),
    "a shard is empty": (lambda d: (d / FIRST).write_bytes(b""), [FIRST, "truncated"]),
    "a shard is a pointer file": (
        lambda d: (d / FIRST).write_bytes(b"version https://git-lfs"),
        [FIRST],
    ),
    "header is not JSON": (
        lambda d: edit_header(d / FIRST, '{"__meta', '{"__meta"'),
        [FIRST, "header"],
    ),
    "unknown dtype": (lambda d: edit_header(d / FIRST, '"F32"', '"F33"'), [FIRST, "F33"]),
    "shape contradicts bytes": (
        lambda d: edit_header(d / FIRST, "[3,4]", "[3,5]"),
        [FIRST, "embed"],
    ),
    "a hole": (lambda d: edit_header(d / FIRST, "[0,48]", "[8,48]"), [FIRST, "embed", "hole"]),
    "index lists too much": (lambda d: edit_index(d, "ghost", FIRST), [FIRST, "ghost"]),
    "index lists too little": (lambda d: edit_index(d, "bytes", None), ["bytes", "does not list"]),
    "nothing there": (lambda d: [f.unlink() for f in d.iterdir()], ["neither"]),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, case: str) -> None:
    damage, words = DAMAGES[case]
    write(tmp_path, max_shard_bytes=20)
    damage(tmp_path)
    with pytest.raises(RunError) as error:
        read_headers(tmp_path)
    assert all(word in str(error.value) for word in words), error.value


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}, file)
    edit_header(file, "[8,16]", "[4,12]")
    with pytest.raises(RunError, match="overlap"):
        read_headers(tmp_path)


def test_the_writer_refuses_tensors_that_differ_from_the_declared(tmp_path: Path) -> None:
    declared = [("a", "F32", (2,)), ("b", "F32", (2,))]
    with pytest.raises(ValueError, match="b was handed over where a is next"):
        write_files(tmp_path, declared, [("b", bytes(8))])
    with pytest.raises(ValueError, match="7 bytes.*declare 8"):
        write_files(tmp_path, declared, [("a", bytes(7))])
    with pytest.raises(ValueError, match="no further tensor was handed over where b is next"):
        write_files(tmp_path, declared, [("a", bytes(8))])
    with pytest.raises(ValueError, match="c was handed over after the last"):
        write_files(tmp_path, declared, [(name, bytes(8)) for name in "abc"])


def test_wrong_declarations_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        plan_files([("a", "F32", (2,)), ("a", "F32", (2,))])
    with pytest.raises(ValueError, match="without tensors"):
        plan_files([])
    with pytest.raises(ValueError, match="float32"):
        plan_files([("a", "float32", (2,))])
