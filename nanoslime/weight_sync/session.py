"""Weight sync in the driver: one state machine owns the engines' version and the order.

    IDLE ──pause──> PAUSED ──begin──> SENDING ──end──> VERIFYING ──resume──> IDLE

    IDLE       all engines that serve have `version`. Before the pause the ranks' senders meet
               the engines that take part, and do what needs no engine
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
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from nanoslime.processes.phases import DRIVER, own_report
from nanoslime.types import PauseMode, RunError, TensorKind
from nanoslime.weight_sync.devices import SeparateDevices, SharedDevices, TrainerRanks
from nanoslime.weight_sync.engine_calls import EnginesFailed, Failure
from nanoslime.weight_sync.engine_pool import EnginePool
from nanoslime.weight_sync.probe import Probe
from nanoslime.weight_sync.transport import TRANSPORTS, Delivery, EngineSide, Sent, version_dir

logger = logging.getLogger(__name__)

# An engine that other requests keep busy may take so long to answer a probe. That is waited for
# before the next sync or commit only.
_LATE_S = 10.0
# What one rank does after another.
_IN_TURNS = ("time/weight_sync_wire_s", "time/weight_sync_load_s")


class State(StrEnum):
    IDLE = "idle"
    PAUSED = "paused"
    SENDING = "sending"
    VERIFYING = "verifying"


class SyncSession:
    """One run's weight sync. `open` comes before the first `sync`.

    `transport` is a key of TRANSPORTS; one that sends files puts them into `directory`.
    `deadline_s` is that of a rank for one bucket and of an engine for one call.

    In the first sync, in every `compare_every`-th (0: no further one), and for an engine that
    comes back, all is sent twice: the second time must not change a tensor of the engine.
    """

    def __init__(
        self,
        ranks: TrainerRanks,
        engines: EnginePool,
        devices: SeparateDevices | SharedDevices,
        *,
        transport: str,
        directory: Path,
        deadline_s: float,
        at_sync: PauseMode = "retract",
        compare_every: int = 0,
        probe: Probe | None = None,
    ):
        self._ranks = ranks
        self._engines = engines
        self._devices = devices
        self._transport = TRANSPORTS[transport]
        self._directory = directory
        self._deadline_s = deadline_s
        self._pause_mode = at_sync
        self._compare_every = compare_every
        self._probe = probe
        # The largest gaps of what engines have answered since the last row of metrics.
        self._probed: dict[str, float] = {}
        self._num_syncs = 0
        # A cache that is kept is that of the old weights; only requests in place need it.
        self._flushes = at_sync != "in_place"
        self._ranks_of: dict[str, Sequence[int]] = {}
        # The engines that the ranks' senders know, and how the names of their process groups begin.
        self._connected: list[Any] | None = None
        self._group = ""
        # What every engine is sent, as rank 0 says.
        self._tensors: list[TensorKind] = []
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
            self._connect(engines)

    def sync(self, version: int) -> dict[str, float]:
        """Puts the trainer's current weights into every engine, labelled `version`.

        Returns the seconds that it took, as metrics. Raises RunError that names the rank that
        failed, or what every engine refused.
        """
        self._require_idle(version)
        start = time.monotonic()
        self.look_at_probe()
        times: dict[str, float] = {}
        if self._transport.delivery is Delivery.NOTHING:
            version = 0
            self._verify(version)
        else:
            self._engines.take_in()
            self._meet(self._engines.alive)
            times |= self._prepare(version)
            self._engines.drain()
            every = self._compare_every
            is_compared = self._num_syncs == 0 or (every > 0 and self._num_syncs % every == 0)
            times |= self._update(version, is_compared=is_compared)
            self._num_syncs += 1
        self.version = version
        self._engines.serve()
        times["time/weight_sync_s"] = time.monotonic() - start
        times |= self._probed
        self._probed = {}
        return times

    def join(self) -> None:
        """Gives engines that have come up what the others serve; then they serve too."""
        self._require_idle(self.version)
        own_report().enter(DRIVER, "weight_sync")
        if self._transport.delivery is Delivery.NOTHING:
            self._verify(self.version)
        else:
            self._meet(self._engines.in_sync)
            self._prepare(self.version)
            self._update(self.version, is_compared=True)
        self._engines.serve()

    def look_at_probe(self, wait_s: float = _LATE_S) -> None:
        """Looks at what engines have answered by now, or within `wait_s`.

        Those that have other weights than the trainer are lost. Raises EnginesFailed where all
        have. The next sync returns how far they are from the trainer.
        """
        if self._probe is None:
            return
        metrics, failures = self._probe.collect(wait_s)
        self._probed = _over_all([self._probed, metrics])
        self._engines.fail(failures)

    def _require_idle(self, version: int) -> None:
        if self.state is not State.IDLE:
            raise RunError(
                f"weights of version {version} cannot be sent: the sync after version "
                f"{self.version} failed while it was {self.state}"
            )

    def _update(self, version: int, *, is_compared: bool) -> dict[str, float]:
        """Brings the engines of the sync to `version`."""
        self.state = State.PAUSED
        begin = time.monotonic()
        self._engines.each("pause", self._pause_mode)
        self._engines.paused()
        self._devices.make_room_for_weights()
        self.state = State.SENDING
        times = self._deliver_well(version)
        if is_compared:
            self._deliver(version, compares=True)
        self.state = State.VERIFYING
        times |= self._devices.give_to_engines()
        self._verify(version)
        self._engines.each("resume")
        end = time.monotonic()
        times["time/weight_sync_pause_s"] = end - begin
        self.state = State.IDLE
        if self._probe is not None:
            self._probe.ask(self._engines.in_sync())
            # An engine that joins has nothing else to do.
            joins = version == self.version
            self.look_at_probe(_LATE_S if joins else self._probe.wait_s)
            times["time/weight_sync_probe_s"] = time.monotonic() - end
        return times

    def _prepare(self, version: int) -> dict[str, float]:
        """The ranks do what they can while the engines still generate."""
        # Files may take as long as a checkpoint does.
        deadline_s = None if self._transport.delivery is Delivery.FILES else self._long_s
        what = f"prepare the weights of version {version}"
        self._ranks.call("prepare", version, what=what, deadline_s=deadline_s)
        if self._probe is None:
            return {}
        begin = time.monotonic()
        what = f"score {len(self._probe.token_ids)} tokens"
        tokens = self._probe.token_ids
        by_rank = self._ranks.call("score", tokens, what=what, deadline_s=self._long_s)
        self._probe.expect(version, by_rank or [])
        return {"time/weight_sync_score_s": time.monotonic() - begin}

    def _meet(self, engines: Callable[[], list[Any]]) -> None:
        """Agrees with engines that are new on what they are sent, and makes the senders anew where
        the engines are not those of the last sync.

        An engine that is lost by it takes no part.
        """
        if not self._tensors:
            self._tensors, *_ = self._ranks.call("tensor_kinds", what="list the tensors")
        self._engines.each("agree", self._tensors)
        while found := engines():
            is_met = self._transport.delivery is not Delivery.BUCKETS or found == self._connected
            if is_met or self._connect(found):
                break

    def _deliver_well(self, version: int) -> dict[str, float]:
        """`_deliver`, and once more where every engine refuses: the fault may have passed."""
        try:
            return self._deliver(version)
        except EnginesFailed as error:
            logger.warning("version %d is sent once more: %s", version, error)
        if self._transport.delivery is Delivery.FILES:
            self._ranks.call("prepare", version, what=f"write version {version} once more")
        return self._deliver(version)

    def _deliver(self, version: int, *, compares: bool = False) -> dict[str, float]:
        """Returns the seconds of its parts, as metrics."""
        match self._transport.delivery:
            case Delivery.BUCKETS:
                return self._deliver_buckets(version, compares=compares)
            case Delivery.FILES:
                path = version_dir(self._directory, version)
                options = {"flush": self._flushes and not compares, "compares": compares}
                self._engines.each("update_weights_from_disk", str(path), version, **options)
                self._remove_old_files(version)
            case Delivery.DIRECT if not compares:
                self._send(version)
        return {}

    def _deliver_buckets(self, version: int, *, compares: bool) -> dict[str, float]:
        """Every round loses an engine, or is the last one."""
        times: dict[str, float] = {}
        while engines := self._engines.in_sync():
            if engines != self._connected and not self._connect(engines):
                continue
            self._engines.each("begin_update")
            if self._engines.in_sync() == engines:
                sent = self._send(version, compares=compares)
                if sent is not None:
                    times = _over_all([of_rank.times for of_rank in sent])
                    break
            self._disconnect()
        self._engines.each("end_update", version, flush=self._flushes and not compares)
        return times

    def _remove_old_files(self, version: int) -> None:
        """The last two versions stay, as what an engine that died may still be reading.

        On NFS a file that an engine still has open cannot be removed at once.
        """
        kept = {version_dir(self._directory, kept) for kept in (version, version - 1)}
        for path in self._directory.glob("version_*"):
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _connect(self, engines: list[Any]) -> bool:
        """Makes the ranks' senders for these engines; False where one was lost."""
        if self._connected is not None:
            self._disconnect()
        if self._transport.delivery is Delivery.FILES:
            engines = []
        self._group = f"nanoslime-weights-{secrets.token_hex(4)}"
        ranks = [self._ranks_of.get(engine.name, ()) for engine in engines]
        side = EngineSide(engines, ranks, self._ranks.address, self._directory, self._group)
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
            self._engines.each_alive("abandon_update", self._group)

    def _send(self, version: int, *, compares: bool = False) -> list[Sent] | None:
        """What the ranks say of it; None where an engine was lost meanwhile."""
        what = f"send the weights of version {version}"
        sent = self._ask_ranks("send", version, compares, what=what, deadline_s=self._long_s)
        return sent if self._all_well(sent) else None

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


def _over_all(times: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The largest of each: the slowest rank, the engine that is farthest from the trainer. Of what
    the ranks do in turns it is the sum."""
    found: dict[str, float] = {}
    for of_rank in times:
        for name, seconds in of_rank.items():
            others = found.get(name, 0.0)
            found[name] = others + seconds if name in _IN_TURNS else max(others, seconds)
    return found
