"""What the rest of nanoslime asks of a kind of engine, before one runs and to start one.

An engine is one file in `nanoslime/rollout/engines/` and one line in the table ENGINES.
The line names a subclass of `EngineKind`. The plan on the login node imports the file
of that class, so the file imports nothing of torch, transformers, ray, megatron or the
engine's own package; what needs them stands in a file of its own, which
`EngineKind.owner` names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from nanoslime.config import RolloutConfig, RunConfig
from nanoslime.config.rollout import ENGINES
from nanoslime.models.shape import ModelShape
from nanoslime.plugins import resolve
from nanoslime.types import Engine, RunError


@dataclass(frozen=True, slots=True)
class EngineStart:
    """Which engine of a run is to start, and where."""

    config: RunConfig
    index: int
    model_dir: Path
    # "cuda" or "cpu".
    device: str
    # The address of this machine, at which the others of the run reach it.
    host: str
    log: Path
    # The GPUs of this machine that the engine may use, by number or UUID.
    gpu_ids: Sequence[int | str] = ()


class EngineOwner(Protocol):
    """Holds one engine of a run, from `start` to `close`; then nothing of it is left."""

    def start(self, deadline_s: float) -> Engine:
        """Returns the engine once it generates.

        Raises RunError naming the engine and its log where it does not within
        `deadline_s`.
        """

    def close(self) -> None: ...


class EngineKind:
    """The facts and checks of one kind of engine: by default no check, no GPU."""

    # The name in the table; the engine's logs bear it.
    name: ClassVar[str]
    # The name in the plan and in errors.
    title: ClassVar[str]
    # Whether its engines have GPUs (or slots) of their own; otherwise the driver has one.
    takes_slots: ClassVar[bool]
    # Whether it draws the same samples from a seed, whatever it does beside.
    honours_seeds: ClassVar[bool] = False
    # Values of weight_sync.transport that it can take; "auto" is the first possible one.
    transports: ClassVar[tuple[str, ...]]
    # "package.module:name" of a function from EngineStart to EngineOwner.
    owner: ClassVar[str]

    def check_options(self, rollout: RolloutConfig) -> None:
        """Raises RunError for an option of the engine's own that it does not have."""

    def check_plan(self, rollout: RolloutConfig, shape: ModelShape, slots_per_node: int) -> None:
        """Raises RunError for a model or a size that the engine cannot serve."""

    def memory_fraction(self, config: RunConfig) -> float:
        """The part of a GPU's memory that the engine takes for weights and KV cache."""
        return 0.0

    def make_owner(self, start: EngineStart) -> EngineOwner:
        owner: EngineOwner = resolve(self.owner, {}, "rollout.engine")(start)
        return owner


def engine_kind(rollout: RolloutConfig) -> EngineKind:
    """The kind that `rollout.engine` names. Raises RunError where it cannot be loaded."""
    kind: EngineKind = resolve(rollout.engine, ENGINES, "rollout.engine")()
    return kind


class RunEngine:
    """An engine of a run, which can be started again until it is closed."""

    def __init__(self, start: EngineStart):
        self._start = start
        self._owner: EngineOwner | None = None
        self._closed = False

    def start(self) -> Engine:
        """Starts it, in place of the one before, of which nothing is left then."""
        if self._owner is not None:
            self._owner.close()
        if self._closed:
            raise RunError(f"engine {self._start.index} is not started again: the run ends")
        rollout = self._start.config.rollout
        self._owner = engine_kind(rollout).make_owner(self._start)
        return self._owner.start(rollout.start_deadline_s)

    def close(self) -> None:
        self._closed = True
        if self._owner is not None:
            self._owner.close()


def takes_slots(rollout: RolloutConfig) -> bool:
    """Whether the run has engines with GPUs (or slots) of their own."""
    return engine_kind(rollout).takes_slots and not rollout.load_rollouts


def resolve_transport(config: RunConfig, *, same_process: bool) -> str:
    """Decides what weight_sync.transport="auto" means; returns its name.

    It is "none" where there is no engine or no trainer. `same_process` says that the
    engine lives in the process of the only trainer rank. Raises RunError for a
    transport that the engine cannot take, or not here.
    """
    if config.rollout.load_rollouts or config.rollout.rollout_only:
        return "none"
    kind = engine_kind(config.rollout)
    obstacles = _transport_obstacles(config, same_process)
    possible = [name for name in kind.transports if name not in obstacles]
    asked = config.weight_sync.transport
    if asked == "auto":
        return possible[0]
    choices = f"choose {', '.join(possible)} or auto"
    if asked not in kind.transports:
        raise RunError(
            f"weight_sync.transport={asked}: rollout.engine={kind.name} cannot take weights "
            f"that way; {choices}"
        )
    if asked in obstacles:
        raise RunError(f"weight_sync.transport={asked} {obstacles[asked]}; {choices}")
    return asked


def _transport_obstacles(config: RunConfig, same_process: bool) -> dict[str, str]:
    """Says of each transport that is impossible here, whatever the engine, why it is."""
    obstacles = {}
    if not config.cluster.colocate:
        obstacles["tensor"] = "needs engines on the trainers' own GPUs (--colocate)"
    if config.cluster.colocate and config.cluster.device == "cuda":
        obstacles["broadcast"] = "cannot be used with --colocate: NCCL refuses two ranks on one GPU"
    if not same_process:
        obstacles["in_process"] = "needs the engine in the process of the only trainer rank"
    return obstacles
