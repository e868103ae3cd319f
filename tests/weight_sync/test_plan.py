"""The plan covers every tensor exactly once, in buckets whose order and size are fixed."""

import pytest
import torch

from nanoslime.batch import OwnedShard
from nanoslime.models.rules import Box
from nanoslime.weight_sync import exchange as exchange_module
from nanoslime.weight_sync import plan as plan_module
from nanoslime.weight_sync.plan import (
    Bucket,
    FlatBucket,
    PlannedTensor,
    make_buckets,
    make_sync_plan,
    overlap,
    rows_on_each,
    size,
    whole_on_first,
)

THIRDS = ((0, 3), (3, 7), (7, 10))
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


def planned(*shards_by_rank: list[OwnedShard], targets=whole_on_first) -> tuple[Bucket, ...]:
    return make_sync_plan(shards_by_rank, float32, bucket_bytes=1000, targets_of=targets)


def tensors_of(plan: tuple[Bucket, ...]) -> dict[str, PlannedTensor]:
    return {tensor.name: tensor for bucket in plan for tensor in bucket.tensors}


def test_plan_takes_every_element_once_and_replicas_from_the_lowest_rank():
    tensors = tensors_of(planned(RANK_0, RANK_1))
    assert {name: tensor.shape for name, tensor in tensors.items()} == SHAPES
    assert [source.rank for source in tensors["replicated"].sources] == [0]
    assert [source.rank for source in tensors["only_on_last"].sources] == [1]
    for name, tensor in tensors.items():
        count = torch.zeros(tensor.shape)
        for source in tensor.sources:
            count[source.box] += 1
        assert count.eq(1).all(), name


def test_a_source_says_which_of_its_ranks_shards_it_is():
    for tensor in tensors_of(planned(RANK_0, RANK_1)).values():
        for source in tensor.sources:
            shard = [RANK_0, RANK_1][source.rank][source.index]
            assert (shard.name, shard.box) == (tensor.name, source.box)


def test_plan_refuses_a_part_that_nobody_holds():
    with pytest.raises(ValueError, match="rows: the ranks' pieces cover 12 of 24"):
        planned(RANK_0, RANK_1[1:])


def test_plan_refuses_overlapping_parts():
    overlap = [owned("rows", (0, 4), (0, 4)), owned("rows", (3, 6), (0, 4))]
    message = r"rows: ranks 0 and 0 hold overlapping \[0:4, 0:4\], \[3:6, 0:4\]"
    with pytest.raises(ValueError, match=message):
        planned(overlap)


def test_large_elements_come_first_so_that_a_bucket_is_aligned():
    shards = [OwnedShard(name, (3,), (slice(0, 3),)) for name in ("a", "b", "c")]

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if name == "b" else torch.bfloat16

    [bucket] = make_sync_plan([shards], dtype_of, bucket_bytes=1000, targets_of=whole_on_first)
    assert [tensor.name for tensor in bucket.tensors] == ["b", "a", "c"]
    assert [tensor.nbytes for tensor in bucket.tensors] == [12, 6, 6]


@pytest.mark.parametrize("targets_of", [whole_on_first, rows_on_each])
def test_a_tensor_larger_than_a_bucket_travels_as_rows(targets_of):
    """Three ranks hold its rows unevenly, or its columns; what is sent fills each row once."""
    by_rows = [OwnedShard("rows", (10, 4), (slice(a, b), slice(0, 4))) for a, b in THIRDS]
    by_columns = [OwnedShard("columns", (4, 10), (slice(0, 4), slice(a, b))) for a, b in THIRDS]
    small = OwnedShard("scalar", (), ())
    shards_by_rank = [[*shards, small] for shards in zip(by_rows, by_columns, strict=True)]
    for limit in (1, 16, 40, 64, 100, 159, 160):
        plan = make_sync_plan(shards_by_rank, float32, limit, targets_of)
        count = {
            name: torch.zeros(shape) for name, shape in (("rows", (10, 4)), ("columns", (4, 10)))
        }
        for bucket in plan:
            assert bucket.nbytes <= limit or len(bucket.tensors) == 1
            for tensor in bucket.tensors:
                if tensor.name == "scalar":
                    continue
                row = tensor.nbytes // (tensor.box[0].stop - tensor.box[0].start)
                assert tensor.nbytes <= max(limit, row)
                assert tensor.nbytes == 4 * sum(size(target.box) for target in tensor.targets)
                for target in tensor.targets:
                    count[tensor.name][target.box] += 1
        assert all(times.eq(1).all() for times in count.values())


def test_rows_of_a_tensor_come_in_order_and_say_whether_more_follow():
    plan = make_sync_plan([[owned("rows", (0, 6), (0, 4))]], float32, 33, whole_on_first)
    tensors = [tensor for bucket in plan for tensor in bucket.tensors]
    assert [tensor.box[0] for tensor in tensors] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert [tensor.label for tensor in tensors] == ["rows...", "rows...", "rows"]
    shapes = [FlatBucket(bucket).shapes[1:] for bucket in plan]
    assert shapes == [[(2, 4)], [(2, 4)], [(2, 4)]]


def test_replicas_take_turns_where_the_plan_spreads():
    """As in four data-parallel groups of two tensor-parallel ranks."""
    shards_by_rank = []
    for rank in range(8):
        half = slice(100 * (rank % 2), 100 * (rank % 2) + 100)
        shards_by_rank.append([OwnedShard(str(n), (200,), (half,)) for n in range(40)])
    plan = make_sync_plan(shards_by_rank, float32, 10_000, rows_on_each, spreads=True)
    num_rows = [0] * 8
    for tensor in tensors_of(plan).values():
        assert len({source.rank // 2 for source in tensor.sources}) == 1
        for target in tensor.targets:
            num_rows[target.rank] += size(target.box)
    assert num_rows == [1000] * 8
    plan = make_sync_plan(shards_by_rank, float32, 10_000, whole_on_first)
    assert {bucket.first_rank for bucket in plan} == {0}


@pytest.mark.parametrize("targets_of", [whole_on_first, rows_on_each])
def test_the_work_of_a_plan_grows_with_the_shards_and_not_with_their_pairs(monkeypatch, targets_of):
    """64 ranks that each hold rows of 60 tensors have 120,960 pairs of shards."""
    num_compared = 0

    def counted(one: Box, other: Box) -> Box | None:
        nonlocal num_compared
        num_compared += 1
        return overlap(one, other)

    monkeypatch.setattr(plan_module, "overlap", counted)
    monkeypatch.setattr(exchange_module, "overlap", counted)
    shards_by_rank = []
    for rank in range(64):
        rows = slice(2 * rank, 2 * rank + 2)
        shards = [OwnedShard(str(n), (128, 4), (rows, slice(0, 4))) for n in range(60)]
        shards_by_rank.append(shards)
    plan = make_sync_plan(shards_by_rank, float32, 10_000, targets_of)
    # The pairs of a shape are compared once.
    assert num_compared <= 64 * 63 / 2
    num_compared = 0
    exchange_module.Exchange(plan, 5, torch.device("cpu"))
    assert num_compared <= 2 * 64 * 60


def test_buckets_keep_order_and_limit():
    sizes = [10, 10, 100, 5, 5, 5]
    tensors = [PlannedTensor(str(i), (n,), torch.float32, (), ()) for i, n in enumerate(sizes)]
    buckets = make_buckets(tensors, limit_bytes=80)
    names = [[tensor.name for tensor in bucket.tensors] for bucket in buckets]
    assert names == [["0", "1"], ["2"], ["3", "4", "5"]]


def test_the_lowest_rank_with_a_part_sends_a_tensor_and_senders_take_turns(monkeypatch):
    """As in two pipeline stages of two tensor-parallel ranks, which copy their norms."""
    shards_by_rank = []
    for stage in range(2):
        for half in range(2):
            shards = [OwnedShard(f"norm{stage}", (4,), (slice(0, 4),))]
            for layer in range(3):
                rows = slice(100 * half, 100 * half + 100)
                shards.append(OwnedShard(f"{stage}.{layer}", (200,), (rows,)))
            shards_by_rank.append(shards)
    monkeypatch.setattr(plan_module, "MAX_RUN", 2)
    plan = planned(*shards_by_rank)
    assert [bucket.first_rank for bucket in plan] == [0, 0, 2, 2, 0, 2]
    for bucket in plan:
        for tensor in bucket.tensors:
            [target] = tensor.targets
            assert target.box == (slice(0, tensor.shape[0]),)
            assert target.rank == min(source.rank for source in tensor.sources)


def test_rows_stay_where_they_are_and_columns_become_rows():
    tensors = tensors_of(planned(RANK_0, RANK_1, targets=rows_on_each))
    rows = tensors["rows"]
    assert [(t.rank, t.box) for t in rows.targets] == [(s.rank, s.box) for s in rows.sources]
    assert [(t.rank, t.box) for t in tensors["columns"].targets] == [
        (0, (slice(0, 1), slice(0, 8))),
        (1, (slice(1, 2), slice(0, 8))),
    ]


def test_fewer_rows_than_ranks_leave_some_without():
    by_columns = [
        [OwnedShard("flat", (2, 6), (slice(0, 2), slice(2 * rank, 2 * rank + 2)))]
        for rank in range(3)
    ]
    [bucket] = planned(*by_columns, targets=rows_on_each)
    targets = bucket.tensors[0].targets
    assert [(t.rank, t.box[0]) for t in targets] == [(1, slice(0, 1)), (2, slice(1, 2))]
