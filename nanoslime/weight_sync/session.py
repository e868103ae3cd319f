"""Weight sync in the driver: one state machine owns the engines' version and the order.

    IDLE ──pause──> PAUSED ──begin──> SENDING ──end──> VERIFYING ──resume──> IDLE

    IDLE       all engines serve `version`
    PAUSED     the engines stop to generate; all hold the weights and the label of `version`
    SENDING    an engine may hold a mixture, under its old label. It takes the new label only
               when it has every tensor, and empties its cache, once, just before that
    VERIFYING  all engines have the new weights; each is asked for its label

An error leaves the session in the state in which it happened. After IDLE the engines then
stay paused, so that none serves a mixture, and a further sync is refused.
"""

import shutil
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from nanoslime.types import RunError
from nanoslime.weight_sync.engine_calls import EngineCalls
from nanoslime.weight_sync.transport import TRANSPORTS, Delivery, EngineSide, version_dir


class State(StrEnum):
    IDLE = "idle"
    PAUSED = "paused"
    SENDING = "sending"
    VERIFYING = "verifying"


class TrainerRanks(Protocol):
    """All trainer ranks. `call` runs a collective method of the worker on each."""

    address: str  # of rank 0, reachable from the engines

    def call(self, method: str, *args: Any, what: str, deadline_s: float | None = None) -> Any: ...


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
    """

    def __init__(
        self,
        ranks: TrainerRanks,
        engines: EngineCalls,
        devices: Devices,
        *,
        transport: str,
        directory: Path,
        deadline_s: float,
    ):
        self._ranks = ranks
        self._engines = engines
        self._devices = devices
        self._transport = TRANSPORTS[transport]
        self._directory = directory
        self._deadline_s = deadline_s
        self.state = State.IDLE
        # The version of the weights that every engine has; -1 before the first sync.
        self.version = -1

    def open(self, ranks_by_engine: Sequence[Sequence[int]]) -> None:
        """Gives every trainer rank its sender.

        `ranks_by_engine` holds the trainer ranks on each engine's devices.
        """
        delivery = self._transport.delivery
        if delivery is Delivery.NOTHING:
            return
        engines = [] if delivery is Delivery.FILES else self._engines.engines
        engine_side = EngineSide(engines, ranks_by_engine, self._ranks.address, self._directory)
        self._ranks.call(
            "connect", self._transport.sender, engine_side, what="open the way of weights"
        )

    def sync(self, version: int) -> dict[str, float]:
        """Puts the trainer's current weights into every engine, labelled `version`.

        Returns the seconds that it took, as metrics. Raises RunError that names the engine or
        the rank which failed.
        """
        if self.state is not State.IDLE:
            raise RunError(
                f"weights of version {version} cannot be sent: the sync after version "
                f"{self.version} failed while it was {self.state}"
            )
        start = time.monotonic()
        times: dict[str, float] = {}
        if self._transport.delivery is Delivery.NOTHING:
            self._verify(0)
            self.version = 0
        else:
            times = self._sync(version)
        times["time/weight_sync_s"] = time.monotonic() - start
        return times

    def _sync(self, version: int) -> dict[str, float]:
        if self._transport.delivery is Delivery.FILES:
            # The files are written while the engines still generate.
            self._have_ranks_send(version)
        self.state = State.PAUSED
        self._engines.each("pause")
        self._devices.make_room_for_weights()
        self.state = State.SENDING
        self._deliver(version)
        self.state = State.VERIFYING
        times = self._devices.give_to_engines()
        self._verify(version)
        self._engines.each("resume")
        self.version = version
        self.state = State.IDLE
        return times

    def _deliver(self, version: int) -> None:
        match self._transport.delivery:
            case Delivery.BUCKETS:
                self._engines.each("begin_update")
                self._have_ranks_send(version)
                self._engines.each("end_update", version)
            case Delivery.FILES:
                path = version_dir(self._directory, version)
                self._engines.each("update_weights_from_disk", str(path), version)
                # On NFS a file that an engine still has open cannot be removed at once.
                shutil.rmtree(path, ignore_errors=True)
            case Delivery.DIRECT:
                self._have_ranks_send(version)

    def _have_ranks_send(self, version: int) -> None:
        # Files may take as long as a checkpoint does.
        deadline_s = None if self._transport.delivery is Delivery.FILES else self._deadline_s
        what = f"send the weights of version {version}"
        self._ranks.call("send", version, what=what, deadline_s=deadline_s)

    def _verify(self, version: int) -> None:
        reported = self._engines.each("policy_version")
        for engine, found in zip(self._engines.engines, reported, strict=True):
            if found != version:
                raise RunError(
                    f"engine {engine.name} reports policy version {found} "
                    f"after the sync of {version}"
                )
