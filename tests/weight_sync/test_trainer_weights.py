"""What arrives at its targets, and in the files of a checkpoint, is bit-equal to what the ranks
hold.
"""

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from nanoslime.batch import OwnedShard, WeightShard
from nanoslime.processes.ports import free_port
from nanoslime.storage import manifest
from nanoslime.types import RunError
from nanoslime.weight_sync import disk
from nanoslime.weight_sync.disk import CheckpointWriter
from nanoslime.weight_sync.exchange import Exchange
from nanoslime.weight_sync.plan import TrainerWeights, rows_on_each, whole_on_first
from tests.weight_sync.gathered import whole_on_rank_0, whole_tensors

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


def owned(shards: list[WeightShard]) -> list[OwnedShard]:
    return [OwnedShard(shard.name, shard.full_shape, shard.slices) for shard in shards]


def weights_of(rank: int, dtype: torch.dtype) -> TrainerWeights:
    everyone = [owned(shards_of(0)), owned(shards_of(1))]
    return TrainerWeights(lambda: shards_of(rank), everyone, rank=rank, dtype=dtype, device=CPU)


def expected(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.to(dtype) for name, tensor in FULL.items()}
    tensors[BIAS] = FULL[BIAS]
    return tensors


def test_every_rank_says_of_each_tensor_once_what_engines_are_sent() -> None:
    tensors = expected(torch.bfloat16)
    kinds = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    for rank in (0, 1):
        assert sorted(weights_of(rank, torch.bfloat16).kinds()) == sorted(kinds)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def on_two_ranks(check: Callable[..., None], tmp_path: Path) -> None:
    """Runs `check(rank, tmp_path)` on each of two ranks, of one default process group."""
    meeting = f"tcp://127.0.0.1:{free_port('127.0.0.1')}"
    arguments = (meeting, check, tmp_path)
    mp.start_processes(_with_group, args=arguments, nprocs=2, start_method="spawn")


def _with_group(rank: int, meeting: str, check: Callable[..., None], tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    check(rank, tmp_path)
    dist.destroy_process_group()


def one_leaves(rank: int) -> None:
    """Rank 1 has what rank 0 wants, and ends."""
    weights = weights_of(rank, torch.float32)
    plan = weights.plan(whole_on_rank_0, 10_000)
    exchange = Exchange(plan, rank, CPU)
    for number, bucket in enumerate(plan):
        places = [torch.empty(t.shape, dtype=t.dtype) for t, _ in bucket.targets_on(rank)]
        exchange.bring(number, list(weights.shards()), places)
    if rank == 0:
        message = f"trainer rank 1 did not exchange its part of bucket {number}: .*[Cc]onnection"
        with pytest.raises(RunError, match=message):
            exchange.bring(number, list(weights.shards()), places)


def every_way(rank: int, tmp_path: Path) -> None:
    """Sent as bfloat16, in which the biases that are always float32 could not be.

    All ranks make a call of the whole group before any exchange, which NCCL needs.
    """
    calls = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor: calls.append(all_reduce(tensor))
    weights = weights_of(rank, torch.bfloat16)
    want = expected(torch.bfloat16)
    for targets_of in (whole_on_first, whole_on_rank_0, rows_on_each):
        for bucket_bytes in (1, 60, 10_000):
            plan = weights.plan(targets_of, bucket_bytes)
            exchange = Exchange(plan, rank, CPU)
            for number, bucket in enumerate(plan):
                targets = bucket.targets_on(rank)
                places = [torch.full_like(want[t.name][box], 77) for t, box in targets]
                exchange.bring(number, list(weights.shards()), places)
                for (tensor, box), place in zip(targets, places, strict=True):
                    assert same_bits(place, want[tensor.name][box]), (tensor.name, targets_of)
    assert len(calls) == 9
    got = whole_tensors(weights)
    assert got.keys() == (want.keys() if rank == 0 else set())
    assert all(same_bits(tensor, want[name]) for name, tensor in got.items())
    one_leaves(rank)


def test_every_target_gets_its_bits_over_two_ranks_and_one_that_leaves_is_named(
    tmp_path: Path,
) -> None:
    on_two_ranks(every_way, tmp_path)


def write_twice(rank: int, tmp_path: Path) -> None:
    """No rank goes to a directory by a name that it has used before: on a network filesystem it
    may see the old one, a checkpoint by now, and write into that."""
    directories = []
    files = disk._Files

    def seen(directory: Path) -> disk._Files:
        directories.append(directory)
        return files(directory)

    disk._Files = seen
    for dtype in (torch.float32, torch.bfloat16):
        writer = CheckpointWriter(weights_of(rank, dtype), bucket_bytes=60)
        num_bytes = writer.write(tmp_path / "out", like=tmp_path / "like")
        manifest.verify(tmp_path / "out")
        assert num_bytes > 0
        found = load_file(tmp_path / "out" / "model.safetensors")
        want = expected(dtype)
        assert found.keys() == want.keys()
        assert all(same_bits(found[name], tensor) for name, tensor in want.items())
        dist.barrier()
    assert len(set(directories)) == 2


def test_two_ranks_write_one_checkpoint_in_place_of_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "config.json").write_text("{}")
    on_two_ranks(write_twice, tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]


def full(descriptor: int) -> None:
    """As fsync on a network filesystem."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_to_a_full_disk(rank: int, tmp_path: Path) -> None:
    """Rank 1 alone cannot write; both say so, and the old checkpoint stays."""
    writer = CheckpointWriter(weights_of(rank, torch.float32), bucket_bytes=60)
    writer.write(tmp_path / "out", like=tmp_path / "like")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    if rank == 1:
        fsync, os.fsync = os.fsync, full
    with pytest.raises(
        RunError, match=r"trainer rank 1: .*No space left.*out\..*/model.safetensors"
    ):
        writer.write(tmp_path / "out", like=tmp_path / "like")
    if rank == 1:
        os.fsync = fsync
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with pytest.raises(RunError, match=r"trainer rank 1: .*File too large: .*model.safetensors"):
        writer.write(tmp_path / "out", like=tmp_path / "like")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    dist.barrier()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    writer.write(tmp_path / "out", like=tmp_path / "like")


def test_a_rank_that_cannot_write_leaves_the_old_checkpoint_and_nobody_waiting(
    tmp_path: Path,
) -> None:
    (tmp_path / "like").mkdir()
    on_two_ranks(write_to_a_full_disk, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["like", "out"]


def half() -> TrainerWeights:
    """Three tensors of one rank, sent in bfloat16 but for one that always is float32."""
    tensors = {
        "odd": torch.full((3,), 1 / 3),
        BIAS: torch.full((4,), 4 + 1 / 3),
        "even": torch.full((2,), 2 / 3),
    }
    shards = [
        WeightShard(name, tuple(tensor.shape), (slice(0, len(tensor)),), tensor)
        for name, tensor in tensors.items()
    ]
    return TrainerWeights(lambda: shards, [owned(shards)], rank=0, dtype=torch.bfloat16, device=CPU)


def test_a_bias_that_is_always_float32_keeps_its_bits(tmp_path: Path) -> None:
    like = tmp_path / "like"
    like.mkdir()
    CheckpointWriter(half(), bucket_bytes=100).write(tmp_path / "out", like=like)
    for got in (whole_tensors(half()), load_file(tmp_path / "out" / "model.safetensors")):
        assert same_bits(got[BIAS], torch.full((4,), 4 + 1 / 3))
        assert same_bits(got["odd"], torch.full((3,), 1 / 3).bfloat16())
        assert got["even"].dtype == torch.bfloat16


def test_a_plan_is_made_once() -> None:
    """A further connection, or export, finds it."""
    weights = weights_of(0, torch.bfloat16)
    assert weights.plan(rows_on_each, 60) is weights.plan(rows_on_each, 60)
    assert weights.plan(rows_on_each, 60) != weights.plan(rows_on_each, 10_000)


def test_tensors_meet_on_the_device_of_the_rank() -> None:
    """Offloaded shards are on the CPU, the engines' NCCL group is not."""
    held = [WeightShard("a", (4,), (slice(0, 4),), torch.ones(4))]
    weights = TrainerWeights(
        lambda: held, [owned(held)], rank=0, dtype=torch.float32, device=torch.device("meta")
    )
    [tensor] = whole_tensors(weights).values()
    assert tensor.device.type == "meta"


@pytest.mark.parametrize("others_think", [[1, 2, 3, 4, 0], [1, 2, 3, 4], []])
def test_a_rank_that_holds_something_else_than_the_others_think_is_named(
    others_think: list[int],
) -> None:
    shards = shards_of(1)
    theirs = owned([shards[number] for number in others_think])
    with pytest.raises(ValueError, match="trainer rank 1 holds OwnedShard.name='rows'"):
        TrainerWeights(
            lambda: shards,
            [owned(shards_of(0)), theirs],
            rank=1,
            dtype=torch.float32,
            device=CPU,
        )
