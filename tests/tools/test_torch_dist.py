"""torch_dist without torch, against torch's distributed checkpoint and megatron-core themselves."""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
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
    contents,
    read_stock_metadata,
    same_bits,
    turn_into_old_form,
)
from tests.tools.torch_dist_files import (
    COMMON,
    EXTRA_STATE,
    PINWHEEL,
    SQUARE,
    TENSORS,
    assemble,
    stock_load,
    stock_save,
    write,
)
from tools.conversion import torch_dist, torch_pickle
from tools.conversion.torch_dist import Chunk, StoredTensor


@contextmanager
def one_rank() -> Iterator[None]:
    cpu_compat.install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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

    It is saved in a process of its own: megatron-core's writers fork, which the threads
    of this process may not stand.
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
    stock_save(tmp_path / "stock", {**TENSORS, "object": {1}, torch_dist.COMMON_KEY: {2}})
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


def test_any_partition_is_read(tmp_path: Path) -> None:
    write(tmp_path, {"square": SQUARE}, {"square": PINWHEEL})
    assert same_bits(assemble(torch_dist.read(tmp_path).tensors["square"]), SQUARE)


def test_strides_of_axes_of_one_element_do_not_matter(tmp_path: Path) -> None:
    odd = torch.arange(4.0).as_strided((1, 4, 1), (77, 1, 99))
    stock_save(tmp_path, {"odd": odd})
    assert same_bits(assemble(torch_dist.read(tmp_path).tensors["odd"]), odd)


def test_a_thousand_chunks_of_one_tensor(tmp_path: Path) -> None:
    experts = torch.arange(1000.0).reshape(1000, 1, 1)
    one_by_one: list[Extents] = [((i, 0, 0), (1, 1, 1)) for i in range(1000)]
    write(tmp_path, {"experts": experts}, {"experts": one_by_one})
    found = torch_dist.read(tmp_path).tensors["experts"]
    assert len(found.chunks) == 1000 and same_bits(assemble(found), experts)
