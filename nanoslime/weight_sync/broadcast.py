"""Broadcasts weights from trainer ranks to every rank of every engine.

    a rank with a part of the bucket  --its shards-->  the bucket's sender, into a flat tensor
    the bucket's sender               --broadcast--->  all engine ranks, in a group of its own

Every pipeline stage has a sender, and every expert-parallel rank sends its own experts. They
take turns in the order of the plan, which all know: a turn is a run of consecutive buckets of
one sender, of which the engines are told in one call. A sender has two flat tensors: one fills
while the other is on the wire and in the engines' loaders.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate, batched, groupby
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanoslime.batch import WeightShard
from nanoslime.process_groups import join_group, shared_store
from nanoslime.sealed_bucket import Place, seal
from nanoslime.types import MachineFailure, WeightGroup
from nanoslime.weight_sync.engine_calls import EngineCalls, EnginesFailed
from nanoslime.weight_sync.exchange import Exchange
from nanoslime.weight_sync.plan import MAX_RUN, FlatBucket, whole_on_first
from nanoslime.weight_sync.transport import EngineSide, RankSide, Sent

logger = logging.getLogger(__name__)

NUM_FLAT = 2
# A rank holds NUM_FLAT buckets and, while it fills one, the parts of it that arrive. All of
# that fits into two times weight_sync.bucket_bytes.
SHARE = 2 / (NUM_FLAT + 1)
# What a rank says of its turn.
_WELL = b"well"
_FAILED = b"failed"


@dataclass(frozen=True, slots=True)
class _Run:
    """The buckets of one turn."""

    turn: int
    numbers: tuple[int, ...]
    sender: int


@dataclass(slots=True)
class _Flat:
    """A tensor for one bucket, which has its first bytes. On a CPU both events are None."""

    tensor: Tensor
    number: int = -1
    is_full: torch.cuda.Event | None = None
    is_free: torch.cuda.Event | None = None


@dataclass(slots=True)
class _Update:
    """A rank's state between the first bucket of a version and the last."""

    version: int
    compares: bool
    shards: list[WeightShard]
    free: SimpleQueue[_Flat] = field(default_factory=SimpleQueue)
    full: deque[_Flat] = field(default_factory=deque)
    num_filled: int = 0
    is_well: bool = True
    num_bytes: int = 0
    gather_s: float = 0.0
    wire_s: float = 0.0
    load_s: float = 0.0


class Turns:
    """The turns of one sync; `ranks` has the rank of each.

    Ranks act one after another, in an order that all of them know: no lock that could leak. A
    key of the store says that the turn before is over.
    """

    def __init__(
        self, store: dist.Store, sync: str, ranks: Sequence[int], deadline_s: float
    ) -> None:
        self._store = store
        self._sync = sync
        self._ranks = ranks
        self._deadline_s = deadline_s

    def wait(self, turn: int) -> bool:
        """Waits until the turn before is over; False where it failed, or one before it.

        Raises RunError that names its rank after the deadline, or where the store is gone.
        """
        if turn == 0:
            return True
        key = self._key(turn)
        try:
            self._store.wait([key], timedelta(seconds=self._deadline_s))
            went_well = self._store.get(key) == _WELL
            self._store.delete_key(key)
        except RuntimeError as e:
            raise MachineFailure(
                f"trainer rank {self._ranks[turn - 1]} did not say within {self._deadline_s:g}s "
                f"that its turn {turn - 1} of {len(self._ranks)} to send weights is over: {e}"
            ) from e
        return went_well

    def over(self, turn: int, *, well: bool) -> None:
        """The next turn may begin."""
        self._store.set(self._key(turn + 1), _WELL if well else _FAILED)

    def _key(self, turn: int) -> str:
        return f"{self._sync}/{turn}"


class BroadcastSender:
    """A `Sender`. A rank that sends no bucket only brings its shards."""

    def __init__(self, rank: RankSide, engines: EngineSide):
        weights = rank.weights
        self._weights = weights
        self._deadline_s = rank.deadline_s
        plan = weights.plan(whole_on_first, int(rank.bucket_bytes * SHARE))
        self._exchange = Exchange(plan, weights.rank, weights.device)
        self._num_buckets = len(plan)
        self._runs = list(runs_of([bucket.first_rank for bucket in plan]))
        self._run_of = {number: run for run in self._runs for number in run.numbers}
        # All ranks fill in this order: first what every sender has room for before the pause.
        self._order, self._num_prepared = _filling_order(self._runs)
        self._flat_buckets = {
            number: FlatBucket(bucket)
            for number, bucket in enumerate(plan)
            if bucket.first_rank == weights.rank
        }
        self._store = shared_store(engines.address, rank.deadline_s)
        self._num_syncs = 0
        self._update: _Update | None = None
        self._wire: _Wire | None = None
        self._open(rank, engines)

    def prepare(self, version: int, *, compares: bool = False) -> None:
        """Fills flat tensors, as far as every sender has one that is free."""
        update = _Update(version, compares, list(self._weights.shards()))
        if self._flat_buckets:
            num_bytes = max(bucket.nbytes for bucket in self._flat_buckets.values())
            for _ in range(NUM_FLAT):
                tensor = torch.empty(num_bytes, dtype=torch.uint8, device=self._weights.device)
                update.free.put(_Flat(tensor))
        for _ in range(self._num_prepared):
            self._fill(update)
        self._update = update

    def send(self, version: int, *, compares: bool = False) -> Sent:
        asked = (version, compares)
        if self._update is None or (self._update.version, self._update.compares) != asked:
            self.prepare(version, compares=compares)
        update, self._update = self._update, None
        self._num_syncs += 1
        sync = str(self._num_syncs)
        senders = [run.sender for run in self._runs]
        turns = Turns(self._store, sync, senders, 2 * self._deadline_s)
        sends: list[Future[None]] = []
        with ThreadPoolExecutor(1, thread_name_prefix="weights") as wire:
            while update.full or update.num_filled < self._num_buckets:
                if not update.full:
                    self._fill(update)
                while update.full:
                    sends.append(
                        wire.submit(self._send_in_turn, update, update.full.popleft(), turns)
                    )
        for send in sends:
            send.result()
        times = {
            "time/weight_sync_gather_s": update.gather_s,
            "time/weight_sync_wire_s": update.wire_s,
            "time/weight_sync_load_s": update.load_s,
        }
        return Sent(update.num_bytes, times=times)

    def close(self) -> None:
        """Leaves the group; the driver has the engines do so."""
        if self._wire is not None:
            self._wire.close()

    def _open(self, rank: RankSide, engines: EngineSide) -> None:
        """The senders open their groups one after the other, so that engines join in one order."""
        senders = sorted({run.sender for run in self._runs})
        turns = Turns(self._store, "open", senders, len(senders) * rank.deadline_s)
        if self._weights.rank not in senders:
            return
        turn = senders.index(self._weights.rank)
        is_well = turns.wait(turn)
        try:
            if is_well:
                is_well = False
                self._wire = _Wire(rank, engines, self._store)
                is_well = True
        finally:
            turns.over(turn, well=is_well)
            if turn == 0:
                # The store lives on this rank, and the others still need it to take their turns.
                turns.wait(len(senders))

    def _fill(self, update: _Update) -> None:
        """Brings the shards of the next bucket to its sender, once that has room for it."""
        number = self._order[update.num_filled]
        update.num_filled += 1
        bucket = self._flat_buckets.get(number)
        if bucket is None:
            self._exchange.bring(number, update.shards, [])
            return
        flat = update.free.get()
        flat.number = number
        begin = time.monotonic()
        if flat.is_free is not None:
            flat.is_free.wait()
        within = flat.tensor[: bucket.nbytes]
        self._exchange.bring(number, update.shards, bucket.views(within))
        place = Place(update.version, number, self._num_buckets, update.compares)
        seal(within, place, bucket.parts)
        if within.is_cuda:
            flat.is_full = torch.cuda.current_stream().record_event()
        update.full.append(flat)
        update.gather_s += time.monotonic() - begin

    def _send_in_turn(self, update: _Update, flat: _Flat, turns: Turns) -> None:
        """Sends nothing more once something has failed, here or in an earlier turn."""
        run = self._run_of[flat.number]
        is_first = flat.number == run.numbers[0]
        is_last = flat.number == run.numbers[-1]
        bucket = self._flat_buckets[flat.number]
        is_well = update.is_well
        update.is_well = False
        try:
            if is_first:
                is_well = turns.wait(run.turn) and is_well
            if is_well:
                begin = time.monotonic()
                if is_first:
                    self._wire.announce([self._flat_buckets[number] for number in run.numbers])
                self._wire.send(bucket, flat, update.version)
                sent = time.monotonic()
                update.wire_s += sent - begin
                update.num_bytes += bucket.nbytes
                if is_last:
                    self._wire.collect(update.version)
                    update.load_s += time.monotonic() - sent
            update.is_well = is_well
        finally:
            # It comes first, as the next bucket waits for it even if the store is gone.
            update.free.put(flat)
            if is_last and run.turn + 1 < len(self._runs):
                turns.over(run.turn, well=update.is_well)


def runs_of(senders: Sequence[int]) -> Iterator[_Run]:
    """The turns of a plan, by the sender of each of its buckets."""
    turn = 0
    for sender, of_sender in groupby(range(len(senders)), key=senders.__getitem__):
        for numbers in batched(of_sender, MAX_RUN):
            yield _Run(turn, numbers, sender)
            turn += 1


def _filling_order(runs: Sequence[_Run]) -> tuple[list[int], int]:
    """The buckets of all runs, the first NUM_FLAT of every sender before the others, and how
    many these are."""
    by_sender: dict[int, list[int]] = {}
    for run in runs:
        by_sender.setdefault(run.sender, []).extend(run.numbers)
    first = {number for numbers in by_sender.values() for number in numbers[:NUM_FLAT]}
    numbers = [number for run in runs for number in run.numbers]
    return sorted(numbers, key=lambda number: number not in first), len(first)


class _Wire:
    """The way from one sender to all engines: their HTTP servers, and a process group.

    The sender is the first rank of the group, those of the engines follow.
    """

    def __init__(self, rank: RankSide, engines: EngineSide, store: dist.TCPStore):
        self.group_name = f"{engines.group}-{rank.weights.rank}"
        self._rank = rank.weights.rank
        self._deadline_s = rank.deadline_s
        self._calls = EngineCalls(engines.engines)
        is_cuda = rank.weights.device.type == "cuda"
        self._stream = torch.cuda.Stream(rank.weights.device) if is_cuda else None
        self._announced: list[Future[Any]] = []
        self._group = self._join(engines.address, store, "nccl" if is_cuda else "gloo")

    def announce(self, buckets: Sequence[FlatBucket]) -> None:
        """Tells every engine which buckets come now; it answers when it has loaded them."""
        names: list[str] = []
        shapes: list[list[int]] = []
        dtypes: list[str] = []
        for bucket in buckets:
            names += bucket.names
            shapes += [list(shape) for shape in bucket.shapes]
            dtypes += [str(dtype).removeprefix("torch.") for dtype in bucket.dtypes]
        self._announced = self._calls.start(
            "receive_buckets", names=names, shapes=shapes, dtypes=dtypes, group=self.group_name
        )

    def send(self, bucket: FlatBucket, flat: _Flat, version: int) -> None:
        """Sends the next bucket of the run; on a CPU it is on its way to the engines' loaders
        when this returns."""
        data = flat.tensor[: bucket.nbytes]
        with self._abort_if_broken(version):
            if self._stream is None:
                work = dist.broadcast(data, group_src=0, group=self._group, async_op=True)
                self._wait(work, version)
                return
            with torch.cuda.stream(self._stream):
                flat.is_full.wait()
                dist.broadcast(data, group_src=0, group=self._group, async_op=True).wait()
                flat.is_free = self._stream.record_event()

    def collect(self, version: int) -> None:
        """Returns when every engine has loaded the run."""
        with self._abort_if_broken(version):
            what = f"receive weights of version {version}"
            self._calls.collect(self._announced, what, self._deadline_s)

    def _wait(self, work: dist.Work, version: int) -> None:
        """Waits for a broadcast, but not if an engine refuses to receive it."""
        over: Future[None] = Future()
        # `work` itself learns it a moment later than its future.
        work.get_future().then(lambda _: over.set_result(None))
        done, _ = wait([over, *self._announced], self._deadline_s, return_when=FIRST_COMPLETED)
        if self._calls.failures_of(self._announced):
            self.collect(version)
        if not done:
            raise EnginesFailed(
                f"trainer rank {self._rank}: the broadcast of version {version} is not over after "
                f"{self._deadline_s:.0f}s",
                {},
            )
        work.wait()

    @contextmanager
    def _abort_if_broken(self, version: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as e:
            # NCCL would wait for an engine that is gone, and end this process after a while.
            self._group.abort()
            if isinstance(e, EnginesFailed):
                raise
            # Neither gloo nor NCCL says who is gone.
            raise EnginesFailed(f"the broadcast of version {version} broke: {e}", {}) from e

    def close(self) -> None:
        self._calls.close()
        dist.destroy_process_group(self._group)
        # Its last reference waits for what gloo still sends to an engine that hangs.
        held = [self._group]
        del self._group
        threading.Thread(target=held.clear, daemon=True).start()

    def _join(self, address: str, store: dist.TCPStore, backend: str) -> dist.ProcessGroup:
        sizes = [engine.world_size for engine in self._calls.engines]
        *offsets, world_size = accumulate(sizes, initial=1)
        asked = WeightGroup(self.group_name, address, store.port, world_size, backend)
        joins = [
            self._calls.start_one(engine, "join_weight_group", group=asked, first_rank=offset)
            for engine, offset in zip(self._calls.engines, offsets, strict=True)
        ]
        try:
            group = join_group(store, asked, rank=0, timeout_s=self._deadline_s)
        except RuntimeError as e:
            failures = self._calls.failures_of(joins)
            causes = [failure.cause for failure in failures.values()]
            raise EnginesFailed(
                f"trainer rank {self._rank}: no weight group at {address}:{store.port} within "
                f"{self._deadline_s:.0f}s: {'; '.join(causes) or e}",
                failures,
            ) from e
        self._calls.collect(joins, "join the weight group", self._deadline_s)
        logger.info(
            "weight group of %d ranks at %s:%d over %s", world_size, address, store.port, backend
        )
        return group
