"""A transport carries buckets from trainer ranks to engines; the session does the rest.

On every trainer rank it is a `Sender`; in the driver it is one word, how engines take buckets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from nanoslime.weight_sync.engine_calls import Failure
from nanoslime.weight_sync.plan import TrainerWeights


class Delivery(StrEnum):
    """How an engine takes what the trainer ranks send, and its version."""

    BUCKETS = "buckets"  # one by one, between begin_update() and end_update(version)
    FILES = "files"  # from a checkpoint of the ranks, by update_weights_from_disk()
    DIRECT = "direct"  # by a call of the sender, which has the engine in its own process
    NOTHING = "nothing"  # it keeps the checkpoint's weights, which are version 0


@dataclass(frozen=True, slots=True)
class Transport:
    sender: str  # "module:Class" of a `Sender`; empty where nothing is sent
    delivery: Delivery


TRANSPORTS = {
    "broadcast": Transport("nanoslime.weight_sync.broadcast:BroadcastSender", Delivery.BUCKETS),
    "tensor": Transport("nanoslime.weight_sync.colocated:TensorSender", Delivery.BUCKETS),
    "disk": Transport("nanoslime.weight_sync.disk:CheckpointSender", Delivery.FILES),
    "in_process": Transport("nanoslime.weight_sync.in_process:InProcessSender", Delivery.DIRECT),
    "none": Transport("", Delivery.NOTHING),
}


@dataclass(frozen=True, slots=True)
class RankSide:
    """What a sender has on its trainer rank."""

    weights: TrainerWeights
    bucket_bytes: int
    model_dir: Path  # tokenizer and config of what is trained
    deadline_s: float


@dataclass(frozen=True, slots=True)
class EngineSide:
    """What the driver tells every sender of the engines."""

    # Empty with Delivery.FILES: then only the driver talks to engines.
    engines: Sequence[Any]
    # The trainer ranks on each engine's devices, in order.
    ranks_by_engine: Sequence[Sequence[int]]
    address: str  # of trainer rank 0, reachable from the engines
    directory: Path  # for Delivery.FILES; see `version_dir`
    group: str = ""  # how the names of process groups begin that engines join


@dataclass(frozen=True, slots=True)
class Sent:
    """What a trainer rank did for the engines, and which of them failed meanwhile.

    A failure of an engine is an answer of the rank and no error of its own: the rank goes on.
    """

    num_bytes: int = 0
    # Seconds that it took for its parts, as metrics.
    times: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[str, Failure] = field(default_factory=dict)
    # What went wrong, where anything did.
    problem: str = ""


class Sender(Protocol):
    """Lives on every trainer rank. Construction and all methods are collective.

    Construction and `send` raise EnginesFailed, naming the engines that refused, failed or were
    late. `send` does so after its part in all collectives, so that no other rank waits for it.
    """

    def __init__(self, rank: RankSide, engines: EngineSide) -> None: ...

    def prepare(self, version: int) -> None:
        """Does as much of `send` as is possible while the engines still generate."""
        ...

    def send(self, version: int, *, compares: bool = False) -> Sent:
        """Sends the current weights, bucket by bucket in the plan's order.

        Where it `compares`, engines have them already, and say so if anything changes.
        """
        ...

    def close(self) -> None: ...


def version_dir(directory: Path, version: int) -> Path:
    """Where a checkpoint for engines lies while they load it."""
    return directory / f"version_{version}"
