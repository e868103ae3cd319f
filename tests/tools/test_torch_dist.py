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
from typing import Any

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

from nanoslime.storage.shared_files import read_json
from nanoslime.training.megatron import cpu_compat
from tests.tools.checkpoints import (
    COMMON_FILE,
    COMMON_OBJECT,
    FORMS,
    Extents,
    Tensors,
    contents,
    cut_out,
    read_stock_metadata,
    same_bits,
    turn_into_old_form,
)
from tools.conversion import torch_dist, torch_pickle
from tools.conversion.torch_dist import Chunk, StoredObject, StoredTensor, TorchDistError

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
COMMON = {"iteration": 7, "nested": {"a": [1.5, None, True, "x" * 300]}}
EXTRA_STATE = "linear._extra_state/shard_0_1"


@contextmanager
def one_rank() -> Iterator[None]:
    cpu_compat.install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def write(
    directory: Path,
    tensors: Tensors,
    boxes: dict[str, list[Extents]] | None = None,
    *,
    objects: tuple[str, ...] = (),
    form: str = COMMON_OBJECT,
) -> dict[str, StoredTensor]:
    """As the converter does: head, data, tail, one after the other, then the metadata."""
    boxes = boxes or {}
    file = directory / "__0_0.distcp"
    stored = {}
    with open(file, "wb") as out:
        for key, tensor in tensors.items():
            dtype = NAMES[tensor.dtype]
            shape = tuple(tensor.shape)
            all_of_it = ((0,) * len(shape), shape)
            chunks = []
            for start, box_shape in boxes.get(key, [all_of_it]):
                head, tail = torch_pickle.tensor_container(dtype, box_shape)
                chunks.append(Chunk(start, box_shape, file, out.tell() + len(head)))
                out.write(head + raw(cut_out(tensor, start, box_shape)) + tail)
            stored[key] = StoredTensor(dtype, shape, tuple(chunks))
        containers = dict.fromkeys(objects, torch_pickle.EMPTY_OBJECT)
        containers[torch_dist.COMMON_STATE] = torch_pickle.object_container([COMMON])
        places = {}
        for key, container in containers.items():
            places[key] = StoredObject(file, out.tell(), len(container))
            out.write(container)
    torch_dist.write_metadata(directory, stored, places)
    if form == COMMON_FILE:
        turn_into_old_form(directory)
    return stored


def assemble(tensor: StoredTensor) -> torch.Tensor:
    whole = torch.zeros(tensor.shape, dtype=DTYPES[tensor.dtype])
    for chunk in tensor.chunks:
        with open(chunk.file, "rb") as file:
            file.seek(chunk.offset)
            part = cut_out(whole, chunk.start, chunk.shape)
            data = bytearray(file.read(part.numel() * part.element_size()))
            part.copy_(torch.frombuffer(data, dtype=whole.dtype).reshape(chunk.shape))
    return whole


def stock_save(directory: Path, state: dict[str, object]) -> None:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(directory), no_dist=True)


def stock_load(directory: Path, like: Tensors) -> Tensors:
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
    found = torch_dist.read(tmp_path)
    assert list(found.objects) == ["nested.object"]
    assert found.tensors.keys() == TENSORS.keys() | {"nested.b"}
    for key, tensor in TENSORS.items():
        assert same_bits(assemble(found.tensors[key]), tensor), key
    some = torch_dist.read(tmp_path, lambda key: key.startswith("f"))
    assert some.tensors == {key: found.tensors[key] for key in ("f32", "f16", "fp8")}


def sharded_state() -> dict[str, object]:
    layers = {}
    for number in range(3):
        weight = torch.full((3, 4), number + 0.5).bfloat16()
        layers[f"layer{number}"] = ShardedTensor.from_rank_offsets(
            "layers.weight", weight, (0, number, 3), prepend_axis_num=1
        )
    return {
        "layers": layers,
        "norm": ShardedTensor.from_rank_offsets(
            "norm", torch.arange(6.0), allow_shape_mismatch=True
        ),
        "extra": ShardedObject("linear._extra_state", None, (1,), (0,)),
        "args": argparse.Namespace(num_layers=3, params_dtype=torch.bfloat16, seed=None),
        "iteration": 5,
    }


def save_by_megatron_core(directory: str) -> None:
    with one_rank():
        strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy("torch_dist", 1))
        dist_checkpointing.save(sharded_state(), directory, strategy, content_metadata={"a": 1})


@pytest.fixture(scope="module")
def saved_by_megatron_core(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint in both forms: as the installed megatron-core writes it, and as 0.16 did.

    It is saved in a process of its own: megatron-core's writers fork, which the threads of this
    process may not stand.
    """
    found = {}
    new_form = tmp_path_factory.mktemp("megatron_core")
    call = f"import {__name__} as here; here.save_by_megatron_core({str(new_form)!r})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", call], check=True, timeout=240)
    found[COMMON_OBJECT] = new_form
    old_form = tmp_path_factory.mktemp("megatron_core_0_16")
    for file in new_form.iterdir():
        (old_form / file.name).write_bytes(file.read_bytes())
    turn_into_old_form(old_form)
    found[COMMON_FILE] = old_form
    return found


@pytest.mark.megatron
@pytest.mark.parametrize("form", FORMS)
def test_what_megatron_core_saves_is_read(
    saved_by_megatron_core: dict[str, Path], form: str
) -> None:
    directory = saved_by_megatron_core[form]
    assert (directory / "common.pt").exists() == (form == COMMON_FILE)
    found = torch_dist.read(directory)
    assert list(found.objects) == [EXTRA_STATE]
    assert found.tensors.keys() == {"layers.weight", "norm"}
    starts = [chunk.start for chunk in found.tensors["layers.weight"].chunks]
    assert starts == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    expected = torch.tensor([0.5, 1.5, 2.5]).bfloat16()[:, None, None].expand(3, 3, 4)
    assert same_bits(assemble(found.tensors["layers.weight"]), expected)
    assert same_bits(assemble(found.tensors["norm"]), torch.arange(6.0))
    common = found.read_common()
    assert (common["iteration"], common["content_metadata"]) == (5, {"a": 1})
    assert (common["args"].num_layers, common["args"].seed) == (3, None)
    assert common["args"].params_dtype.__name__ == "bfloat16"


@pytest.mark.megatron
@pytest.mark.parametrize("form", FORMS)
def test_megatron_core_loads_what_is_written(tmp_path: Path, form: str) -> None:
    tensors = {"layers.weight": torch.randn(3, 3, 4).bfloat16(), "norm": torch.randn(6)}
    rows: list[Extents] = [((i, j, 0), (1, 1, 4)) for i in range(3) for j in range(3)]
    write(tmp_path, tensors, {"layers.weight": rows}, objects=(EXTRA_STATE,), form=form)
    with one_rank():
        loaded = dist_checkpointing.load(sharded_state(), str(tmp_path))
    for number in range(3):
        assert same_bits(loaded["layers"][f"layer{number}"], tensors["layers.weight"][number])
    assert same_bits(loaded["norm"], tensors["norm"])
    assert loaded["extra"] is None
    assert (loaded["iteration"], loaded["nested"]) == (COMMON["iteration"], COMMON["nested"])


@pytest.mark.megatron
def test_what_is_written_has_the_form_of_the_installed_megatron_core(
    saved_by_megatron_core: dict[str, Path], tmp_path: Path
) -> None:
    theirs = saved_by_megatron_core[COMMON_OBJECT]
    write(tmp_path, {"layers.weight": torch.zeros(3, 3, 4).bfloat16(), "norm": torch.zeros(6)})
    assert contents(tmp_path).keys() <= contents(theirs).keys()
    our_config = read_json(tmp_path / torch_dist.CONFIG)
    assert our_config == read_json(theirs / torch_dist.CONFIG)
    our_keys = read_stock_metadata(tmp_path).state_dict_metadata.keys()
    their_keys = read_stock_metadata(theirs).state_dict_metadata.keys()
    assert our_keys == their_keys - {EXTRA_STATE}


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


@pytest.mark.parametrize("form", FORMS)
def test_a_round_trip_through_torch_is_bit_exact(tmp_path: Path, form: str) -> None:
    boxes: dict[str, list[Extents]] = {
        "large": [((i, j), (350, 25)) for i in (0, 350) for j in range(0, 100, 25)],
        "f32": [((0,), (1,)), ((1,), (4,))],
    }
    stored = write(tmp_path, TENSORS, boxes, objects=("object/shard_0_1",), form=form)
    found = torch_dist.read(tmp_path)
    assert list(found.objects) == ["object/shard_0_1"]
    stored["empty"] = StoredTensor("F32", (0, 3), ())
    assert found.tensors == stored
    loaded = stock_load(tmp_path, TENSORS)
    for key, tensor in TENSORS.items():
        assert same_bits(loaded[key], tensor), key
        assert same_bits(assemble(found.tensors[key]), tensor), key
    assert found.read_common() == COMMON


def test_metadata_are_the_objects_that_torch_makes(tmp_path: Path) -> None:
    (tmp_path / "stock").mkdir()
    stock_save(tmp_path / "stock", {**TENSORS, "object": {1}, torch_dist.COMMON_STATE: {2}})
    write(tmp_path, TENSORS, objects=("object",))
    ours = read_stock_metadata(tmp_path)
    theirs = read_stock_metadata(tmp_path / "stock")
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    assert ours.version == theirs.version
    assert type(ours.storage_meta) is type(theirs.storage_meta)
    kinds = {type(value) for value in ours.storage_data.values()}
    assert kinds == {type(value) for value in theirs.storage_data.values()}
    our_properties = ours.state_dict_metadata["bf16"].properties
    their_properties = theirs.state_dict_metadata["bf16"].properties
    assert vars(our_properties) == vars(their_properties)


def test_two_keys_may_share_their_bytes(tmp_path: Path) -> None:
    stored = write(tmp_path, {"embedding": TENSORS["bf16"]})
    torch_dist.write_metadata(tmp_path, {**stored, "output": stored["embedding"]}, {})
    tensors = torch_dist.read(tmp_path).tensors
    assert tensors["output"] == tensors["embedding"]
    loaded = stock_load(tmp_path, {"output": TENSORS["bf16"], "embedding": TENSORS["bf16"]})
    assert same_bits(loaded["output"], TENSORS["bf16"])
    assert same_bits(loaded["embedding"], TENSORS["bf16"])


@pytest.mark.parametrize("size", [2**32 - 2, 2**32 - 1, 2**32 + 70])
def test_tensors_beyond_four_gib(tmp_path: Path, size: int) -> None:
    file = tmp_path / "__0_0.distcp"
    head, tail = torch_pickle.tensor_container("U8", (size,))
    with open(file, "wb") as out:  # sparse
        out.write(head)
        out.seek(len(head) + size - 1)
        out.write(b"\7" + tail)
    stored = {"large": StoredTensor("U8", (size,), (Chunk((0,), (size,), file, len(head)),))}
    torch_dist.write_metadata(tmp_path, stored, {})
    assert torch_dist.read(tmp_path).tensors == stored
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
    torch_dist.write_metadata(directory, {}, {torch_dist.COMMON_STATE: stored})


COMMON_PLACE = {
    COMMON_FILE: r"common\.pt",
    COMMON_OBJECT: r"__0_0\.distcp: common_state/shard_0_1",
}


def test_a_malicious_metadata_is_refused(tmp_path: Path, evil: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(evil)
    message = r"\.metadata: its pickle names (posix|nt)\.system.*refused"
    with pytest.raises(TorchDistError, match=message):
        torch_dist.read(tmp_path)


def test_a_malicious_chunk_is_refused(tmp_path: Path, evil: bytes) -> None:
    write(tmp_path, {"weight": TENSORS["bf16"]})
    head, tail = torch_pickle.tensor_container("BF16", (3, 4))
    length = len(head) + TENSORS["bf16"].nbytes + len(tail)
    with open(tmp_path / "__0_0.distcp", "r+b") as file:
        file.write(archived(evil).rjust(length, b" "))
    with pytest.raises(TorchDistError, match=r"__0_0\.distcp: weight: .*system.*refused"):
        torch_dist.read(tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_a_malicious_common_state_is_refused(tmp_path: Path, evil: bytes, form: str) -> None:
    put_common(tmp_path, evil, form)
    message = rf"{COMMON_PLACE[form]}: its pickle names (posix|nt)\.system.*refused"
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


SQUARE = torch.arange(9.0).reshape(3, 3)
PINWHEEL: list[Extents] = [
    ((0, 0), (1, 2)),
    ((0, 2), (2, 1)),
    ((1, 0), (2, 1)),
    ((1, 1), (1, 1)),
    ((2, 1), (1, 2)),
]


def test_any_partition_is_read(tmp_path: Path) -> None:
    write(tmp_path, {"square": SQUARE}, {"square": PINWHEEL})
    assert same_bits(assemble(torch_dist.read(tmp_path).tensors["square"]), SQUARE)


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


def test_strides_of_axes_of_one_element_do_not_matter(tmp_path: Path) -> None:
    odd = torch.arange(4.0).as_strided((1, 4, 1), (77, 1, 99))
    stock_save(tmp_path, {"odd": odd})
    assert same_bits(assemble(torch_dist.read(tmp_path).tensors["odd"]), odd)


def test_only_plain_values_become_an_object(tmp_path: Path) -> None:
    with pytest.raises(TorchDistError, match="PosixPath"):
        torch_pickle.object_container([{"path": tmp_path}])


def test_a_thousand_chunks_of_one_tensor(tmp_path: Path) -> None:
    experts = torch.arange(1000.0).reshape(1000, 1, 1)
    one_by_one: list[Extents] = [((i, 0, 0), (1, 1, 1)) for i in range(1000)]
    write(tmp_path, {"experts": experts}, {"experts": one_by_one})
    found = torch_dist.read(tmp_path).tensors["experts"]
    assert len(found.chunks) == 1000 and same_bits(assemble(found), experts)
