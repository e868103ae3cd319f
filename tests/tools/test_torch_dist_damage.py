"""Damaged and hostile torch_dist files are refused, and the file and the tensor are named."""

import argparse
import io
import os
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools.checkpoints import (
    COMMON_FILE,
    COMMON_OBJECT,
    FORMS,
    HOSTILE_CALL,
    Extents,
    read_stock_metadata,
)
from tests.tools.torch_dist_files import (
    PINWHEEL,
    SQUARE,
    TENSORS,
    stock_save,
    write,
)
from tools.conversion import torch_dist, torch_pickle
from tools.conversion.torch_dist import StoredObject, StoredTensor, TorchDistError


def archived(pickled: bytes) -> bytes:
    """A container of torch.save that holds this pickle and no tensor."""
    return b"".join(torch_pickle.archive(pickled))


def put_common(directory: Path, pickled: bytes, form: str) -> None:
    """Make this pickle the common state of a directory without tensors."""
    container = archived(pickled)
    if form == COMMON_FILE:
        torch_dist.write_metadata(directory, {}, {})
        (directory / "common.pt").write_bytes(container)
        return
    file = directory / "__0_0.distcp"
    file.write_bytes(container)
    stored = StoredObject(file, 0, len(container))
    torch_dist.write_metadata(directory, {}, {torch_dist.COMMON_KEY: stored})


COMMON_PLACE = {
    COMMON_FILE: r"common\.pt",
    COMMON_OBJECT: r"__0_0\.distcp: common_state/shard_0_1",
}


def test_a_malicious_metadata_is_refused(tmp_path: Path, evil: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(evil)
    message = rf"\.metadata: its pickle names {HOSTILE_CALL}, .*refused"
    with pytest.raises(TorchDistError, match=message):
        torch_dist.read(tmp_path)


def test_a_malicious_chunk_is_refused(tmp_path: Path, evil: bytes) -> None:
    write(tmp_path, {"weight": TENSORS["bf16"]})
    head, tail = torch_pickle.tensor_container("BF16", (3, 4))
    length = len(head) + TENSORS["bf16"].nbytes + len(tail)
    with open(tmp_path / "__0_0.distcp", "r+b") as file:
        file.write(archived(evil).rjust(length, b" "))
    with pytest.raises(
        TorchDistError, match=rf"__0_0\.distcp: weight: .* {HOSTILE_CALL}, .*refused"
    ):
        torch_dist.read(tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_a_malicious_common_state_is_refused(tmp_path: Path, evil: bytes, form: str) -> None:
    put_common(tmp_path, evil, form)
    message = rf"{COMMON_PLACE[form]}: its pickle names {HOSTILE_CALL}, .*refused"
    with pytest.raises(TorchDistError, match=message):
        torch_dist.read(tmp_path).read_common()


@pytest.mark.parametrize("form", FORMS)
def test_other_objects_in_the_common_state_are_inert(tmp_path: Path, form: str) -> None:
    common: Any = {"args": argparse.Namespace(call=Fraction(1, 3), kind=getattr)}
    if form == COMMON_OBJECT:
        common = [common]
    put_common(tmp_path, pickle.dumps(common, 2), form)
    value = torch_dist.read(tmp_path).read_common()["args"]
    assert type(value.call).__name__ == "Fraction" and value.call.args == (1, 3)
    assert value.kind.__name__ == "getattr" and value.kind is not getattr


@pytest.mark.parametrize("form", FORMS)
def test_a_common_state_that_is_no_dictionary_is_refused(tmp_path: Path, form: str) -> None:
    for value, message in ((3, "holds a int"), ([3], "holds a (list|int), not a dictionary")):
        put_common(tmp_path, pickle.dumps(value, 2), form)
        with pytest.raises(TorchDistError, match=rf"{COMMON_PLACE[form]}: it {message}"):
            torch_dist.read(tmp_path).read_common()


def test_a_missing_common_state_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"weight": TENSORS["bf16"]}, form=COMMON_FILE)
    (tmp_path / "common.pt").unlink()
    message = r"common\.pt is missing, and \.metadata has no common_state/shard_0_1: .* no whole"
    with pytest.raises(TorchDistError, match=message):
        torch_dist.read(tmp_path).read_common()


def truncate(directory: Path) -> None:
    file = directory / "__0_0.distcp"
    os.truncate(file, file.stat().st_size - 1)


def overwrite(directory: Path) -> None:
    file = directory / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))


def replace_in(name: str, old: bytes, new: bytes, directory: Path) -> None:
    content = (directory / name).read_bytes()
    assert old in content
    (directory / name).write_bytes(content.replace(old, new))


DAMAGE = {
    "truncated": (truncate, r"__0_0\.distcp: common_state/shard_0_1: truncated"),
    "overwritten": (overwrite, r"__0_0\.distcp: bf16: no container"),
    "missing file": (
        lambda d: (d / "__0_0.distcp").unlink(),
        r"__0_0\.distcp is missing; .* bf16",
    ),
    "missing metadata": (lambda d: (d / ".metadata").unlink(), r"no \.metadata"),
    "cut metadata": (lambda d: os.truncate(d / ".metadata", 900), r"\.metadata is damaged"),
    "no dictionary": (
        lambda d: (d / ".metadata").write_bytes(pickle.dumps(3)),
        r"\.metadata is damaged",
    ),
    "other backend": (lambda d: replace_in("metadata.json", b"torch_dist", b"zarr", d), "zarr"),
    "other version": (lambda d: replace_in("metadata.json", b": 1", b": 2", d), "2}; only"),
    "wrong dtype": (
        lambda d: replace_in(".metadata", b"ctorch\nbfloat16\n", b"ctorch\nfloat16\n", d),
        r"__0_0\.distcp: bf16: it holds \['BF16', \(3, 4\)\], .* \['F16', \(3, 4\)\]",
    ),
    "other container's place": (
        lambda d: replace_in(".metadata", b"K\x03K\x04", b"K\x04K\x03", d),
        r"bf16: it holds \['BF16', \(3, 4\)\], .* \['BF16', \(4, 3\)\]",
    ),
    "outside": (
        lambda d: replace_in(
            ".metadata", b"\x0c\0\0\0__0_0.distcp", b"\x0f\0\0\0../__0_0.distcp", d
        ),
        "outside",
    ),
    "big-endian": (
        lambda d: replace_in("__0_0.distcp", b"little", b"big   ", d),
        "bf16: its bytes are not in little-endian order",
    ),
    "compressed": (
        lambda d: replace_in("__0_0.distcp", b"PK\1\2-\0-\0\0\0\0\0", b"PK\1\2-\0-\0\0\0\x08\0", d),
        "bf16: its container does not hold the record data.pkl as it is",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    write(tmp_path, {key: TENSORS[key] for key in ("bf16", "f32")})
    torch_dist.read(tmp_path)
    damage, message = DAMAGE[kind]
    damage(tmp_path)
    with pytest.raises(TorchDistError, match=message):
        torch_dist.read(tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_another_backend_is_refused_in_both_forms(tmp_path: Path, form: str) -> None:
    write(tmp_path, {"weight": TENSORS["bf16"]}, form=form)
    torch_dist.read(tmp_path)
    replace_in("metadata.json", b"torch_dist", b"zarr", tmp_path)
    with pytest.raises(TorchDistError, match=r"metadata\.json says .*'zarr'.* is read here"):
        torch_dist.read(tmp_path)


def test_another_common_backend_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"weight": TENSORS["bf16"]}, form=COMMON_FILE)
    replace_in("metadata.json", b'"torch"', b'"msgpack"', tmp_path)
    with pytest.raises(TorchDistError, match=r"metadata\.json says .*'msgpack'.* is read here"):
        torch_dist.read(tmp_path)


WRONG: dict[str, list[Extents]] = {
    "hole": PINWHEEL[:3] + PINWHEEL[4:],
    "hole at the end": [((0, 0), (2, 3))],
    "overlap": [((0, 0), (2, 3)), ((1, 0), (2, 3))],
    "overlap and hole of one size": [((0, 0), (2, 2)), ((0, 1), (2, 2)), ((2, 0), (1, 1))],
    "nothing": [],
}


@pytest.mark.parametrize("kind", WRONG)
def test_chunks_that_are_no_partition_are_refused(tmp_path: Path, kind: str) -> None:
    write(tmp_path, {"square": SQUARE}, {"square": WRONG[kind]})
    with pytest.raises(TorchDistError, match="square: the [0-9] chunks .* overlap or leave a hole"):
        torch_dist.read(tmp_path)


def test_a_chunk_of_another_number_of_axes_is_refused(tmp_path: Path) -> None:
    chunks = write(tmp_path, {"square": SQUARE})["square"].chunks
    torch_dist.write_metadata(tmp_path, {"square": StoredTensor("F32", (3,), chunks)}, {})
    message = r"square: its chunk \[3, 3\] has 2 axes, and \[3\] has 1"
    with pytest.raises(TorchDistError, match=message):
        torch_dist.read(tmp_path)


def contained(value: object) -> bytes:
    """What torch.save writes for a value."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


STORED: dict[str, tuple[object, str]] = {
    "transposed": (torch.zeros(4, 4).t()[:, :4], "not contiguous: strides"),
    "part of a storage": (torch.zeros(5, 4)[:4], "is a view: 20 stored, offset 0"),
    "moved in its storage": (torch.zeros(5, 4)[1:], "is a view: 20 stored, offset 4"),
    "two tensors": ([torch.zeros(4, 4)] * 2, "holds a list"),
    "an array": (torch.zeros(4, 4).numpy(), "refused"),
    "other shape": (torch.zeros(2, 8), r"it holds \['F32', \(2, 8\)\]"),
    "parameter": (torch.nn.Parameter(torch.zeros(4, 4)), "refused"),
}


@pytest.mark.parametrize("kind", STORED)
def test_a_chunk_that_is_not_one_plain_tensor_is_refused(tmp_path: Path, kind: str) -> None:
    value, message = STORED[kind]
    stock_save(tmp_path, {"weight": torch.zeros(4, 4)})
    metadata = read_stock_metadata(tmp_path)
    content = contained(value)
    next(iter(metadata.storage_data.values())).length = len(content)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    (tmp_path / "__0_0.distcp").write_bytes(content)
    with pytest.raises(TorchDistError, match=rf"__0_0\.distcp: weight: .*{message}"):
        torch_dist.read(tmp_path)


def test_a_chunk_stored_transformed_is_refused(tmp_path: Path) -> None:
    stock_save(tmp_path, {"weight": torch.zeros(4, 4)})
    metadata = read_stock_metadata(tmp_path)
    next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(TorchDistError, match="weight is stored transformed: .*zstd"):
        torch_dist.read(tmp_path)
