"""Gives requests to engines. It lives in one event loop, and all of it is called there.

request ──> queue ──> the engine of its key, or the least busy ──> answer
              ^                        │ fails
              └──── once more ─────────┘
"""

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from nanoslime.types import Engine, GenerateRequest, Generation, RequestFailed, RunError, Status

logger = logging.getLogger(__name__)

# A request is tried so often on healthy engines, and so is the health check that decides on one.
_NUM_TRIES = 2
_HEALTH_PAUSE_S = 1.0
# A request that was on so many engines when they were lost is not tried again: it may be why.
_MAX_LOSSES = 4
# An engine that has requests and has answered none for so long has its health checked.
_SILENCE_S = 30.0
# A request leaves the engine of its key for one that has so many sequences fewer.
_MARGIN = 16
# The engines of so many keys are remembered.
_MAX_KEYS = 65_536
# Requests on an engine that is taken away have so long to give back the tokens they have.
_FAREWELL_S = 10.0
_INTERRUPT_AGAIN_S = 0.5
_INTERRUPT_DEADLINE_S = 30.0
# Control calls to engines that run at once.
_MAX_THREADS = 64


@dataclass(slots=True)
class EngineCounts:
    """What became of the requests to one engine since the counts were last asked for."""

    requests: int = 0
    failures: int = 0
    tokens: int = 0
    latency_s: float = 0.0  # of all answers together
    parse_s: float = 0.0


@dataclass(eq=False, slots=True)
class _Slot:
    """An engine, and the requests that it has."""

    engine: Engine
    inflight: int = 0  # sequences
    calls: set[asyncio.Task[list[Generation]]] = field(default_factory=set)
    # When it has answered last, or has got its first request.
    heard: float = 0.0
    counts: EngineCounts = field(default_factory=EngineCounts)
    watch: asyncio.Task[None] | None = None
    # Requests that fail together wait for the same check.
    check: asyncio.Task[None] | None = None
    # Whether a request has failed though the engine is healthy, which is said once.
    failed_once: bool = False


@dataclass(eq=False, slots=True)
class _Ticket:
    """A request that waits for room on an engine."""

    n: int
    key: str
    avoid: str
    granted: asyncio.Future[_Slot]


class Router:
    """Spreads requests over the engines of `set_engines`.

    A request goes to the engine that had the last one of its key, whose cache knows its
    prompt, unless that is busier than the least busy one by a margin. An engine has at most
    `max_inflight` sequences, and the other requests wait in order of arrival; so they do while
    there is no engine, for somebody else has to decide whether one comes back.

    A request that fails on a healthy engine is tried once more, elsewhere where it can be, and
    then its samples have status error. An engine that is not healthy is lost: it gets no
    requests, what it had goes elsewhere, and `take_lost` names it with the cause.
    """

    def __init__(self, engines: Sequence[Engine] = (), *, max_inflight: int = 256) -> None:
        # The causes of engines that were lost since `take_lost` was called last.
        self.lost: dict[str, str] = {}
        self._max_inflight = max_inflight
        self._slots: dict[str, _Slot] = {}
        self._engine_of: OrderedDict[str, str] = OrderedDict()
        self._queue: deque[_Ticket] = deque()
        self._holds = False  # for a sync
        self._num_interrupts = 0  # that are under way
        self._farewells: set[asyncio.Task[None]] = set()
        # Those of the event loop are the environments' own: all may wait for tokens.
        self._threads = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="router")
        self._add(engines)

    async def generate(self, request: GenerateRequest, key: str = "") -> list[Generation]:
        """Waits until an engine has room; the request's own deadline begins when it is sent.

        Raises RunError for a request that no engine can take.
        """
        num_failures = 0
        num_losses = 0
        avoid = ""
        while True:
            slot = await self._place(request.n, key, avoid)
            avoid = slot.engine.name
            try:
                answer = await self._send(slot, request)
            except RequestFailed as e:
                cause = str(e)
                if self._serves(slot) and not self._holds:
                    await self._judge(slot, cause)
                if not self._serves(slot):
                    num_losses += 1
                elif not self._holds:
                    num_failures += 1
                    self._tell(slot, cause)
                # Otherwise a sync has begun, which finds out what the engine has.
            else:
                if answer is not None:
                    return answer
                cause = f"engine {avoid} was lost or taken away"
                num_losses += 1
            if num_failures == _NUM_TRIES or num_losses == _MAX_LOSSES:
                return [Generation([], [], Status.ERROR, [], error=cause)] * request.n

    def set_engines(self, engines: Sequence[Engine]) -> None:
        """These serve from now on, with what they already have. Each has a name of its own.

        Requests on others are ended there, with the tokens that they have where their engine
        still gives them.
        """
        for name, slot in list(self._slots.items()):
            if slot.engine not in engines:
                del self._slots[name]
                if slot.calls:
                    farewell = asyncio.create_task(self._take_leave(slot))
                    self._farewells.add(farewell)
                    farewell.add_done_callback(self._farewells.discard)
        self._add(engines)
        self._holds = False
        for slot in self._slots.values():
            slot.heard = time.monotonic()  # it was not asked in a sync
        self._grant()

    def drain(self) -> None:
        """Sends nothing, and judges no engine, until the next `set_engines`."""
        self._holds = True

    async def interrupt(self) -> None:
        """Ends what runs, with status aborted and the tokens that it has.

        Whoever asks again at once is sent when this returns.
        """
        self._num_interrupts += 1
        try:
            await asyncio.gather(*(self._interrupt(slot) for slot in self._slots.values()))
        finally:
            self._num_interrupts -= 1
            self._grant()

    def take_lost(self) -> dict[str, str]:
        """The engines that were lost since the last call, with the cause of each."""
        lost = self.lost
        self.lost = {}
        return lost

    async def close(self) -> None:
        """Ends what it does in the background; nobody waits for an answer any more."""
        tasks = list(self._farewells)
        for slot in self._slots.values():
            tasks += [task for task in (slot.watch, slot.check) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False)

    def metrics(self) -> dict[str, float]:
        """By engine: sequences in flight, and what came of its requests since the last call."""
        found: dict[str, float] = {"router/queued": float(len(self._queue)), "time/parse_s": 0.0}
        for name, slot in self._slots.items():
            counts = {"inflight": slot.inflight, **asdict(slot.counts)}
            slot.counts = EngineCounts()
            counts["latency_s"] /= max(1, counts["requests"] - counts["failures"])
            found["time/parse_s"] += counts.pop("parse_s")
            for what, count in counts.items():
                found[f"router/{name}/{what}"] = float(count)
        return found

    def _add(self, engines: Sequence[Engine]) -> None:
        for engine in engines:
            if engine.name not in self._slots:
                self._slots[engine.name] = _Slot(engine)

    def _serves(self, slot: _Slot) -> bool:
        return self._slots.get(slot.engine.name) is slot

    async def _place(self, n: int, key: str, avoid: str) -> _Slot:
        """Waits for an engine with room for `n` sequences, and counts them as in flight there."""
        ticket = _Ticket(n, key, avoid, asyncio.get_running_loop().create_future())
        self._queue.append(ticket)
        self._grant()
        try:
            return await ticket.granted
        except asyncio.CancelledError:
            if not ticket.granted.cancelled():
                self._release(ticket.granted.result(), n)
            elif ticket in self._queue:
                self._queue.remove(ticket)
                self._grant()  # it may have kept others waiting
            raise

    def _grant(self) -> None:
        """Gives the first in the queue their engines, as long as there is room."""
        while self._queue and not self._holds and not self._num_interrupts:
            ticket = self._queue[0]
            if ticket.granted.cancelled():  # whoever waited has not yet come to hear of it
                self._queue.popleft()
                continue
            slot = self._choose(ticket)
            if slot is None:
                return
            self._queue.popleft()
            slot.inflight += ticket.n
            ticket.granted.set_result(slot)

    def _choose(self, ticket: _Ticket) -> _Slot | None:
        """The engine for the first request of the queue; None while none has room."""
        names = [name for name in self._slots if name != ticket.avoid] or list(self._slots)
        free = [self._slots[name] for name in names if self._has_room(name, ticket.n)]
        if not free:
            return None
        least = min(free, key=lambda slot: slot.inflight)
        if not ticket.key:
            return least
        known = self._slots.get(self._engine_of.get(ticket.key, ""))
        chosen = known if known in free and known.inflight < least.inflight + _MARGIN else least
        self._engine_of[ticket.key] = chosen.engine.name
        self._engine_of.move_to_end(ticket.key)
        if len(self._engine_of) > _MAX_KEYS:
            self._engine_of.popitem(last=False)
        return chosen

    def _has_room(self, name: str, n: int) -> bool:
        inflight = self._slots[name].inflight
        return inflight == 0 or inflight + n <= self._max_inflight

    def _release(self, slot: _Slot, n: int) -> None:
        slot.inflight -= n
        self._grant()

    async def _send(self, slot: _Slot, request: GenerateRequest) -> list[Generation] | None:
        """The engine's answer; None where the engine was lost or taken away meanwhile."""
        start = time.monotonic()
        call = asyncio.create_task(slot.engine.generate(request))
        if not slot.calls:
            slot.heard = start
        slot.calls.add(call)
        if slot.watch is None or slot.watch.done():
            slot.watch = asyncio.create_task(self._watch(slot))
        slot.counts.requests += 1
        try:
            await asyncio.wait([call])
            if call.cancelled():
                slot.counts.failures += 1
                return None
            answer = call.result()
        except RequestFailed:
            slot.counts.failures += 1
            raise
        finally:
            call.cancel()
            slot.calls.discard(call)
            if not slot.calls and slot.watch is not None:
                slot.watch.cancel()
                slot.watch = None  # the next request may come before it has ended
            self._release(slot, request.n)
        slot.heard = time.monotonic()
        slot.counts.latency_s += slot.heard - start
        slot.counts.tokens += sum(len(generation.token_ids) for generation in answer)
        slot.counts.parse_s += sum(generation.parse_s for generation in answer)
        return answer

    async def _watch(self, slot: _Slot) -> None:
        """Judges an engine that is silent, as long as it has requests."""
        while self._serves(slot):
            silent_s = time.monotonic() - slot.heard
            if silent_s >= _SILENCE_S and not self._holds:
                name = slot.engine.name
                await self._judge(slot, f"engine {name} answered nothing for {silent_s:.0f} s")
                slot.heard = time.monotonic()
            else:
                await asyncio.sleep(max(_SILENCE_S - silent_s, _SILENCE_S / 10))

    async def _judge(self, slot: _Slot, cause: str) -> None:
        """Returns when the engine was found healthy, or is lost."""
        if slot.check is None or slot.check.done():
            slot.check = asyncio.create_task(self._check(slot, cause))
        await asyncio.shield(slot.check)

    async def _check(self, slot: _Slot, cause: str) -> None:
        for number in range(_NUM_TRIES):
            if number > 0:
                await asyncio.sleep(_HEALTH_PAUSE_S)
            if await self._in_thread(slot.engine.health):
                return
        # A paused engine does not generate; the sync that has paused it judges it.
        if self._serves(slot) and not self._holds:
            self._lose(slot, f"{cause}; it failed {_NUM_TRIES} health checks")

    async def _in_thread[T](self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _tell(self, slot: _Slot, cause: str) -> None:
        """Warns of an engine's first failed request."""
        level = logging.DEBUG if slot.failed_once else logging.WARNING
        logger.log(level, "a request failed, its engine is healthy: %s", cause)
        slot.failed_once = True

    def _lose(self, slot: _Slot, cause: str) -> None:
        name = slot.engine.name
        del self._slots[name]
        self.lost[name] = cause
        logger.error("out of rotation: %s; %d engines left", cause, len(self._slots))
        for call in slot.calls:
            call.cancel()
        self._grant()  # who waits for room there

    async def _interrupt(self, slot: _Slot) -> None:
        """Returns when the requests that the engine has now have ended, or are late.

        A request on its way may miss an interrupt, so it is said again.
        """
        calls = set(slot.calls)
        end = time.monotonic() + _INTERRUPT_DEADLINE_S
        while calls and time.monotonic() < end:
            try:
                await self._in_thread(slot.engine.interrupt)
            except RunError as e:
                logger.warning("its requests could not be interrupted: %s", e)
                return
            _, calls = await asyncio.wait(calls, timeout=_INTERRUPT_AGAIN_S)

    async def _take_leave(self, slot: _Slot) -> None:
        """Ends the requests of an engine that has been taken away."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._interrupt(slot), _FAREWELL_S)
        for call in slot.calls:
            call.cancel()
