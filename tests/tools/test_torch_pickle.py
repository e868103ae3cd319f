"""Containers of torch.save, written without torch, against torch itself."""

import io
import zipfile
from pathlib import Path

import pytest
import torch

from tests.tools.checkpoints import (
    same_bits,
)
from tests.tools.torch_dist_files import (
    DTYPES,
    raw,
)
from tools.conversion import torch_pickle
from tools.conversion.torch_dist import TorchDistError


@pytest.mark.parametrize("dtype", sorted(torch_pickle.DTYPES))
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 1, 2, 5)])
def test_a_container_is_what_torch_saves(dtype: str, shape: tuple[int, ...]) -> None:
    ones = torch.ones(shape).to(DTYPES[dtype])
    head, tail = torch_pickle.tensor_container(dtype, shape)
    ours = io.BytesIO(head + raw(ones) + tail)
    theirs = io.BytesIO()
    torch.save(ones, theirs)
    assert len(head) % 64 == 0
    assert same_bits(torch.load(ours, weights_only=True), ones)
    ours.seek(0)
    assert same_bits(torch.load(ours, weights_only=False), ones)
    names = zipfile.ZipFile(theirs).namelist()
    names.remove("archive/.data/serialization_id")  # a hash of the rest, which no reader needs
    assert sorted(zipfile.ZipFile(ours).namelist()) == sorted(names)
    for name in set(names) - {"archive/data.pkl", "archive/data/0"}:
        assert zipfile.ZipFile(ours).read(name) == zipfile.ZipFile(theirs).read(name)


def test_an_empty_object_is_what_megatron_core_saves_for_none() -> None:
    assert torch.load(io.BytesIO(torch_pickle.EMPTY_OBJECT), weights_only=True) == [None]


def test_only_plain_values_become_an_object(tmp_path: Path) -> None:
    with pytest.raises(TorchDistError, match="PosixPath"):
        torch_pickle.object_container([{"path": tmp_path}])
