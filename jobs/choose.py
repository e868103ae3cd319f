"""Chooses the sizes of a layout that nobody has set, and names layouts that fit in place of one
that cannot.

Of the layouts that fit, with headroom on trainer GPUs and room for some sequences in an engine's
cache, the first is taken in this order: engines on half of the nodes (of one node's GPUs), or on
fewer; then as few GPUs as possible for a copy of the trained model (TP x PP), TP before PP; then
as small an EP and as small engines as possible. On CPUs nothing is chosen: memory is not the
matter there.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from math import log2
from typing import Any

from nanoslime import layout as layouts
from nanoslime.config import RunConfig
from nanoslime.engine_kind import takes_slots
from nanoslime.layout import Layout
from nanoslime.memory import estimate_memory
from nanoslime.models.parallel_sizes import divisors, tp_sizes
from nanoslime.models.shape import ModelShape
from nanoslime.types import RunError

SIZES = (
    "cluster.rollout_nodes",
    "cluster.engine_gpus",
    "training.tp_size",
    "training.pp_size",
    "training.ep_size",
    "rollout.engine_tp_size",
)
"""The fields that are chosen."""

Sizes = dict[str, Any]
# Sequences of the longest length that an engine of a chosen size caches at once, at least.
_ROOM = 8
# So many layouts are named in a refusal.
_NAMED = 3
_GIB = 1 << 30


def choose(config: RunConfig, shape: ModelShape, sources: Mapping[str, str]) -> Sizes:
    """The sizes to change, where a layout fits that keeps all that `sources` has; else none."""
    for sizes in candidates(config, shape):
        changed = changes(config, sizes)
        if changed.keys().isdisjoint(sources) and fitting(config, shape, changed):
            return changed
    return {}


def ways_out(config: RunConfig, shape: ModelShape) -> str:
    """What to add to the refusal of a layout: the nearest layouts that fit; nothing where memory is
    not the matter."""
    cluster = replace(config.cluster, gpu_memory_gib=1e6, memory_per_node="")
    try:
        layouts.plan(replace(config, cluster=cluster), shape)
    except RunError:
        return ""
    for factor in (1, 2, 4):
        larger: Sizes = {"cluster.nodes": factor * config.cluster.nodes} if factor > 1 else {}
        if larger and config.training.backend == "fsdp":
            larger["training.backend"] = "megatron"
        named = [
            as_flags(changes(config, larger | sizes)) for sizes in _nearest(config, shape, larger)
        ]
        if named:
            return f". These fit: {'; '.join(named)}"
    return ". No layout on four times as many nodes fits either"


def _nearest(config: RunConfig, shape: ModelShape, larger: Sizes) -> list[Sizes]:
    """The sizes of some layouts of the `larger` job that fit, the nearest first."""
    config = with_sizes(config, larger)
    found: list[Sizes] = []
    all_changes = [changes(config, sizes) for sizes in candidates(config, shape)]
    for changed in sorted(all_changes, key=lambda sizes: _distance(config, sizes)):
        adds_to_one = any(named.items() <= changed.items() for named in found)
        if not adds_to_one and fitting(config, shape, changed):
            found.append(changed)
        if len(found) == _NAMED:
            break
    return found


def _distance(config: RunConfig, changed: Sizes) -> float:
    """How far the changed sizes are from what is there: the sum of the powers of two between."""
    distance = 0.0
    for field, value in changed.items():
        before = _get(config, field)
        if field != "training.sequence_parallel":
            distance += abs(log2(value / before)) if value and before else 1
    return distance


def candidates(config: RunConfig, shape: ModelShape) -> list[Sizes]:
    """All sizes that may make a layout, whatever is set, the best ones first."""
    if config.cluster.device == "cpu":
        return []
    share, shares = _engine_shares(config)
    slots = config.cluster.slots
    ranks = slots * config.cluster.nodes
    engine_tps = divisors(slots) if takes_slots(config.rollout) else [config.rollout.engine_tp_size]
    tps, pps, eps = [1], [1], [1]
    if config.training.backend == "megatron" and not config.rollout.rollout_only:
        tps = tp_sizes(shape, slots)
        pps = [pp for pp in range(1, shape.num_layers + 1) if _divides(pp, config)]
        eps = divisors(shape.moe.num_experts) if shape.moe else [1]
    found = [
        (i, tp * pp, pp, ep, engine_tp)
        for i, tp, pp, ep, engine_tp in product(range(len(shares)), tps, pps, eps, engine_tps)
        if tp * pp <= ranks and ep <= ranks
    ]
    return [
        {
            share: shares[i],
            "training.tp_size": model_ranks // pp,
            "training.pp_size": pp,
            "training.ep_size": ep,
            "rollout.engine_tp_size": engine_tp,
        }
        for i, model_ranks, pp, ep, engine_tp in sorted(found)
    ]


def _divides(pp_size: int, config: RunConfig) -> bool:
    """Whether so many stages divide the GPUs of some number of the job's nodes."""
    cluster = config.cluster
    return any(cluster.slots * nodes % pp_size == 0 for nodes in range(1, cluster.nodes + 1))


def _engine_shares(config: RunConfig) -> tuple[str, list[int | None]]:
    """The field that says how much engines have of the job, and its values; None is half."""
    cluster = config.cluster
    is_one_node = cluster.nodes == 1
    field = "cluster.engine_gpus" if is_one_node else "cluster.rollout_nodes"
    given = cluster.engine_gpus if is_one_node else cluster.rollout_nodes
    halves = None, *range((cluster.slots if is_one_node else cluster.nodes) // 2 - 1, 0, -1)
    if cluster.colocate or config.rollout.rollout_only or not takes_slots(config.rollout):
        return field, [given]
    if is_one_node and config.training.num_gpus is not None:
        return field, [given]
    return field, list(dict.fromkeys([given, *halves]))


def changes(config: RunConfig, sizes: Sizes) -> Sizes:
    """Those of the sizes that differ from what is there. With TP goes sequence parallelism, without
    which it saves few activations and no experts can be trained."""
    changed = {field: value for field, value in sizes.items() if _get(config, field) != value}
    tp_size = sizes.get("training.tp_size", 1)
    if changed and tp_size > 1 and not config.training.sequence_parallel:
        changed["training.sequence_parallel"] = True
    return changed


def with_sizes(config: RunConfig, sizes: Sizes) -> RunConfig:
    """The configuration with these fields, by dotted name."""
    for field, value in sizes.items():
        section, _, leaf = field.partition(".")
        changed = replace(getattr(config, section), **{leaf: value})
        config = replace(config, **{section: changed})
    return config


def fitting(config: RunConfig, shape: ModelShape, sizes: Sizes) -> Layout | None:
    """The layout with these sizes, if it fits with headroom."""
    try:
        config = with_sizes(config, sizes)
        layout = layouts.plan(config, shape)
    except RunError:
        return None
    return layout if has_headroom(config, shape, layout) else None


def has_headroom(config: RunConfig, shape: ModelShape, layout: Layout) -> bool:
    """Whether trainer GPUs have what they should have to spare, and engines room for sequences."""
    return not shortage(config, shape, layout)


def shortage(config: RunConfig, shape: ModelShape, layout: Layout) -> str:
    """What there is too little of, though the layout may do; nothing where all is well."""
    if layout.device == "cpu":
        return ""
    need = estimate_memory(config, shape, layout.parallel)
    if need.trainer and need.trainer.total > config.cluster.gpu_memory_gib * _GIB:
        return "a trainer GPU has no headroom"
    if need.engine and need.engine.sequences < _ROOM:
        return f"an engine caches {need.engine.sequences} sequences of the longest length"
    return ""


def _get(config: RunConfig, field: str) -> Any:
    section, _, leaf = field.partition(".")
    return getattr(getattr(config, section), leaf)


def as_flags(sizes: Sizes) -> str:
    """The sizes as one would type them."""
    texts = []
    for field, value in sizes.items():
        flag = "--" + field.partition(".")[2].replace("_", "-")
        texts.append(flag if value is True else f"{flag} {value}".lower())
    return " ".join(texts)
