"""The plan covers every tensor exactly once; what arrives on rank 0 is bit-equal to what the ranks hold."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from nanoslime.batch import WeightShard
from nanoslime.weight_sync.assemble import Assembler, make_plan
from nanoslime.weight_sync.broadcast import buckets
from nanoslime.weight_sync.disk import write_checkpoint

FULL = {
    "rows": torch.arange(24.0).reshape(6, 4),  # cut by rows, unevenly
    "columns": torch.arange(100.0, 116.0).reshape(2, 8),  # cut by columns
    "replicated": torch.arange(5.0) - 7,
    "only_on_last": torch.full((3, 3), 2.5),
}


def _shard(name: str, *ranges: tuple[int, int]) -> WeightShard:
    slices = tuple(slice(a, b) for a, b in ranges)
    return WeightShard(name, tuple(FULL[name].shape), slices, FULL[name][slices])


def _shards(rank: int) -> list[WeightShard]:
    half = [_shard("columns", (0, 2), (4 * rank, 4 * rank + 4))]
    common = [_shard("replicated", (0, 5))]
    if rank == 0:
        return [_shard("rows", (0, 1), (0, 4)), _shard("rows", (4, 6), (0, 4)), *half, *common]
    return [_shard("rows", (1, 4), (0, 4)), *half, *common, _shard("only_on_last", (0, 3), (0, 3))]


def _metas(*ranks):
    return [
        [(s.name, s.full_shape, tuple((x.start, x.stop) for x in s.slices)) for s in shards]
        for shards in ranks
    ]


def test_plan_takes_every_element_once_and_replicas_from_the_lowest_rank():
    plan = {t.name: t for t in make_plan(_metas(_shards(0), _shards(1)))}
    assert {name: tuple(t.shape) for name, t in FULL.items()} == {
        name: t.shape for name, t in plan.items()
    }
    assert [p.rank for p in plan["replicated"].pieces] == [0]
    assert [p.rank for p in plan["only_on_last"].pieces] == [1]
    for t in plan.values():
        count = torch.zeros(t.shape)
        for piece in t.pieces:
            count[tuple(slice(a, b) for a, b in piece.box)] += 1
        assert count.eq(1).all(), t.name


def test_plan_refuses_a_part_that_nobody_holds():
    with pytest.raises(ValueError, match="rows: the ranks' pieces cover 12 of 24"):
        make_plan(_metas(_shards(0), _shards(1)[1:]))


def test_plan_refuses_overlapping_parts_and_disagreeing_shapes():
    overlap = [_shard("rows", (0, 4), (0, 4)), _shard("rows", (3, 6), (0, 4))]
    with pytest.raises(ValueError, match="rows: ranks 0 and 0 hold overlapping"):
        make_plan(_metas(overlap))
    with pytest.raises(ValueError, match=r"a: rank 1 has full shape \(3,\), another rank \(2,\)"):
        make_plan([[("a", (2,), ((0, 2),))], [("a", (3,), ((0, 3),))]])


def _rank(rank: int, rendezvous: str, failures) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    assembler = Assembler(
        lambda: _shards(rank),
        rank=rank,
        world_size=2,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for _ in range(2):  # the plan serves every sync
        got = list(assembler.tensors())
        if rank == 0:
            equal = [name for name, t in got if torch.equal(t, FULL[name])]
            failures.put(
                (sorted(equal), [name for name, _ in got] == [s[0] for s in assembler.specs])
            )
        else:
            failures.put(([], got == []))
    dist.destroy_process_group()


def test_assembled_tensors_are_bit_equal_over_two_ranks(tmp_path):
    context = mp.get_context("spawn")
    results = context.Queue()
    mp.start_processes(
        _rank, args=(str(tmp_path / "meet"), results), nprocs=2, start_method="spawn"
    )
    outcomes = [results.get(timeout=10) for _ in range(4)]
    assert all(complete for _, complete in outcomes)
    assert [names for names, _ in outcomes if names] == [sorted(FULL)] * 2


def test_buckets_keep_order_and_limit():
    named = [(str(i), torch.zeros(n)) for i, n in enumerate([10, 10, 100, 5, 5, 5])]
    got = [[name for name, _ in b] for b in buckets(named, limit_bytes=80)]
    assert got == [["0", "1"], ["2"], ["3", "4", "5"]]
    assert list(itertools.chain(*got)) == [name for name, _ in named]


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def half() -> Assembler:
    odd = {
        "odd": torch.full((3,), 1 / 3),
        BIAS: torch.full((4,), 4 + 1 / 3),
        "even": torch.full((2,), 2 / 3),
    }
    shards = [WeightShard(name, tuple(t.shape), (slice(0, len(t)),), t) for name, t in odd.items()]
    place = {"rank": 0, "world_size": 1, "device": torch.device("cpu")}
    return Assembler(lambda: shards, dtype=torch.bfloat16, **place)


def test_a_bias_that_is_always_float32_keeps_its_bits():
    got = dict(half().tensors())
    assert torch.equal(got[BIAS], torch.full((4,), 4 + 1 / 3)) and got[BIAS].dtype == torch.float32
    assert got["odd"].dtype == got["even"].dtype == torch.bfloat16
    assert torch.equal(got["odd"], torch.full((3,), 1 / 3).bfloat16())
    kinds = {name: (kind, shape) for name, kind, shape in half().specs}
    assert kinds == {BIAS: ("F32", (4,)), "odd": ("BF16", (3,)), "even": ("BF16", (2,))}


def test_the_export_has_it_in_float32(tmp_path):
    assembler, like = half(), tmp_path / "like"
    like.mkdir()
    write_checkpoint(assembler.tensors(), assembler.specs, tmp_path / "out", like=like)
    [file] = (tmp_path / "out").glob("*.safetensors")
    found = load_file(file)
    assert (
        torch.equal(found[BIAS], torch.full((4,), 4 + 1 / 3))
        and found["odd"].dtype == torch.bfloat16
    )


def test_tensors_meet_on_the_device_of_the_rank():
    """Offloaded shards are on the CPU, the engines' NCCL group is not."""
    held = [WeightShard("a", (4,), (slice(0, 4),), torch.ones(4))]
    place = {"rank": 0, "world_size": 1, "device": torch.device("meta")}
    [(_, tensor)] = Assembler(lambda: held, dtype=torch.float32, **place).tensors()
    assert tensor.device.type == "meta"
