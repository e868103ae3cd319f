"""What arrives on rank 0 is bit-equal to what the ranks hold."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from nanoslime.batch import WeightShard
from nanoslime.weight_sync.assemble import Assembler
from nanoslime.weight_sync.disk import write_checkpoint

FULL = {
    "rows": torch.arange(24.0).reshape(6, 4),  # cut by rows, unevenly
    "columns": torch.arange(100.0, 116.0).reshape(2, 8),  # cut by columns
    "replicated": torch.arange(5.0) - 7,
    "only_on_last": torch.full((3, 3), 2.5),
}
# Always float32, whatever the others are sent as; its halves are on either rank.
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
FULL[BIAS] = torch.full((4,), 4 + 1 / 3)

CPU = torch.device("cpu")


def shard(name: str, *ranges: tuple[int, int]) -> WeightShard:
    slices = tuple(slice(start, stop) for start, stop in ranges)
    return WeightShard(name, tuple(FULL[name].shape), slices, FULL[name][slices])


def shards_of(rank: int) -> list[WeightShard]:
    common = [
        shard("columns", (0, 2), (4 * rank, 4 * rank + 4)),
        shard("replicated", (0, 5)),
        shard(BIAS, (2 * rank, 2 * rank + 2)),
    ]
    if rank == 0:
        return [shard("rows", (0, 1), (0, 4)), shard("rows", (4, 6), (0, 4)), *common]
    return [shard("rows", (1, 4), (0, 4)), *common, shard("only_on_last", (0, 3), (0, 3))]


def assemble_twice(rank: int, rendezvous: str, dtype: torch.dtype, results) -> None:
    """Puts (the names whose tensors are right, whether all came in the order of the specs)."""
    expected = {name: tensor.to(dtype) for name, tensor in FULL.items()}
    expected[BIAS] = FULL[BIAS]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    assembler = Assembler(lambda: shards_of(rank), rank=rank, world_size=2, dtype=dtype, device=CPU)
    for _ in range(2):  # the plan serves every sync
        got = list(assembler.tensors())
        if rank == 0:
            equal = [name for name, tensor in got if same_bits(tensor, expected[name])]
            names = [name for name, _ in got]
            results.put((sorted(equal), names == [spec[0] for spec in assembler.specs]))
        else:
            results.put(([], got == []))
    dist.destroy_process_group()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def test_assembled_tensors_are_bit_equal_over_two_ranks(tmp_path):
    """Sent as bfloat16, in which the biases that are always float32 could not be."""
    results = mp.get_context("spawn").Queue()
    arguments = (str(tmp_path / "meet"), torch.bfloat16, results)
    mp.start_processes(assemble_twice, args=arguments, nprocs=2, start_method="spawn")
    outcomes = [results.get(timeout=10) for _ in range(4)]
    assert all(complete for _, complete in outcomes)
    assert [names for names, _ in outcomes if names] == [sorted(FULL)] * 2


def half() -> Assembler:
    """Three tensors, sent in bfloat16 but for one that always is float32."""
    tensors = {
        "odd": torch.full((3,), 1 / 3),
        BIAS: torch.full((4,), 4 + 1 / 3),
        "even": torch.full((2,), 2 / 3),
    }
    shards = [
        WeightShard(name, tuple(tensor.shape), (slice(0, len(tensor)),), tensor)
        for name, tensor in tensors.items()
    ]
    return Assembler(lambda: shards, rank=0, world_size=1, dtype=torch.bfloat16, device=CPU)


def test_a_bias_that_is_always_float32_keeps_its_bits():
    got = dict(half().tensors())
    assert torch.equal(got[BIAS], torch.full((4,), 4 + 1 / 3)) and got[BIAS].dtype == torch.float32
    assert got["odd"].dtype == got["even"].dtype == torch.bfloat16
    assert torch.equal(got["odd"], torch.full((3,), 1 / 3).bfloat16())
    specs = {name: (dtype, shape) for name, dtype, shape in half().specs}
    assert specs == {BIAS: ("F32", (4,)), "odd": ("BF16", (3,)), "even": ("BF16", (2,))}


def test_the_export_has_it_in_float32(tmp_path: Path):
    like = tmp_path / "like"
    like.mkdir()
    write_checkpoint(half(), 0, tmp_path / "out", like=like)
    [file] = (tmp_path / "out").glob("*.safetensors")
    found = load_file(file)
    assert torch.equal(found[BIAS], torch.full((4,), 4 + 1 / 3))
    assert found["odd"].dtype == torch.bfloat16


def test_tensors_meet_on_the_device_of_the_rank():
    """Offloaded shards are on the CPU, the engines' NCCL group is not."""
    held = [WeightShard("a", (4,), (slice(0, 4),), torch.ones(4))]
    assembler = Assembler(
        lambda: held, rank=0, world_size=1, dtype=torch.float32, device=torch.device("meta")
    )
    [(_, tensor)] = assembler.tensors()
    assert tensor.device.type == "meta"
