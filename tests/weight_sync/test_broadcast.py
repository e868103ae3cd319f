"""The ranks of a broadcast fail together: whatever one of them meets, no other waits for it."""

import gc
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanoslime.batch import OwnedShard, WeightShard
from nanoslime.process_groups import join_group
from nanoslime.sealed_bucket import HEADER_BYTES
from nanoslime.types import RunError, WeightGroup
from nanoslime.weight_sync import broadcast
from nanoslime.weight_sync.broadcast import BroadcastSender, Turns
from nanoslime.weight_sync.engine_calls import EnginesFailed
from nanoslime.weight_sync.plan import TrainerWeights
from nanoslime.weight_sync.transport import EngineSide, RankSide
from tests import process_table
from tests.weight_sync.test_trainer_weights import CPU, on_two_ranks

NUM_TENSORS = 6


class Refusing:
    """An engine that joins no group."""

    name = "a"
    world_size = 1

    def join_weight_group(self, **asked: object) -> None:
        raise RunError("engine a refuses")


class Hanging:
    """An engine that joins its group, hangs then, and refuses buckets all the same."""

    name = "a"
    world_size = 1

    def __init__(self) -> None:
        self.process: Any = None

    def join_weight_group(self, group: WeightGroup, first_rank: int) -> None:
        context = mp.get_context("spawn")
        arguments = (group, first_rank)
        self.process = context.Process(target=join_and_hang, args=arguments, daemon=True)
        self.process.start()
        assert process_table.wait_for(lambda: is_stopped(self.process.pid), 60)

    def receive_buckets(self, **buckets: object) -> None:
        raise RunError("engine a refuses")


def join_and_hang(group: WeightGroup, first_rank: int) -> None:
    store = dist.TCPStore(group.address, group.port, is_master=False)
    join_group(store, group, first_rank, timeout_s=60)
    os.kill(os.getpid(), signal.SIGSTOP)


def is_stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def sender_of(
    rank: int, deadline_s: float, *engines: object, num_ranks: int = 2, num_elements: int = 4
) -> BroadcastSender:
    """All ranks have tensors of their own, each a bucket; they take turns without engines too."""

    def shards_of(rank: int) -> list[WeightShard]:
        box = (slice(0, num_elements),)
        return [
            WeightShard(f"{rank}.{number}", (num_elements,), box, torch.ones(num_elements))
            for number in range(NUM_TENSORS)
        ]

    owned = [
        [OwnedShard(shard.name, shard.full_shape, shard.slices) for shard in shards_of(number)]
        for number in range(num_ranks)
    ]
    weights = TrainerWeights(lambda: shards_of(rank), owned, rank, torch.float32, CPU)
    side = EngineSide(engines, [[]] * len(engines), "127.0.0.1", Path(), "group")
    # Room for one of them.
    return BroadcastSender(RankSide(weights, 6 * num_elements, Path(), deadline_s), side)


def test_a_sender_sends_runs_and_fills_what_it_has_room_for_before_the_others_do(
    monkeypatch,
) -> None:
    """All ranks know the order: without it two of them could wait for each other."""
    monkeypatch.setattr(broadcast, "MAX_RUN", 3)
    runs = list(broadcast.runs_of([0, 0, 0, 2, 2, 2, 0, 0, 0, 0, 2]))
    assert [run.sender for run in runs] == [0, 2, 0, 0, 2]
    assert [run.numbers for run in runs] == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9,), (10,)]
    assert [run.turn for run in runs] == [0, 1, 2, 3, 4]
    order, num_prepared = broadcast._filling_order(runs)
    assert order[:num_prepared] == [0, 1, 3, 4]
    assert order[num_prepared:] == [2, 5, 6, 7, 8, 9, 10]


def test_a_broadcast_that_cannot_begin_is_a_fault_of_the_engines(monkeypatch) -> None:
    """NCCL makes its connections in the first one, so that it may raise at once."""

    def broken(*tensors: object, **options: object) -> None:
        raise RuntimeError("remote process exited")

    sender = sender_of(0, 10.0, num_ranks=1)
    assert sender.send(1).num_bytes > 0
    monkeypatch.setattr(dist, "broadcast", broken)
    with pytest.raises(EnginesFailed, match="broadcast of version 2 broke: remote process exited"):
        sender.send(2)
    sender.close()


def test_a_sender_is_closed_at_once_beside_an_engine_that_hangs() -> None:
    """gloo waits for what it has begun to send until the deadline of the group."""
    engine = Hanging()
    sender = sender_of(0, 20.0, engine, num_ranks=1, num_elements=1 << 22)
    begin = time.monotonic()
    with pytest.raises(EnginesFailed, match="engine a refuses"):
        sender.send(1)
    sender.close()
    del sender
    gc.collect()
    seconds = time.monotonic() - begin
    engine.process.kill()
    engine.process.join()
    assert seconds < 10.0


def open_refused(rank: int, tmp_path: Path) -> None:
    """Rank 1 is late to take its turn: rank 0, where the store lives, has had its own."""
    wait = Turns.wait

    def late(turns: Turns, turn: int) -> bool:
        end = time.monotonic() + 3.0
        while rank == 1 and not (tmp_path / "gone").exists() and time.monotonic() < end:
            time.sleep(0.01)
        return wait(turns, turn)

    broadcast.Turns.wait = late  # in this process only
    if rank == 0:
        with pytest.raises(EnginesFailed, match="engine a refuses"):
            sender_of(rank, 2.0, Refusing())
        (tmp_path / "gone").touch()
    else:
        sender_of(rank, 2.0, Refusing()).close()
    broadcast.Turns.wait = wait


def lose_the_store(rank: int, tmp_path: Path) -> None:
    """What rank 0 says never arrives: it fails at once, and the other one after its deadline."""
    sender = sender_of(rank, 2.0)
    assert sender.send(1).num_bytes == NUM_TENSORS * (HEADER_BYTES + 16)

    def gone(turns: Turns, turn: int, *, well: bool) -> None:
        raise RuntimeError("the store is gone")

    if rank == 0:
        broadcast.Turns.over = gone
    problem = "the store is gone" if rank == 0 else "trainer rank 0 did not say within 4s that its"
    with pytest.raises(RuntimeError, match=problem):
        sender.send(2)
    dist.barrier()
    sender.close()


def fail_together(rank: int, tmp_path: Path) -> None:
    open_refused(rank, tmp_path)
    lose_the_store(rank, tmp_path)


def test_a_rank_that_fails_lets_no_other_wait_and_keeps_the_store_for_their_turns(
    tmp_path: Path,
) -> None:
    on_two_ranks(fail_together, tmp_path)
