"""torch_dist without torch, against torch's distributed checkpoint and megatron-core themselves."""

import argparse
import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from nanoslime.training.megatron import cpu_compat
from tools.conversion import torch_dist, torch_pickle
from tools.conversion.torch_dist import Chunk, StoredTensor, TorchDistError

DTYPES = {name: getattr(torch, names[0]) for name, names in torch_pickle.DTYPES.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
TENSORS = {
    "bf16": torch.arange(12.0).reshape(3, 4).bfloat16(),
    "f32": torch.arange(5.0) / 3,
    "f16": torch.arange(8.0).reshape(2, 1, 4).half(),
    "i64": torch.arange(-3, 3),
    "scalar": torch.tensor(2.5),
    "large": torch.arange(70_000, dtype=torch.float64).reshape(700, 100),
    "empty": torch.zeros(0, 3),
    "fp8": torch.arange(8.0).to(torch.float8_e4m3fn),
    "bool": torch.tensor([True, False, True]),
}
Boxes = list[tuple[tuple[int, ...], tuple[int, ...]]]  # (start, shape)


@contextmanager
def one_rank() -> Iterator[None]:
    cpu_compat.install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def box_of(tensor: torch.Tensor, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    return tensor[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]


def write(
    directory: Path,
    tensors: dict[str, torch.Tensor],
    boxes: dict[str, Boxes] | None = None,
    objects: tuple[str, ...] = (),
) -> dict[str, StoredTensor]:
    """As the converter does: head, data, tail, one after the other, then the metadata."""
    stored, file = {}, directory / "__0_0.distcp"
    with open(file, "wb") as out:
        for key, tensor in tensors.items():
            name, chunks, shape = NAMES[tensor.dtype], [], tuple(tensor.shape)
            for start, size in (boxes or {}).get(key, [((0,) * len(shape), shape)]):
                head, tail = torch_dist.container(name, size)
                chunks.append(Chunk(start, size, file, out.tell() + len(head)))
                out.write(head + raw(box_of(tensor, start, size)) + tail)
            stored[key] = StoredTensor(name, shape, tuple(chunks))
        places = {}
        for key in objects:
            places[key] = (file.name, out.tell(), len(torch_pickle.OBJECT_STUB))
            out.write(torch_pickle.OBJECT_STUB)
    torch_dist.write_metadata(directory, stored, places)
    torch_dist.write_common(
        directory, {"iteration": 7, "nested": {"a": [1.5, None, True, "x" * 300]}}
    )
    return stored


def assemble(tensor: StoredTensor) -> torch.Tensor:
    whole = torch.zeros(tensor.shape, dtype=DTYPES[tensor.dtype])
    for chunk in tensor.chunks:
        with open(chunk.file, "rb") as file:
            file.seek(chunk.offset)
            part = box_of(whole, chunk.start, chunk.shape)
            data = bytearray(file.read(part.numel() * part.element_size()))
            part.copy_(torch.frombuffer(data, dtype=whole.dtype).reshape(chunk.shape))
    return whole


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def stock_save(directory: Path, state: dict[str, object]) -> None:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(directory), no_dist=True)


def stock_load(directory: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {key: torch.full_like(tensor, 1) for key, tensor in like.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    return state


@pytest.mark.parametrize("crc", [True, False])
def test_what_torch_saves_is_read(tmp_path: Path, crc: bool) -> None:
    torch.serialization.set_crc32_options(crc)
    try:
        stock_save(tmp_path, {**TENSORS, "nested": {"object": {1, 2}, "b": TENSORS["f32"]}})
    finally:
        torch.serialization.set_crc32_options(True)
    tensors, objects = torch_dist.read(tmp_path)
    assert objects == ["nested.object"]
    assert tensors.keys() == TENSORS.keys() | {"nested.b"}
    for key, tensor in TENSORS.items():
        assert same(assemble(tensors[key]), tensor), key
    some, _ = torch_dist.read(tmp_path, lambda key: key.startswith("f"))
    assert some == {key: tensors[key] for key in ("f32", "f16", "fp8")}


def sharded_state() -> dict[str, object]:
    layers = {
        f"layer{i}": ShardedTensor.from_rank_offsets(
            "layers.weight", torch.full((3, 4), i + 0.5).bfloat16(), (0, i, 3), prepend_axis_num=1
        )
        for i in range(3)
    }
    norm = ShardedTensor.from_rank_offsets("norm", torch.arange(6.0), allow_shape_mismatch=True)
    args = argparse.Namespace(num_layers=3, params_dtype=torch.bfloat16, seed=None)
    extra = ShardedObject("linear._extra_state", None, (1,), (0,))
    return {"layers": layers, "norm": norm, "extra": extra, "args": args, "iteration": 5}


def save_by_megatron_core(directory: str) -> None:
    with one_rank():
        strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy("torch_dist", 1))
        dist_checkpointing.save(sharded_state(), directory, strategy, content_metadata={"a": 1})


@pytest.mark.megatron
def test_what_megatron_core_saves_is_read(tmp_path: Path) -> None:
    """Saved in a process of its own: megatron-core's writers fork, which this one's threads may not stand."""
    call = f"import {__name__} as here; here.save_by_megatron_core({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", call], check=True, timeout=240)
    tensors, objects = torch_dist.read(tmp_path)
    assert objects == ["linear._extra_state/shard_0_1"]
    assert tensors.keys() == {"layers.weight", "norm"}
    assert [chunk.start for chunk in tensors["layers.weight"].chunks] == [
        (0, 0, 0),
        (1, 0, 0),
        (2, 0, 0),
    ]
    expected = torch.tensor([0.5, 1.5, 2.5]).bfloat16()[:, None, None].expand(3, 3, 4)
    assert same(assemble(tensors["layers.weight"]), expected)
    assert same(assemble(tensors["norm"]), torch.arange(6.0))
    common = torch_dist.read_common(tmp_path)
    assert (common["iteration"], common["content_metadata"]) == (5, {"a": 1})
    assert (common["args"].num_layers, common["args"].seed) == (3, None)
    assert common["args"].params_dtype.__name__ == "bfloat16"


@pytest.mark.megatron
def test_megatron_core_loads_what_is_written(tmp_path: Path) -> None:
    tensors = {"layers.weight": torch.randn(3, 3, 4).bfloat16(), "norm": torch.randn(6)}
    rows: Boxes = [((i, j, 0), (1, 1, 4)) for i in range(3) for j in range(3)]
    write(tmp_path, tensors, {"layers.weight": rows}, ("linear._extra_state/shard_0_1",))
    with one_rank():
        loaded = dist_checkpointing.load(sharded_state(), str(tmp_path))
    assert [same(loaded["layers"][f"layer{i}"], tensors["layers.weight"][i]) for i in range(3)] == [
        True
    ] * 3
    assert same(loaded["norm"], tensors["norm"])
    assert loaded["extra"] is None and loaded["iteration"] == 7


@pytest.mark.parametrize("dtype", sorted(torch_pickle.DTYPES))
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 1, 2, 5)])
def test_a_container_is_what_torch_saves(dtype: str, shape: tuple[int, ...]) -> None:
    ones = torch.ones(shape).to(DTYPES[dtype])
    head, tail = torch_dist.container(dtype, shape)
    ours, theirs = io.BytesIO(head + raw(ones) + tail), io.BytesIO()
    torch.save(ones, theirs)
    assert len(head) % 64 == 0
    assert same(torch.load(ours, weights_only=True), ones)
    ours.seek(0)
    assert same(torch.load(ours, weights_only=False), ones)
    names = zipfile.ZipFile(theirs).namelist()
    names.remove("archive/.data/serialization_id")  # a hash of the rest, which no reader needs
    assert sorted(zipfile.ZipFile(ours).namelist()) == sorted(names)
    for name in set(names) - {"archive/data.pkl", "archive/data/0"}:
        assert zipfile.ZipFile(ours).read(name) == zipfile.ZipFile(theirs).read(name)


def test_an_object_stub_is_what_megatron_core_saves_for_none() -> None:
    assert torch.load(io.BytesIO(torch_pickle.OBJECT_STUB), weights_only=True) == [None]


def test_a_round_trip_through_torch_is_bit_exact(tmp_path: Path) -> None:
    grid: Boxes = [((i, j), (350, 25)) for i in (0, 350) for j in range(0, 100, 25)]
    uneven: Boxes = [((0,), (1,)), ((1,), (4,))]
    stored = write(tmp_path, TENSORS, {"large": grid, "f32": uneven}, ("object/shard_0_1",))
    tensors, objects = torch_dist.read(tmp_path)
    assert objects == ["object/shard_0_1"]
    stored["empty"] = StoredTensor("F32", (0, 3), ())
    assert tensors == stored
    loaded = stock_load(tmp_path, TENSORS)
    for key, tensor in TENSORS.items():
        assert same(loaded[key], tensor) and same(assemble(tensors[key]), tensor), key
    common = torch.load(tmp_path / "common.pt", weights_only=True)
    assert common == torch_dist.read_common(tmp_path)
    assert common == {"iteration": 7, "nested": {"a": [1.5, None, True, "x" * 300]}}


def test_metadata_are_the_objects_that_torch_makes(tmp_path: Path) -> None:
    (tmp_path / "stock").mkdir()
    stock_save(tmp_path / "stock", {**TENSORS, "object": {1}})
    write(tmp_path, TENSORS, objects=("object",))
    ours, theirs = (
        pickle.loads((d / ".metadata").read_bytes()) for d in (tmp_path, tmp_path / "stock")
    )
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    assert ours.version == theirs.version and type(ours.storage_meta) is type(theirs.storage_meta)
    assert {type(value) for value in ours.storage_data.values()} == {
        type(theirs.storage_data.popitem()[1])
    }
    properties = (m.state_dict_metadata["bf16"].properties.__dict__ for m in (ours, theirs))
    assert next(properties) == next(properties)


def test_two_keys_may_share_their_bytes(tmp_path: Path) -> None:
    stored = write(tmp_path, {"embedding": TENSORS["bf16"]})
    torch_dist.write_metadata(tmp_path, {**stored, "output": stored["embedding"]}, {})
    tensors, _ = torch_dist.read(tmp_path)
    assert tensors["output"] == tensors["embedding"]
    loaded = stock_load(tmp_path, {"output": TENSORS["bf16"], "embedding": TENSORS["bf16"]})
    assert same(loaded["output"], TENSORS["bf16"]) and same(loaded["embedding"], TENSORS["bf16"])


@pytest.mark.parametrize("size", [2**32 - 2, 2**32 - 1, 2**32 + 70])
def test_tensors_beyond_four_gib(tmp_path: Path, size: int) -> None:
    file, (head, tail) = tmp_path / "__0_0.distcp", torch_dist.container("U8", (size,))
    with open(file, "wb") as out:  # sparse
        out.write(head)
        out.seek(len(head) + size - 1)
        out.write(b"\7" + tail)
    stored = {"large": StoredTensor("U8", (size,), (Chunk((0,), (size,), file, len(head)),))}
    torch_dist.write_metadata(tmp_path, stored, {})
    assert torch_dist.read(tmp_path)[0] == stored
    loaded = torch.load(file, mmap=True, weights_only=True)
    assert loaded.shape == (size,) and loaded[-1] == 7 and loaded[0] == 0


class Evil:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.witness}",)


@pytest.fixture
def evil(tmp_path: Path) -> Iterator[bytes]:
    """A pickle that makes a file when it is loaded, and the check that it was not."""
    witness = tmp_path / "witness"
    pickled = pickle.dumps({"args": Evil(witness)}, 2)
    pickle.loads(pickled)
    assert witness.exists()
    witness.unlink()
    yield pickled
    assert not witness.exists()


def test_a_malicious_metadata_is_refused(tmp_path: Path, evil: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(evil)
    with pytest.raises(
        TorchDistError, match=r"\.metadata: its pickle names (posix|nt)\.system.*refused"
    ):
        torch_dist.read(tmp_path)


def test_a_malicious_chunk_is_refused(tmp_path: Path, evil: bytes) -> None:
    write(tmp_path, {"weight": TENSORS["bf16"]})
    head, tail = torch_dist.container("BF16", (3, 4))
    (tmp_path / "__0_0.distcp").write_bytes(
        b"".join(torch_pickle.archive(evil)).rjust(len(head + tail) + 24, b" ")
    )
    with pytest.raises(TorchDistError, match=r"__0_0\.distcp: weight: .*system.*refused"):
        torch_dist.read(tmp_path)


def test_a_malicious_common_is_refused(tmp_path: Path, evil: bytes) -> None:
    (tmp_path / "common.pt").write_bytes(b"".join(torch_pickle.archive(evil)))
    with pytest.raises(
        TorchDistError, match=r"common\.pt: its pickle names (posix|nt)\.system.*refused"
    ):
        torch_dist.read_common(tmp_path)


def test_other_objects_in_common_are_inert(tmp_path: Path) -> None:
    args = argparse.Namespace(call=Fraction(1, 3), kind=getattr)
    (tmp_path / "common.pt").write_bytes(
        b"".join(torch_pickle.archive(pickle.dumps({"args": args}, 2)))
    )
    value = torch_dist.read_common(tmp_path)["args"]
    assert type(value.call).__name__ == "Fraction" and value.call.args == (1, 3)
    assert value.kind.__name__ == "getattr" and value.kind is not getattr


def truncate(directory: Path) -> None:
    os.truncate(directory / "__0_0.distcp", (directory / "__0_0.distcp").stat().st_size - 1)


def overwrite(directory: Path) -> None:
    (directory / "__0_0.distcp").write_bytes(bytes((directory / "__0_0.distcp").stat().st_size))


def replace_in(name: str, old: bytes, new: bytes, directory: Path) -> None:
    content = (directory / name).read_bytes()
    assert old in content
    (directory / name).write_bytes(content.replace(old, new))


DAMAGE = {
    "truncated": (truncate, r"__0_0\.distcp: f32: truncated"),
    "overwritten": (overwrite, r"__0_0\.distcp: bf16: no container"),
    "missing file": (lambda d: (d / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing; .* bf16"),
    "missing metadata": (lambda d: (d / ".metadata").unlink(), r"no \.metadata"),
    "cut metadata": (lambda d: os.truncate(d / ".metadata", 900), r"\.metadata is damaged"),
    "no dictionary": (
        lambda d: (d / ".metadata").write_bytes(pickle.dumps(3)),
        r"\.metadata is damaged",
    ),
    "other backend": (lambda d: replace_in("metadata.json", b"torch_dist", b"zarr", d), "zarr"),
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


SQUARE = torch.arange(9.0).reshape(3, 3)
PINWHEEL: Boxes = [
    ((0, 0), (1, 2)),
    ((0, 2), (2, 1)),
    ((1, 0), (2, 1)),
    ((1, 1), (1, 1)),
    ((2, 1), (1, 2)),
]


def test_any_partition_is_read(tmp_path: Path) -> None:
    write(tmp_path, {"square": SQUARE}, {"square": PINWHEEL})
    assert same(assemble(torch_dist.read(tmp_path)[0]["square"]), SQUARE)


WRONG: dict[str, Boxes] = {
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
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    content = contained(value)
    next(iter(metadata.storage_data.values())).length = len(content)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    (tmp_path / "__0_0.distcp").write_bytes(content)
    with pytest.raises(TorchDistError, match=rf"__0_0\.distcp: weight: .*{message}"):
        torch_dist.read(tmp_path)


def test_a_chunk_stored_transformed_is_refused(tmp_path: Path) -> None:
    stock_save(tmp_path, {"weight": torch.zeros(4, 4)})
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(TorchDistError, match="weight is stored transformed: .*zstd"):
        torch_dist.read(tmp_path)


def test_strides_of_axes_of_one_element_do_not_matter(tmp_path: Path) -> None:
    odd = torch.arange(4.0).as_strided((1, 4, 1), (77, 1, 99))
    stock_save(tmp_path, {"odd": odd})
    assert same(assemble(torch_dist.read(tmp_path)[0]["odd"]), odd)


def test_only_plain_values_are_written_to_common(tmp_path: Path) -> None:
    with pytest.raises(TorchDistError, match="PosixPath"):
        torch_dist.write_common(tmp_path, {"path": tmp_path})
    assert not list(tmp_path.iterdir())


def test_a_thousand_chunks_of_one_tensor(tmp_path: Path) -> None:
    experts = torch.arange(1000.0).reshape(1000, 1, 1)
    write(
        tmp_path, {"experts": experts}, {"experts": [((i, 0, 0), (1, 1, 1)) for i in range(1000)]}
    )
    tensors, _ = torch_dist.read(tmp_path)
    assert len(tensors["experts"].chunks) == 1000 and same(assemble(tensors["experts"]), experts)
