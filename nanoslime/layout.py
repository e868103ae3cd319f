"""Which node and GPU does what: arithmetic on configuration and model shape, and its errors.

    node 0   trainer ranks 0 1 ...     trainers take the first nodes
    node 1   trainer ranks ...
    node 2   engine 0, engine 1 ...    engines take the last nodes
    node 3   engine ...

Ranks are in Megatron's order: ((pp * dp_size + dp) * cp_size + cp) * tp_size + tp.

A slot is a GPU of a node, or a share of its cores where it has no GPUs. On one node
trainers take the first slots, engines the last. The embedded engine lives in the driver
and takes no slot, recorded rollouts need no engine: trainers then have all. With
rollout_only engines have all; with cluster.colocate every node has both on the same
slots.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from pydantic import TypeAdapter

from nanoslime.config import RunConfig
from nanoslime.engine_kind import engine_kind, resolve_transport, takes_slots
from nanoslime.models.parallel_sizes import ParallelDims
from nanoslime.models.shape import ModelShape
from nanoslime.models.trainable import check_kernels, check_parallel
from nanoslime.types import RunError


@dataclass(frozen=True, slots=True)
class TrainerPlace:
    rank: int
    node: int
    slot: int


@dataclass(frozen=True, slots=True)
class EnginePlace:
    index: int
    node: int
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    num_nodes: int
    slots_per_node: int
    # cuda or cpu
    device: str
    # megatron or fsdp
    backend: str
    parallel: ParallelDims
    # By rank; empty with rollout_only.
    trainers: tuple[TrainerPlace, ...]
    # By index; empty with the embedded engine or recorded rollouts.
    engines: tuple[EnginePlace, ...]

    def roles(self, node: int) -> str:
        """What the node does: trainer, engine, trainer+engine, or nothing (an empty text)."""
        roles = []
        if any(trainer.node == node for trainer in self.trainers):
            roles.append("trainer")
        if any(engine.node == node for engine in self.engines):
            roles.append("engine")
        return "+".join(roles)

    def ranks_at(self, engine: EnginePlace) -> list[int]:
        """The trainer ranks on the engine's slots, in their order; none unless colocated."""
        rank_of = {(trainer.node, trainer.slot): trainer.rank for trainer in self.trainers}
        places = [(engine.node, slot) for slot in engine.slots]
        return [rank_of[place] for place in places if place in rank_of]

    @property
    def min_nodes(self) -> int:
        """On so many of its first nodes it has all trainers, and an engine where it has any."""
        nodes = [trainer.node for trainer in self.trainers]
        nodes += [engine.node for engine in self.engines[:1]]
        return 1 + max(nodes)

    @property
    def can_lose_nodes(self) -> bool:
        return self.min_nodes < self.num_nodes

    def on(self, num_nodes: int) -> Layout:
        """What is left of it on its first nodes: engines are on the last ones."""
        engines = tuple(engine for engine in self.engines if engine.node < num_nodes)
        return replace(self, num_nodes=num_nodes, engines=engines)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """The layout that `to_json` wrote, equal to it."""
        return TypeAdapter(cls).validate_json(text)

    def table(self) -> str:
        """One line a node: role, trainer ranks and their coordinates, engines and slots."""
        heading = ["node", "role", "ranks", "tp", "cp", "dp", "pp", "engines", "slots"]
        rows = [heading] + [self._row(node) for node in range(self.num_nodes)]
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def _row(self, node: int) -> list[str]:
        ranks = [trainer.rank for trainer in self.trainers if trainer.node == node]
        engines = [engine for engine in self.engines if engine.node == node]
        coordinates = [self.parallel.coordinates(rank) for rank in ranks]
        row = [str(node), self.roles(node) or "idle", span(ranks)]
        for name in ("tp", "cp", "dp", "pp"):
            row.append(span(place[name] for place in coordinates))
        row.append(span(engine.index for engine in engines))
        row.append(span(slot for engine in engines for slot in engine.slots))
        return row


def plan(config: RunConfig, shape: ModelShape) -> Layout:
    """Where everything goes. Raises RunError, with value, place and way out, where it cannot;
    whether there is the memory for it, tools/memory says.
    """
    cluster = config.cluster
    slots = _slots_per_node(config)
    trainers = _place_trainers(_trainer_slots(config, slots))
    parallel = parallel_dims(config, shape)
    check_without_sizes(config, shape)
    engines = check_engines(config, shape)
    return Layout(
        num_nodes=cluster.nodes,
        slots_per_node=slots,
        device=cluster.device,
        backend=config.training.backend,
        parallel=parallel,
        trainers=trainers,
        engines=engines,
    )


def check_without_sizes(config: RunConfig, shape: ModelShape) -> None:
    """Raises RunError for what no number of nodes and no parallel size helps against."""
    if config.cluster.device == "cuda" and not config.rollout.rollout_only:
        has_kernels = _has_transformer_engine(config)
        check_kernels(config.training, shape, transformer_engine=has_kernels)
    resolve_transport(config, same_process=False)


def check_engines(config: RunConfig, shape: ModelShape) -> tuple[EnginePlace, ...]:
    """Where engines go. Raises RunError where they cannot, whatever memory there is."""
    slots = _slots_per_node(config)
    taken = _trainer_slots(config, slots)
    if takes_slots(config.rollout):
        engine_kind(config.rollout).check_plan(config.rollout, shape, slots)
    if config.cluster.colocate:
        # Engines take the trainers' slots, as if there were no trainers.
        return _place_engines(config, taken[0], [0] * config.cluster.nodes)
    return _place_engines(config, slots, taken)


def trainer_ranks(config: RunConfig) -> int:
    """How many trainers the job has. Raises RunError where there is no room for them."""
    return sum(_trainer_slots(config, _slots_per_node(config)))


def _slots_per_node(config: RunConfig) -> int:
    """Slots of a node. On one machine without GPUs `num_gpus` says how many ranks there
    are to be."""
    cluster = config.cluster
    ranks = config.training.num_gpus
    if cluster.nodes > 1 or cluster.device == "cuda" or ranks is None:
        return cluster.slots
    engine_slots = config.rollout.engine_tp_size if _engines_apart(config) else 0
    return max(cluster.slots, ranks + engine_slots)


def _engines_apart(config: RunConfig) -> bool:
    """Whether engines have slots of their own."""
    return takes_slots(config.rollout) and not config.cluster.colocate


def _trainer_slots(config: RunConfig, slots: int) -> list[int]:
    """Slots of each node that trainers take: all of the first nodes, or some of the only one."""
    nodes = config.cluster.nodes
    if config.rollout.rollout_only:
        return [0] * nodes
    if config.cluster.colocate:
        _check_colocated(config)
    rollout_nodes = _rollout_nodes(config)
    if nodes == 1:
        return [_one_node_trainer_slots(config, slots)]
    if config.cluster.engine_gpus is not None:
        raise RunError(
            f"cluster.engine_gpus={config.cluster.engine_gpus} with cluster.nodes={nodes}: it is "
            "for one node, whose GPUs engines share; use cluster.rollout_nodes (--rollout-nodes)"
        )
    trainer_nodes = nodes - rollout_nodes
    ranks = trainer_nodes * slots
    asked = config.training.num_gpus
    if asked is not None and asked != ranks:
        raise RunError(
            f"training.num_gpus={asked}: a job of {nodes} nodes has "
            f"{trainer_nodes} x {slots} = {ranks} trainer ranks; "
            "leave it out, or change cluster.nodes or cluster.rollout_nodes"
        )
    return [slots] * trainer_nodes + [0] * rollout_nodes


def _check_colocated(config: RunConfig) -> None:
    cluster = config.cluster
    for field in ("rollout_nodes", "engine_gpus"):
        asked = getattr(cluster, field)
        if asked is not None:
            raise RunError(
                f"cluster.{field}={asked} with cluster.colocate: engines then share the "
                "trainers' slots, on every node; leave one of them out"
            )
    engine = engine_kind(config.rollout)
    if not engine.takes_slots:
        raise RunError(
            f"cluster.colocate with rollout.engine={engine.name}: it has nothing to share with "
            "several ranks; leave one of them out"
        )


def _rollout_nodes(config: RunConfig) -> int:
    """Nodes that hold engines only: as many as asked for, else half of them, rounded down."""
    nodes = config.cluster.nodes
    asked = config.cluster.rollout_nodes
    engine = engine_kind(config.rollout).title
    if asked is None:
        return nodes // 2 if _engines_apart(config) else 0
    if asked > 0 and not takes_slots(config.rollout):
        raise RunError(f"cluster.rollout_nodes={asked}: the {engine} engine needs no nodes; set 0")
    if asked > 0 and nodes == 1:
        raise RunError(
            f"cluster.rollout_nodes={asked} of cluster.nodes=1: with one node engines share it "
            "(cluster.engine_gpus); leave it out"
        )
    if asked >= nodes:
        raise RunError(
            f"cluster.rollout_nodes={asked} of cluster.nodes={nodes}: "
            f"choose {span(range(1, nodes))}, the rest are trainers"
        )
    if asked == 0 and nodes > 1 and _engines_apart(config):
        raise RunError(
            f"cluster.rollout_nodes=0: {engine} engines need nodes; "
            f"choose {span(range(1, nodes))}, the rest are trainers"
        )
    return asked


def _one_node_trainer_slots(config: RunConfig, slots: int) -> int:
    """Slots of the only node that trainers take; engines of their own take the others."""
    slot = slot_name(config)
    ranks = config.training.num_gpus
    engine_slots = _one_node_engine_slots(config, slots)
    if ranks is None:
        return slots - engine_slots
    if ranks + engine_slots > slots:
        raise RunError(
            f"training.num_gpus={ranks}: of the node's {slots} {slot}s {engine_slots} or more are "
            f"for engines; choose at most {slots - engine_slots}"
        )
    return ranks


def _one_node_engine_slots(config: RunConfig, slots: int) -> int:
    """Slots of the only node that engines take.

    They are as many as asked for, else as many as the trainers leave, else half.
    """
    slot = slot_name(config)
    asked = config.cluster.engine_gpus
    engine = engine_kind(config.rollout).title
    if not _engines_apart(config):
        if asked:
            raise RunError(
                f"cluster.engine_gpus={asked}: the {engine} engine takes no GPU of its own; set 0"
            )
        return 0
    if slots == 1:
        cuda = config.cluster.device == "cuda"
        field = "cluster.gpus_per_node" if cuda else "cluster.slots_per_node"
        raise RunError(
            f"{field}=1: one node with one {slot} has no room for an engine of {engine} beside "
            "the trainer; use --colocate or --engine embedded"
        )
    if asked is not None:
        if not 1 <= asked < slots:
            raise RunError(
                f"cluster.engine_gpus={asked} of {slots} {slot}s; choose {span(range(1, slots))}"
            )
        return asked
    ranks = config.training.num_gpus
    if ranks is None:
        return slots // 2
    return max(1, slots - ranks)


def _place_trainers(trainer_slots: list[int]) -> tuple[TrainerPlace, ...]:
    """Ranks fill the first slots of each node, node by node."""
    trainers: list[TrainerPlace] = []
    for node, num_slots in enumerate(trainer_slots):
        for slot in range(num_slots):
            trainers.append(TrainerPlace(len(trainers), node, slot))
    return tuple(trainers)


def _place_engines(
    config: RunConfig, slots: int, trainer_slots: list[int]
) -> tuple[EnginePlace, ...]:
    """Engines fill what trainers leave of the `slots` of each node, from its end."""
    cluster = config.cluster
    if not takes_slots(config.rollout):
        return ()
    tp = config.rollout.engine_tp_size
    engines: list[EnginePlace] = []
    for node, taken in enumerate(trainer_slots):
        free = slots - taken
        if taken and cluster.nodes == 1 and cluster.engine_gpus is not None:
            free = min(free, cluster.engine_gpus)
        if not free:
            continue
        for i in range(_num_engines(config, node, free)):
            first = slots - free + i * tp
            engines.append(EnginePlace(len(engines), node, tuple(range(first, first + tp))))
    return tuple(engines)


def _num_engines(config: RunConfig, node: int, free: int) -> int:
    """Engines on the `free` slots of a node: as many as asked for, else as many as fit."""
    slot = slot_name(config)
    tp = config.rollout.engine_tp_size
    asked = config.rollout.engines_per_node
    room = free // tp
    if room == 0:
        raise RunError(
            f"rollout.engine_tp_size={tp} does not fit the {free} {slot}s that node {node} has "
            f"for engines; choose engine_tp_size at most {free}"
        )
    if asked is None:
        return room
    if asked > room:
        raise RunError(
            f"rollout.engines_per_node={asked} x rollout.engine_tp_size={tp} does not fit the "
            f"{free} {slot}s that node {node} has for engines; "
            f"choose engines_per_node at most {room}"
        )
    return asked


def parallel_dims(config: RunConfig, shape: ModelShape) -> ParallelDims:
    """The sizes of the trainers' groups. Raises RunError where they do not divide the trainers."""
    training = config.training
    rollout = config.rollout
    ranks = trainer_ranks(config)
    if not ranks:
        return ParallelDims(tp=1, pp=1, cp=1, ep=1, dp=1)
    check_parallel(training, shape, ranks, _slots_per_node(config))
    dp = ranks // (training.tp_size * training.cp_size * training.pp_size)
    steps = training.num_steps_per_rollout
    samples = rollout.rollout_batch_size // steps * rollout.n_samples_per_prompt
    if samples < dp:
        raise RunError(
            f"rollout.rollout_batch_size={rollout.rollout_batch_size} x "
            f"rollout.n_samples_per_prompt={rollout.n_samples_per_prompt} gives {samples} samples "
            f"per optimizer step for DP={dp}; choose sizes with a product of at least {dp * steps}"
        )
    return ParallelDims(
        tp=training.tp_size, pp=training.pp_size, cp=training.cp_size, ep=training.ep_size, dp=dp
    )


def _has_transformer_engine(config: RunConfig) -> bool:
    """Whether the job's environment has it; assumed where this machine cannot see it."""
    if not config.cluster.venv:
        return find_spec("transformer_engine") is not None
    venv = Path(config.cluster.venv)
    if not venv.is_dir():
        return True
    return any(venv.glob("lib/python*/site-packages/transformer_engine"))


def slot_name(config: RunConfig) -> str:
    """What a message calls a slot."""
    return "GPU" if config.cluster.device == "cuda" else "CPU slot"


def span(numbers: Iterable[int]) -> str:
    """The numbers as ranges: [0, 1, 2, 5] -> "0-2,5"; nothing -> "-"."""
    runs: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            first, _ = runs.pop()
        else:
            first = number
        runs.append((first, number))
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ",".join(texts) or "-"
