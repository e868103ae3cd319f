"""The plan covers every tensor exactly once, in buckets whose order and size are fixed."""

import pytest
import torch

from nanoslime.weight_sync.plan import OwnedShard, PlannedTensor, make_buckets, make_sync_plan

SHAPES = {"rows": (6, 4), "columns": (2, 8), "replicated": (5,), "only_on_last": (3, 3)}


def float32(name: str) -> torch.dtype:
    return torch.float32


def owned(name: str, *ranges: tuple[int, int]) -> OwnedShard:
    box = tuple(slice(start, stop) for start, stop in ranges)
    return OwnedShard(name, SHAPES[name], box)


RANK_0 = [
    owned("rows", (0, 1), (0, 4)),
    owned("rows", (4, 6), (0, 4)),
    owned("columns", (0, 2), (0, 4)),
    owned("replicated", (0, 5)),
]
RANK_1 = [
    owned("rows", (1, 4), (0, 4)),
    owned("columns", (0, 2), (4, 8)),
    owned("replicated", (0, 5)),
    owned("only_on_last", (0, 3), (0, 3)),
]


def test_plan_takes_every_element_once_and_replicas_from_the_lowest_rank():
    plan = make_sync_plan([RANK_0, RANK_1], float32, bucket_bytes=1000)
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    assert {name: tensor.shape for name, tensor in tensors.items()} == SHAPES
    assert [source.rank for source in tensors["replicated"].sources] == [0]
    assert [source.rank for source in tensors["only_on_last"].sources] == [1]
    for name, tensor in tensors.items():
        count = torch.zeros(tensor.shape)
        for source in tensor.sources:
            count[source.box] += 1
        assert count.eq(1).all(), name


def test_a_source_says_which_of_its_ranks_shards_it_is():
    plan = make_sync_plan([RANK_0, RANK_1], float32, bucket_bytes=1000)
    for tensor in plan.tensors:
        for source in tensor.sources:
            shard = [RANK_0, RANK_1][source.rank][source.index]
            assert (shard.name, shard.box) == (tensor.name, source.box)


def test_plan_refuses_a_part_that_nobody_holds():
    with pytest.raises(ValueError, match="rows: the ranks' pieces cover 12 of 24"):
        make_sync_plan([RANK_0, RANK_1[1:]], float32, bucket_bytes=1000)


def test_plan_refuses_overlapping_parts():
    overlap = [owned("rows", (0, 4), (0, 4)), owned("rows", (3, 6), (0, 4))]
    message = r"rows: ranks 0 and 0 hold overlapping \[0:4, 0:4\], \[3:6, 0:4\]"
    with pytest.raises(ValueError, match=message):
        make_sync_plan([overlap], float32, bucket_bytes=1000)


def test_plan_refuses_disagreeing_shapes():
    two = OwnedShard("a", (2,), (slice(0, 2),))
    three = OwnedShard("a", (3,), (slice(0, 3),))
    with pytest.raises(ValueError, match=r"a: rank 1 has full shape \(3,\), another rank \(2,\)"):
        make_sync_plan([[two], [three]], float32, bucket_bytes=1000)


def test_large_elements_come_first_so_that_a_bucket_is_aligned():
    shards = [OwnedShard(name, (3,), (slice(0, 3),)) for name in ("a", "b", "c")]

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if name == "b" else torch.bfloat16

    plan = make_sync_plan([shards], dtype_of, bucket_bytes=1000)
    assert [tensor.name for tensor in plan.tensors] == ["b", "a", "c"]
    assert [tensor.nbytes for tensor in plan.tensors] == [12, 6, 6]


def test_buckets_keep_order_and_limit():
    sizes = [10, 10, 100, 5, 5, 5]
    tensors = [PlannedTensor(str(i), (n,), torch.float32, ()) for i, n in enumerate(sizes)]
    buckets = make_buckets(tensors, limit_bytes=80)
    assert [[t.name for t in bucket] for bucket in buckets] == [["0", "1"], ["2"], ["3", "4", "5"]]
