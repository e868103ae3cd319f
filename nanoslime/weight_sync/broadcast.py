"""Broadcasts weights from trainer ranks to every rank of every engine.

    a rank with a part of the bucket  --its shards-->  the bucket's sender, into a flat tensor
    the bucket's sender               --broadcast--->  all engine ranks, in a group of its own

Every pipeline stage has a sender, and every expert-parallel rank sends its own experts. They
take turns in the order of the plan, which all know. A sender has two flat tensors: one fills
while the other is on the wire and in the engines' loaders.
"""

import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from queue import SimpleQueue

import torch
import torch.distributed as dist
from torch import Tensor

from nanoslime.batch import WeightShard
from nanoslime.process_groups import join_group, shared_store
from nanoslime.sealed_bucket import Place, seal
from nanoslime.weight_sync.engine_calls import EngineCalls, EnginesFailed
from nanoslime.weight_sync.exchange import Exchange
from nanoslime.weight_sync.flat import FlatBucket
from nanoslime.weight_sync.plan import whole_on_first
from nanoslime.weight_sync.transport import EngineSide, RankSide, Sent
from nanoslime.weight_sync.turns import Turns

logger = logging.getLogger(__name__)

NUM_FLAT = 2
# A rank holds NUM_FLAT buckets and, while it fills one, the parts of it that arrive. All of
# that fits into two times weight_sync.bucket_bytes.
SHARE = 2 / (NUM_FLAT + 1)


@dataclass(slots=True)
class _Full:
    """A bucket that is ready to be sent, in the first bytes of `flat`."""

    number: int
    flat: Tensor
    ready: torch.cuda.Event | None  # None on a CPU


@dataclass(slots=True)
class _Update:
    """A rank's state between the first bucket of a version and the last."""

    version: int
    compares: bool
    shards: list[WeightShard]
    free: SimpleQueue[Tensor] = field(default_factory=SimpleQueue)
    full: deque[_Full] = field(default_factory=deque)
    next: int = 0  # the bucket that is filled next
    is_well: bool = True
    num_bytes: int = 0
    gather_s: float = 0.0
    wire_s: float = 0.0
    load_s: float = 0.0


class BroadcastSender:
    """A `Sender`. A rank that sends no bucket only brings its shards."""

    def __init__(self, rank: RankSide, engines: EngineSide):
        weights = rank.weights
        self._weights = weights
        self._deadline_s = rank.deadline_s
        plan = weights.plan(whole_on_first, int(rank.bucket_bytes * SHARE))
        self._exchange = Exchange(plan, weights.rank, weights.device)
        self._senders = [bucket.first_rank for bucket in plan]
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
                flat = torch.empty(num_bytes, dtype=torch.uint8, device=self._weights.device)
                update.free.put(flat)
        num_filled: dict[int, int] = {}
        for sender in self._senders:
            num_filled[sender] = num_filled.get(sender, 0) + 1
            if num_filled[sender] > NUM_FLAT:
                break
            self._fill(update)
        self._update = update

    def send(self, version: int, *, compares: bool = False) -> Sent:
        asked = (version, compares)
        if self._update is None or (self._update.version, self._update.compares) != asked:
            self.prepare(version, compares=compares)
        update, self._update = self._update, None
        self._num_syncs += 1
        sync = str(self._num_syncs)
        turns = Turns(self._store, sync, self._senders, 2 * self._deadline_s)
        sends: list[Future[None]] = []
        with ThreadPoolExecutor(1, thread_name_prefix="weights") as wire:
            while update.full or update.next < len(self._senders):
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
        senders = sorted(set(self._senders))
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
        number = update.next
        update.next += 1
        bucket = self._flat_buckets.get(number)
        if bucket is None:
            self._exchange.bring(number, update.shards, [])
            return
        flat = update.free.get()
        begin = time.monotonic()
        within = flat[: bucket.nbytes]
        self._exchange.bring(number, update.shards, bucket.views(within))
        place = Place(update.version, number, len(self._senders), update.compares)
        seal(within, place, bucket.parts)
        ready = None
        if flat.device.type == "cuda":
            ready = torch.cuda.current_stream().record_event()
        update.full.append(_Full(number, flat, ready))
        update.gather_s += time.monotonic() - begin

    def _send_in_turn(self, update: _Update, full: _Full, turns: Turns) -> None:
        """Sends nothing more once something has failed, here or in an earlier turn."""
        is_well = update.is_well
        update.is_well = False
        before, after = self._neighbours(full.number)
        try:
            if before not in (None, self._weights.rank):
                is_well = turns.wait(full.number) and is_well
            if is_well:
                begin = time.monotonic()
                bucket = self._flat_buckets[full.number]
                wire_s = self._wire.send(bucket, full, update.version)
                update.wire_s += wire_s
                update.load_s += time.monotonic() - begin - wire_s
                update.num_bytes += bucket.nbytes
            update.is_well = is_well
        finally:
            # It comes first, as the next bucket waits for it even if the store is gone.
            update.free.put(full.flat)
            if after not in (None, self._weights.rank):
                turns.over(full.number, well=update.is_well)

    def _neighbours(self, number: int) -> tuple[int | None, int | None]:
        """Who sends the bucket before, and the one after."""
        before = self._senders[number - 1] if number > 0 else None
        after = self._senders[number + 1] if number + 1 < len(self._senders) else None
        return before, after


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
        self._group = self._join(engines.address, store, "nccl" if is_cuda else "gloo")

    def send(self, bucket: FlatBucket, full: _Full, version: int) -> float:
        """Returns when every engine has loaded the bucket: the seconds of the broadcast."""
        begin = time.monotonic()
        announced = self._calls.start(
            "receive_bucket",
            names=bucket.names,
            shapes=[list(shape) for shape in bucket.shapes],
            dtypes=[str(dtype).removeprefix("torch.") for dtype in bucket.dtypes],
            group=self.group_name,
        )
        what = f"receive weights of version {version}"
        try:
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                if self._stream:
                    self._stream.wait_event(full.ready)
                flat = full.flat[: bucket.nbytes]
                work = dist.broadcast(flat, group_src=0, group=self._group, async_op=True)
            over = work.get_future().then(lambda _: time.monotonic())
            self._calls.collect(announced, what, self._deadline_s)
            work.wait()
        except RuntimeError as e:
            # NCCL would wait for an engine that is gone, and end this process after a while.
            self._group.abort()
            if isinstance(e, EnginesFailed):
                raise
            # Neither gloo nor NCCL says who is gone.
            raise EnginesFailed(f"the broadcast of version {version} broke: {e}", {}) from e
        # A stream's work is over when its engines have answered, as far as the host knows.
        return (time.monotonic() if self._stream else over.wait()) - begin

    def close(self) -> None:
        self._calls.close()
        dist.destroy_process_group(self._group)

    def _join(self, address: str, store: dist.TCPStore, backend: str) -> dist.ProcessGroup:
        sizes = [engine.world_size for engine in self._calls.engines]
        *offsets, world_size = accumulate(sizes, initial=1)
        joins = [
            self._calls.start_one(
                engine,
                "init_weight_group",
                address=address,
                port=store.port,
                rank_offset=offset,
                world_size=world_size,
                group=self.group_name,
                backend=backend,
            )
            for engine, offset in zip(self._calls.engines, offsets, strict=True)
        ]
        try:
            group = join_group(
                store,
                rank=0,
                world_size=world_size,
                name=self.group_name,
                backend=backend,
                timeout_s=self._deadline_s,
            )
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
