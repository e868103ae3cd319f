"""Which node and GPU does what: pure arithmetic from the configuration and the model's shape, and its errors.

    node 0   trainer ranks 0 1 ...          trainers take the first nodes, in Megatron's rank order:
    node 1   trainer ranks ...              rank = ((pp * dp_size + dp) * cp_size + cp) * tp_size + tp
    node 2   engine 0, engine 1 ...         engines take the last nodes
    node 3   engine ...

A slot is a GPU of a node, or a share of its cores where it has no GPUs. On one node trainers take the first
slots, engines the last. The embedded engine lives in the driver and takes no slot, recorded rollouts need no
engine: trainers then have all. With rollout_only engines have all; with cluster.colocate every node has both
on the same slots.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path

from pydantic import TypeAdapter

from nanoslime.config import RunConfig
from nanoslime.config.training import PARALLEL_SIZES, TrainingConfig
from nanoslime.models.freezing import frozen_names
from nanoslime.models.rules import check_experts, check_tp_size, divisors, tensors, words
from nanoslime.models.shape import ModelShape
from nanoslime.types import RunError

_GIB = 1 << 30
_SGLANG_MEM_FRACTION = 0.85  # about what SGLang chooses by itself; it depends on the GPU
COLOCATED_MEM_FRACTION = (
    0.7  # a sleeping trainer keeps its CUDA context, NCCL's buffers and fragments
)


@dataclass(frozen=True, slots=True)
class ParallelDims:
    tp: int
    pp: int
    cp: int
    ep: int
    dp: int

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def coordinates(self, rank: int) -> dict[str, int]:
        """The rank's place along tp, cp, dp and pp; tp runs fastest."""
        place = {}
        for name in ("tp", "cp", "dp", "pp"):
            rank, place[name] = divmod(rank, getattr(self, name))
        return place


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
    device: str  # cuda or cpu
    backend: str  # megatron or fsdp
    parallel: ParallelDims
    trainers: tuple[TrainerPlace, ...]  # by rank; none with rollout_only
    engines: tuple[EnginePlace, ...]  # by index; none with the embedded engine or recorded rollouts

    def roles(self, node: int) -> str:
        """trainer, engine or trainer+engine."""
        nodes = {
            "trainer": {t.node for t in self.trainers},
            "engine": {e.node for e in self.engines},
        }
        return "+".join(role for role in nodes if node in nodes[role])

    def ranks_at(self, engine: EnginePlace) -> list[int]:
        """The trainer ranks on the engine's slots, in their order; none unless they are colocated."""
        places = {(t.node, t.slot): t.rank for t in self.trainers}
        return [
            rank for slot in engine.slots if (rank := places.get((engine.node, slot))) is not None
        ]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """The layout that `to_json` wrote, equal to it."""
        return TypeAdapter(cls).validate_json(text)

    def table(self) -> str:
        """One line a node: its role, trainer ranks and their coordinates, engines and their slots."""
        rows = [["node", "role", "ranks", "tp", "cp", "dp", "pp", "engines", "slots"]]
        for node in range(self.num_nodes):
            ranks = [t.rank for t in self.trainers if t.node == node]
            engines = [e for e in self.engines if e.node == node]
            places = [self.parallel.coordinates(rank) for rank in ranks]
            along = [_span(p[name] for p in places) for name in ("tp", "cp", "dp", "pp")]
            taken = [_span(e.index for e in engines), _span(s for e in engines for s in e.slots)]
            rows.append([str(node), self.roles(node) or "idle", _span(ranks), *along, *taken])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def plan(config: RunConfig, shape: ModelShape) -> Layout:
    """Where everything goes. Raises RunError, with value, place and what is valid, for what cannot be."""
    cluster, slots = config.cluster, _slots(config)
    trainer_slots = _trainer_slots(config, slots)
    places = [(node, slot) for node, count in enumerate(trainer_slots) for slot in range(count)]
    alone = ParallelDims(tp=1, pp=1, cp=1, ep=1, dp=1)
    parallel = _parallel(config, shape, len(places), slots) if places else alone
    if cluster.device == "cuda" and places:
        check_kernels(config.training, shape, transformer_engine=_has_transformer_engine(config))
    _check_engine(config, shape, slots)
    colocated = (
        trainer_slots[0],
        [0] * cluster.nodes,
    )  # as if there were no trainers, on their slots
    trainers = tuple(TrainerPlace(rank, node, slot) for rank, (node, slot) in enumerate(places))
    layout = Layout(
        num_nodes=cluster.nodes,
        slots_per_node=slots,
        device=cluster.device,
        backend=config.training.backend,
        parallel=parallel,
        trainers=trainers,
        engines=_engines(config, *(colocated if cluster.colocate else (slots, trainer_slots))),
    )
    _check_memory(config, shape, layout)
    return layout


def _slots(config: RunConfig) -> int:
    """Slots of a node. On one machine without GPUs `num_gpus` says how many ranks there are to be."""
    cluster, ranks = config.cluster, config.training.num_gpus
    if cluster.nodes > 1 or cluster.device == "cuda" or ranks is None:
        return cluster.slots
    engine = config.rollout.engine_tp_size if _apart(config) else 0
    return max(cluster.slots, ranks + engine)


def _trainer_slots(config: RunConfig, slots: int) -> list[int]:
    """Slots of each node that trainers take: all of the first nodes, or a part of the only one."""
    nodes, embedded = config.cluster.nodes, not config.rollout.takes_slots
    rollout_nodes = config.cluster.rollout_nodes
    if config.rollout.rollout_only:
        return [0] * nodes
    if config.cluster.colocate:
        _check_colocated(config)
    if rollout_nodes is None:
        rollout_nodes = nodes // 2 if _apart(config) else 0
    if embedded and rollout_nodes:
        raise RunError(
            f"cluster.rollout_nodes={rollout_nodes}: the embedded engine needs no nodes; set 0"
        )
    if nodes == 1 and not rollout_nodes:
        return [_one_node_trainer_slots(config, slots)]
    choices = f"choose {_span(range(1, nodes))}, the rest are trainers"
    if nodes == 1:
        choices = "with one node engines share it (cluster.engine_gpus); leave it out"
    if rollout_nodes >= nodes:
        raise RunError(f"cluster.rollout_nodes={rollout_nodes} of cluster.nodes={nodes}: {choices}")
    if _apart(config) and rollout_nodes == 0:
        raise RunError(f"cluster.rollout_nodes=0: SGLang engines need nodes; {choices}")
    trainer_nodes, asked = nodes - rollout_nodes, config.training.num_gpus
    if asked not in (None, trainer_nodes * slots):
        ranks = f"{trainer_nodes} x {slots} = {trainer_nodes * slots} trainer ranks"
        way_out = "leave it out, or change cluster.nodes or cluster.rollout_nodes"
        raise RunError(f"training.num_gpus={asked}: a job of {nodes} nodes has {ranks}; {way_out}")
    return [slots] * trainer_nodes + [0] * rollout_nodes


def _check_colocated(config: RunConfig) -> None:
    for name in ("rollout_nodes", "engine_gpus"):
        if (value := getattr(config.cluster, name)) is not None:
            share = "engines then share the trainers' slots, on every node"
            raise RunError(
                f"cluster.{name}={value} with cluster.colocate: {share}; leave one of them out"
            )
    if config.rollout.engine == "embedded":
        what = "it has nothing to share with several ranks"
        raise RunError(
            f"cluster.colocate with rollout.engine=embedded: {what}; leave one of them out"
        )


def _apart(config: RunConfig) -> bool:
    """Whether engines have slots of their own."""
    return config.rollout.takes_slots and not config.cluster.colocate


def _one_node_trainer_slots(config: RunConfig, slots: int) -> int:
    apart, ranks, slot = _apart(config), config.training.num_gpus, _slot_name(config)
    given = engine = config.cluster.engine_gpus
    if not apart and engine:
        raise RunError(
            f"cluster.engine_gpus={engine}: the embedded engine takes no GPU of its own; set 0"
        )
    if apart and slots == 1:
        field = (
            "cluster.gpus_per_node" if config.cluster.device == "cuda" else "cluster.slots_per_node"
        )
        room = f"one node with one {slot} has no room for an SGLang engine beside the trainer"
        raise RunError(f"{field}=1: {room}; use --colocate or --engine embedded")
    if apart and given is not None and not 1 <= given < slots:
        choices = _span(range(1, slots))
        raise RunError(f"cluster.engine_gpus={given} of {slots} {slot}s; choose {choices}")
    if engine is None:
        engine = max(1, slots - ranks if ranks else slots // 2) if apart else 0
    trainers = ranks or slots - engine
    if trainers + engine > slots:
        taken = f"of the node's {slots} {slot}s {engine} or more are for engines"
        raise RunError(f"training.num_gpus={trainers}: {taken}; choose at most {slots - engine}")
    return trainers


def check_parallel(
    t: TrainingConfig, shape: ModelShape, ranks: int, slots: int, slot: str = "rank"
) -> None:
    """Raises RunError as frozen_names does, and for a model that the backend lacks or sizes that do not fit.

    `ranks` are all; the `slots` of a node, each called a `slot`, hold whole tensor-parallel groups.
    """
    what = f"training.backend={t.backend} cannot train this {shape.model_type}"
    if t.backend == "megatron" and shape.megatron_lacks:
        raise RunError(f"{what}: {', '.join(shape.megatron_lacks)}")
    if t.backend == "fsdp" and shape.moe:
        raise RunError(f"{what}, which has experts; use --backend megatron")
    if t.routing_replay != "none" and not shape.moe_layers:
        raise RunError(
            f"training.routing_replay={t.routing_replay}: {shape.model_type} has no experts"
        )
    if t.freeze:  # of a model with many experts, naming the tensors takes half a second
        frozen_names(t.freeze, tensors(shape))
    if t.backend == "fsdp":
        check_data_parallel_only(t)
    tp_choices = check_tp_size(shape, t.tp_size, slots)
    pp_choices = _check_pp(t.pp_size, t.vpp_size, shape)
    if ranks % t.cp_size:
        place = f"training.cp_size={t.cp_size} does not divide the {ranks} trainer {slot}s"
        raise RunError(f"{place}; choose {words(divisors(ranks))}")
    model_ranks = t.tp_size * t.cp_size * t.pp_size
    if ranks % model_ranks:
        groups = ranks // t.cp_size
        pairs = [
            f"{tp} x {pp}" for tp in tp_choices for pp in pp_choices if groups % (tp * pp) == 0
        ]
        sizes = ["tp_size", "cp_size", "pp_size"] if t.cp_size > 1 else ["tp_size", "pp_size"]
        product = (
            " x ".join(f"training.{name}={getattr(t, name)}" for name in sizes)
            + f" = {model_ranks}"
        )
        place = f"{product} does not divide the {ranks} trainer {slot}s"
        raise RunError(f"{place}; choose TP x PP {words(pairs)}, or change cluster.nodes")
    check_experts(shape, t, ranks // t.pp_size)


def check_data_parallel_only(t: TrainingConfig) -> None:
    for name in PARALLEL_SIZES:
        if getattr(t, name) != 1:
            raise RunError(
                f"training.{name}={getattr(t, name)} needs --backend megatron; with fsdp set 1"
            )


def _parallel(config: RunConfig, shape: ModelShape, ranks: int, slots: int) -> ParallelDims:
    t, steps = config.training, config.training.num_steps_per_rollout
    check_parallel(t, shape, ranks, slots, _slot_name(config))
    dp = ranks // (t.tp_size * t.cp_size * t.pp_size)
    prompts, n = config.rollout.rollout_batch_size, config.rollout.n_samples_per_prompt
    samples = prompts // steps * n
    if samples < dp:
        given = f"rollout.rollout_batch_size={prompts} x rollout.n_samples_per_prompt={n} gives {samples}"
        way_out = f"choose sizes with a product of at least {dp * steps}"
        raise RunError(f"{given} samples per optimizer step for DP={dp}; {way_out}")
    return ParallelDims(tp=t.tp_size, pp=t.pp_size, cp=t.cp_size, ep=t.ep_size, dp=dp)


def _check_pp(pp: int, vpp: int, shape: ModelShape) -> list[int]:
    """All sizes that pipeline parallelism may have; RunError where `pp` is none, or `vpp` does not fit it."""
    choices = divisors(shape.num_layers)
    if pp not in choices:
        place = f"training.pp_size={pp} does not divide num_layers={shape.num_layers}"
        raise RunError(f"{place}; choose {words(choices)}")
    virtual = divisors(shape.num_layers // pp) if pp > 1 else [1]
    if vpp not in virtual:
        layers = f"the {shape.num_layers // pp} layers of a rank with training.pp_size={pp}"
        why = f"does not divide {layers}" if pp > 1 else "needs training.pp_size of 2 or more"
        raise RunError(f"training.vpp_size={vpp} {why}; choose {words(virtual)}")
    return choices


def check_kernels(training: TrainingConfig, shape: ModelShape, *, transformer_engine: bool) -> None:
    """For trainers on GPUs. Raises RunError for what is slow without Transformer Engine, unless allowed."""
    if transformer_engine or training.allow_slow or training.backend != "megatron":
        return
    way_out = (
        "install transformer_engine in the environment of the job, or allow that by --allow-slow"
    )
    if training.cp_size > 1:
        slow = "each rank gathers the keys and values of all in every layer"
        raise RunError(
            f"training.cp_size={training.cp_size}: without Transformer Engine {slow}; {way_out}"
        )
    if shape.moe:
        slow = "experts are multiplied one after the other"
        raise RunError(f"{shape.model_type}: without Transformer Engine {slow}; {way_out}")


def _has_transformer_engine(config: RunConfig) -> bool:
    """In the environment of the job; taken to be there where this machine cannot see that environment."""
    venv = Path(config.cluster.venv)
    if not config.cluster.venv:
        return find_spec("transformer_engine") is not None
    return not venv.is_dir() or any(venv.glob("lib/python*/site-packages/transformer_engine"))


def _check_engine(config: RunConfig, shape: ModelShape, slots: int) -> None:
    if not config.rollout.takes_slots:
        return
    if shape.model_type in ("qwen2_moe", "qwen3_moe") and len(shape.moe_layers) < shape.num_layers:
        what = f"has experts in all layers of a {shape.model_type}, this one in {len(shape.moe_layers)}"
        raise RunError(f"rollout.engine=sglang: SGLang 0.5.23 {what}; use --engine embedded")
    tp, groups = config.rollout.engine_tp_size, shape.num_key_value_heads
    possible = [n for n in divisors(shape.num_attention_heads) if n <= slots]
    fits = [
        n for n in possible if groups % n == 0 or n % groups == 0
    ]  # key-value heads may be copied
    why = f"does not fit num_attention_heads={shape.num_attention_heads} and num_key_value_heads={groups}"
    if tp > slots:
        why = f"exceeds the {slots} slots of a node"
    if tp not in fits:
        raise RunError(f"rollout.engine_tp_size={tp} {why}; choose {words(fits)}")


def _engines(config: RunConfig, slots: int, trainer_slots: list[int]) -> tuple[EnginePlace, ...]:
    """Engines fill what trainers leave, from the end of each node."""
    if not config.rollout.takes_slots:
        return ()
    tp, engines = config.rollout.engine_tp_size, list[EnginePlace]()
    for node, taken in enumerate(trainer_slots):
        free = slots - taken
        if taken and config.cluster.nodes == 1 and config.cluster.engine_gpus is not None:
            free = min(free, config.cluster.engine_gpus)
        if not free:
            continue
        room, asked = free // tp, config.rollout.engines_per_node
        if not 1 <= (asked or room) <= room:
            value = f"rollout.engines_per_node={asked} x " if asked else ""
            choice = (
                f"engines_per_node at most {room}" if room else f"engine_tp_size at most {free}"
            )
            place = f"the {free} {_slot_name(config)}s that node {node} has for engines"
            raise RunError(
                f"{value}rollout.engine_tp_size={tp} does not fit {place}; choose {choice}"
            )
        for i in range(asked or room):
            first = slots - free + i * tp
            engines.append(EnginePlace(len(engines), node, tuple(range(first, first + tp))))
    return tuple(engines)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the fullest GPU of a kind; activations are an estimate of the largest micro-batch."""

    states: int  # trainer: weights, gradients, optimizer state; reference weights wait on the CPU
    activations: int
    engine_weights: int
    kv_bytes_per_token: int

    @property
    def trainer(self) -> int:
        return self.states + self.activations


def memory(config: RunConfig, shape: ModelShape, layout: Layout) -> Memory:
    """What a trainer GPU and an engine GPU must hold.

    Activations count what the backward pass of a layer keeps (as arXiv 2205.05198 section 4 does, for gated
    MLPs and an attention that keeps no scores); the first pipeline stage holds them for `pp` micro-batches,
    interleaved for (pp - 1) / vpp more. With context parallelism each rank has its part of a micro-batch.
    Logits exist for a block of some megabytes only (training/logprobs.py).
    """
    t, p, width = config.training, layout.parallel, 2 if config.model.dtype == "bfloat16" else 4
    trained = _trained(t.freeze, shape)
    if layout.backend == "megatron":
        sizes = (p.tp, p.pp, p.dp * p.cp, p.ep * t.etp_size)
        kind = {"distributed_optimizer": t.distributed_optimizer, "offload": t.optimizer_offload}
        states = shape.training_bytes(*sizes, **kind, trained=trained)
    else:  # all sharded over DP, but for the largest block that is gathered, and the next one
        largest = max(shape.num_layer_parameters, shape.num_embedding_parameters)
        whole_states = shape.training_bytes(1, 1, 1, distributed_optimizer=False, trained=trained)
        states = (0 if t.optimizer_offload else whole_states // p.dp) + 2 * width * largest
    heads, groups = (
        shape.num_attention_heads * shape.head_dim,
        shape.num_key_value_heads * shape.head_dim,
    )
    whole = (
        4 * shape.hidden_size // (p.tp if t.sequence_parallel else 1)
    )  # inputs and outputs of two norms
    mlp, moe = 3 * shape.intermediate_size, shape.moe
    if moe:  # a token goes to several experts
        sent = moe.num_experts_per_token * (2 * shape.hidden_size + 3 * moe.intermediate_size)
        mlp = max(mlp, sent + 3 * moe.shared_intermediate_size)
    split = (2 * heads + 2 * groups + mlp) // p.tp
    layer, at_once = (
        (whole + split) * width,
        shape.num_layers,
    )  # of a stage, times its micro-batches
    if t.vpp_size > 1:
        at_once += shape.num_layers * (p.pp - 1) // (p.pp * t.vpp_size)
    kept = at_once * layer if not t.recompute else at_once * shape.hidden_size * width + layer
    engine_tp = config.rollout.engine_tp_size
    cached = 2 * -(-shape.num_key_value_heads // engine_tp) * shape.head_dim  # keys and values
    if shape.mla:  # one latent for all heads, on every rank
        cached = shape.mla.kv_lora_rank + shape.mla.qk_rope_head_dim
    return Memory(
        states=states,
        activations=t.max_tokens_per_microbatch * kept,
        engine_weights=width * shape.num_parameters // engine_tp,
        kv_bytes_per_token=shape.num_layers * cached * width,
    )


def _trained(freeze: Sequence[str], shape: ModelShape) -> float:
    """The share of parameters that `freeze` leaves."""
    sizes = {name: prod(full) for name, full in tensors(shape).items()} if freeze else {"": 1}
    return 1 - sum(sizes[name] for name in frozen_names(freeze, sizes)) / sum(sizes.values())


def _check_memory(config: RunConfig, shape: ModelShape, layout: Layout) -> None:
    """Refuse what cannot fit whatever the batch is; the rest is an estimate that the plan shows."""
    if layout.device == "cpu":
        return
    need, have = memory(config, shape, layout), config.cluster.gpu_memory_gib * _GIB
    limit = f"cluster.gpu_memory_gib={config.cluster.gpu_memory_gib:g}"
    if layout.trainers and need.states > have:
        more = "training.tp_size, training.pp_size or the nodes"
        way_out = f"raise {more if layout.backend == 'megatron' else 'the trainer GPUs'}"
        share = f"{need.states / _GIB:.0f} GiB of each trainer GPU, which has {limit}"
        raise RunError(f"weights, gradients and optimizer state take {share}; {way_out}")
    both = need.states + need.engine_weights
    if config.cluster.colocate and both > have:
        share = (
            f"{both / _GIB:.0f} GiB, trainer's states and engine's weights, while these are sent"
        )
        way_out = f"it has {limit}; raise rollout.engine_tp_size or the nodes"
        raise RunError(f"cluster.colocate: a GPU holds {share}; {way_out}")
    if layout.engines and need.engine_weights > have * _mem_fraction(config):
        given = f"rollout.engine_tp_size={config.rollout.engine_tp_size}"
        share = f"{need.engine_weights / _GIB:.0f} GiB of each engine GPU"
        raise RunError(
            f"{given}: the weights take {share}, more than SGLang's share of {limit}; raise it"
        )


def _mem_fraction(config: RunConfig) -> float:
    default = COLOCATED_MEM_FRACTION if config.cluster.colocate else _SGLANG_MEM_FRACTION
    return float(config.rollout.sglang.get("mem_fraction_static") or default)


def describe(config: RunConfig, shape: ModelShape, layout: Layout) -> str:
    """The plan as a person reads it: nodes, parallel sizes, engines, memory and GPU hours."""
    p, slot = layout.parallel, _slot_name(config)
    nodes = f"{layout.num_nodes} x {layout.slots_per_node} {slot}s"
    if layout.device == "cuda":
        gpus, hours = layout.num_nodes * layout.slots_per_node, config.cluster.time_limit_min / 60
        nodes += f"; at most {gpus * hours:g} GPU hours ({gpus} GPUs for {hours:g} h)"
    backend = "Megatron" if layout.backend == "megatron" else "FSDP2"
    if layout.backend == "fsdp" and layout.num_nodes == 1:
        backend += " (what one node gets without --backend)"
    interleaved = (
        f" (interleaved by {config.training.vpp_size})" if config.training.vpp_size > 1 else ""
    )
    experts = f" EP={p.ep} ETP={config.training.etp_size}" if shape.moe else ""
    sizes = f"TP={p.tp} CP={p.cp} PP={p.pp}{interleaved} DP={p.dp}{experts}"
    engines = (
        "none: recorded rollouts" if config.rollout.load_rollouts else "embedded, in the driver"
    )
    if layout.engines:
        engines = f"SGLang: {len(layout.engines)} of {config.rollout.engine_tp_size} {slot}(s) each"
    if config.cluster.colocate:
        engines += ", the trainers' own; one of the two sleeps"
    return "\n".join(
        [
            f"nodes     {nodes}",
            f"model     {shape.model_type}, {shape.num_parameters:,} parameters, {config.model.dtype}",
            f"trainers  {f'{backend}: {sizes}' if layout.trainers else 'none'}",
            f"engines   {engines}",
            *_memory_lines(config, shape, layout),
            "",
            layout.table(),
        ]
    )


def _memory_lines(config: RunConfig, shape: ModelShape, layout: Layout) -> list[str]:
    need, have, gpu = (
        memory(config, shape, layout),
        config.cluster.gpu_memory_gib,
        layout.device == "cuda",
    )
    trainer = f"trainer: {_size(need.states)} states, about {_size(need.activations)} activations"
    engine = f"engine: {_size(need.engine_weights)} weights"
    if gpu:
        tokens = (
            have * _GIB * _mem_fraction(config) - need.engine_weights
        ) / need.kv_bytes_per_token
        trainer += f", of {have:g} GiB"
        engine += f", room for about {tokens:,.0f} tokens of KV cache"
    if gpu and need.trainer > have * _GIB:
        trainer += (
            "; MAY NOT FIT: lower training.max_tokens_per_microbatch, or set training.recompute"
        )
    lines = [trainer] * bool(layout.trainers) + [engine] * bool(layout.engines)
    return [f"{'' if i else 'memory':10}{line}" for i, line in enumerate(lines)]


def _size(num_bytes: int) -> str:
    return (
        f"{num_bytes / _GIB:.1f} GiB"
        if num_bytes >= _GIB // 10
        else f"{num_bytes / (1 << 20):.1f} MiB"
    )


def _slot_name(config: RunConfig) -> str:
    return "GPU" if config.cluster.device == "cuda" else "CPU slot"


def _span(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> 0-2,5; nothing -> -."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][-1] + 1:
            runs[-1][1:] = [n]
        else:
            runs.append([n])
    return ",".join("-".join(map(str, run)) for run in runs) or "-"
