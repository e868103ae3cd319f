"""Weight sync in the driver: one state machine owns the engines' version and the order.

    IDLE ──pause──> PAUSED ──begin──> SENDING ──end──> VERIFYING ──resume──> IDLE

    IDLE       all engines that serve have `version`
    PAUSED     the engines stop to generate; all hold the weights and the label of `version`
    SENDING    an engine may hold a mixture, under its old label. It takes the new label only
               when it has every tensor, and empties its cache, once, just before that
    VERIFYING  all engines have the new weights; each is asked for its label

An engine that dies, hangs or refuses in any of these states is lost: it takes no further part,
and it stays paused. Where buckets were on their way to it, the process group is formed anew with
the others, and they are sent everything again from the start. A sync ends well without any
engine, as long as the pool hopes for one: it joins with the weights of then.

An error leaves the session in the state in which it happened. After IDLE the engines then
stay paused, so that none serves a mixture, and a further sync is refused.
"""

import logging
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from nanoslime.types import PauseMode, RunError
from nanoslime.weight_sync.engine_calls import EnginesFailed, Failure
from nanoslime.weight_sync.transport import TRANSPORTS, Delivery, EngineSide, Sent, version_dir

logger = logging.getLogger(__name__)


class State(StrEnum):
    IDLE = "idle"
    PAUSED = "paused"
    SENDING = "sending"
    VERIFYING = "verifying"


class TrainerRanks(Protocol):
    """All trainer ranks. `call` runs a collective method of the worker on each."""

    address: str  # of rank 0, reachable from the engines

    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> Any: ...


class SyncedEngines(Protocol):
    """The engines of a run, as a sync sees them: `EnginePool`."""

    def in_sync(self) -> list[Any]:
        """Those that take part in the sync, and have not been lost."""
        ...

    def drain(self) -> None:
        """A sync begins: all engines that live take part, and nothing more is sent to them."""

    def paused(self) -> None:
        """They generate no more."""

    def serve(self) -> None:
        """Those that take part serve from now on. Raises RunError where no engine does, and
        none will."""

    def each(self, method: str, *args: Any, **options: Any) -> dict[str, Any]:
        """Calls a method of each that takes part; returns the answers by name.

        One that fails is lost; see `fail`.
        """
        ...

    def fail(self, failures: Mapping[str, Failure]) -> None:
        """These engines are lost. Raises EnginesFailed where every engine of the run refuses:
        then it is not their fault."""


class Devices(Protocol):
    """Trainer and engines take turns on shared devices; on their own ones nothing happens.

    The trainer has the devices when a sync begins, the engines have them when it ends.
    """

    def make_room_for_weights(self) -> None: ...

    def give_to_engines(self) -> dict[str, float]:
        """Returns the seconds that it took, as metrics."""
        ...


class SyncSession:
    """One run's weight sync. `open` comes before the first `sync`.

    `transport` is a key of TRANSPORTS; one that sends files puts them into `directory`.
    `deadline_s` is that of a rank for one bucket and of an engine for one call.
    """

    def __init__(
        self,
        ranks: TrainerRanks,
        engines: SyncedEngines,
        devices: Devices,
        *,
        transport: str,
        directory: Path,
        deadline_s: float,
        at_sync: PauseMode = "retract",
    ):
        self._ranks = ranks
        self._engines = engines
        self._devices = devices
        self._transport = TRANSPORTS[transport]
        self._directory = directory
        self._deadline_s = deadline_s
        self._pause_mode = at_sync
        # A cache that is kept is that of the old weights; only requests in place need it.
        self._flushes = at_sync != "in_place"
        self._ranks_of: dict[str, Sequence[int]] = {}
        # The engines that the ranks' senders know, and their process group.
        self._connected: list[Any] | None = None
        # The last one is theirs; engines may still be in those before, as they served when
        # another one joined.
        self._groups: list[str] = []
        self.state = State.IDLE
        # The version of the weights that every engine has; -1 before the first sync.
        self.version = -1

    def open(self, ranks_by_engine: Sequence[Sequence[int]]) -> None:
        """Gives every trainer rank its sender.

        `ranks_by_engine` holds the trainer ranks on each engine's devices.
        """
        engines = self._engines.in_sync()
        for engine, ranks in zip(engines, ranks_by_engine, strict=False):
            self._ranks_of[engine.name] = ranks
        if self._transport.delivery is not Delivery.NOTHING:
            self._connect()

    def sync(self, version: int) -> dict[str, float]:
        """Puts the trainer's current weights into every engine, labelled `version`.

        Returns the seconds that it took, as metrics. Raises RunError that names the rank that
        failed, or what every engine refused.
        """
        self._require_idle(version)
        start = time.monotonic()
        times: dict[str, float] = {}
        if self._transport.delivery is Delivery.NOTHING:
            version = 0
            self._verify(version)
        else:
            self._write_files(version)
            self._engines.drain()
            times = self._update(version)
            del self._groups[:-1]
        self.version = version
        self._engines.serve()
        times["time/weight_sync_s"] = time.monotonic() - start
        return times

    def join(self) -> None:
        """Gives engines that have come up what the others serve; then they serve too."""
        self._require_idle(self.version)
        if self._transport.delivery is Delivery.NOTHING:
            self._verify(self.version)
        else:
            self._write_files(self.version)
            self._update(self.version)
        self._engines.serve()

    def _require_idle(self, version: int) -> None:
        if self.state is not State.IDLE:
            raise RunError(
                f"weights of version {version} cannot be sent: the sync after version "
                f"{self.version} failed while it was {self.state}"
            )

    def _update(self, version: int) -> dict[str, float]:
        """Brings the engines of the sync to `version`."""
        self.state = State.PAUSED
        self._engines.each("pause", self._pause_mode)
        self._engines.paused()
        self._devices.make_room_for_weights()
        self.state = State.SENDING
        self._deliver(version)
        self.state = State.VERIFYING
        times = self._devices.give_to_engines()
        self._verify(version)
        self._engines.each("resume")
        self.state = State.IDLE
        return times

    def _write_files(self, version: int) -> None:
        """Files are written while the engines still generate."""
        if self._transport.delivery is Delivery.FILES:
            # They may take as long as a checkpoint does.
            self._ask_ranks("send", version, what=f"send the weights of version {version}")

    def _deliver(self, version: int) -> None:
        match self._transport.delivery:
            case Delivery.BUCKETS:
                self._deliver_buckets(version)
            case Delivery.FILES:
                path = version_dir(self._directory, version)
                self._engines.each(
                    "update_weights_from_disk", str(path), version, flush=self._flushes
                )
                # On NFS a file that an engine still has open cannot be removed at once.
                shutil.rmtree(path, ignore_errors=True)
            case Delivery.DIRECT:
                self._send(version)

    def _deliver_buckets(self, version: int) -> None:
        """Every round loses an engine, or is the last one."""
        while engines := self._engines.in_sync():
            if engines != self._connected and not self._connect():
                continue
            self._engines.each("begin_update")
            if self._engines.in_sync() == engines and self._send(version):
                break
            self._disconnect()
        self._engines.each("end_update", version, flush=self._flushes)

    def _connect(self) -> bool:
        """Makes the ranks' senders for the engines of the sync; False where one was lost."""
        if self._connected is not None:
            self._disconnect()
        delivery = self._transport.delivery
        engines = [] if delivery is Delivery.FILES else self._engines.in_sync()
        group = f"nanoslime-weights-{secrets.token_hex(4)}"
        self._groups.append(group)
        ranks = [self._ranks_of.get(engine.name, ()) for engine in engines]
        side = EngineSide(engines, ranks, self._ranks.address, self._directory, group)
        self._connected = engines
        what = "open the way of weights"
        sent = self._ask_ranks("connect", self._transport.sender, side, what=what)
        return self._all_well(sent)

    def _disconnect(self) -> None:
        """Ends the ranks' senders, and whatever update the engines were in.

        Those that do not answer are lost by it.
        """
        # The ranks come first: an engine may wait for what they do not send.
        self._ranks.call("close", what="close the way of weights", deadline_s=self._long_s)
        self._connected = None
        if self._transport.delivery is Delivery.BUCKETS:
            for group in self._groups:
                self._engines.each("abandon_update", group)

    def _send(self, version: int) -> bool:
        """False where an engine was lost meanwhile."""
        what = f"send the weights of version {version}"
        return self._all_well(self._ask_ranks("send", version, what=what, deadline_s=self._long_s))

    @property
    def _long_s(self) -> float:
        """A rank whose deadline has passed says so before the driver's own one passes."""
        return 3 * self._deadline_s

    def _ask_ranks(self, method: str, *args: Any, **options: Any) -> list[Sent]:
        return [sent for sent in self._ranks.call(method, *args, **options) or () if sent]

    def _all_well(self, sent: Sequence[Sent]) -> bool:
        """Whether no engine failed the ranks; loses those that did.

        Where one hangs, the others are late with it. So all are asked whether they live, once
        nothing keeps them waiting; only where all do, what the ranks say of them counts.
        """
        problems = [of_rank.problem for of_rank in sent if of_rank.problem]
        if not problems:
            return True
        logger.warning("the engines' update is broken off: %s", "; ".join(problems))
        failures: dict[str, Failure] = {}
        for of_rank in sent:
            failures |= of_rank.failures
        before = self._engines.in_sync()
        self._disconnect()
        if self._engines.in_sync() == before:
            if not failures:
                raise EnginesFailed("; ".join(problems), {})
            self._engines.fail(failures)
        return False

    def _verify(self, version: int) -> None:
        wrong = {}
        for name, found in self._engines.each("policy_version").items():
            if found != version:
                cause = f"engine {name} reports policy version {found} after the sync of {version}"
                wrong[name] = Failure(cause, is_gone=False)
        self._engines.fail(wrong)
