"""Chooses the sizes of a layout that nobody has set, and names layouts that fit in place of one
that cannot.

Of the layouts that fit, with headroom on trainer GPUs and room for some sequences in an engine's
cache, the first is taken in this order: engines on half of the nodes (of one node's GPUs), or on
fewer; then as few GPUs as possible for a copy of the trained model (TP x PP), TP before PP; then
as small an EP and as small engines as possible. On CPUs nothing is chosen: memory is not the
matter there.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from math import log2
from operator import itemgetter
from typing import Any

from pydantic import ValidationError

from nanoslime import layout as layouts
from nanoslime.config import RunConfig
from nanoslime.engine_kind import takes_slots
from nanoslime.layout import Layout
from nanoslime.models.parallel_sizes import divisors, tp_sizes
from nanoslime.models.shape import ModelShape
from nanoslime.types import RunError
from tools.memory import plan as memory_plan
from tools.memory.estimate import engine_gpu, estimate_memory, trainer_gpu
from tools.memory.parts import GIB

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
_ENGINE_TP = "rollout.engine_tp_size"
# Numbers of pipeline stages that are looked at.
_STAGES = (1, 2, 3, 4, 6, 8, 12, 16)
# A search ends after so many seconds of work.
_SEARCH_S = 1.0
# Sequences of the longest length that an engine of a chosen size caches at once, at least.
_ROOM = 8
# So many layouts are named in a refusal.
_NAMED = 3


def choose(config: RunConfig, shape: ModelShape, sources: Mapping[str, str]) -> Sizes:
    """The sizes to change, where a layout fits that keeps all that `sources` has; else none.

    Raises RunError for what no sizes help against.
    """
    layouts.check_without_sizes(config, shape)
    tries = (changes(config, sizes) for sizes in candidates(config, shape))
    kept = (changed for changed in tries if changed.keys().isdisjoint(sources))
    return next(_Search().fitting(config, shape, kept), {})


def ways_out(config: RunConfig, shape: ModelShape) -> str:
    """What to add to the refusal of a layout: the nearest layouts that fit; nothing where memory is
    not the matter."""
    cluster = replace(config.cluster, gpu_memory_gib=1e6, memory_per_node="")
    try:
        memory_plan.plan(replace(config, cluster=cluster), shape)
    except RunError:
        return ""
    search = _Search()
    nodes = config.cluster.nodes
    for factor in (1, 2, 4):
        try:
            larger = _larger(config, factor)
            named = _nearest(config, shape, larger, search)
        except RunError:
            # The site's cluster.max_gpu_hours, for one.
            return f". No layout on {nodes} nodes fits either, and this job may not have more"
        if named:
            return f". These fit: {'; '.join(as_flags(changed) for changed in named)}"
        if search.is_cut:
            return f". A search of {_SEARCH_S:g} s found no layout that fits, and was cut then"
        nodes = factor * config.cluster.nodes
    return ". No layout on four times as many nodes fits either"


def _larger(config: RunConfig, factor: int) -> Sizes:
    """What makes a job of `factor` times as many nodes of this one."""
    if factor == 1:
        return {}
    larger: Sizes = {"cluster.nodes": factor * config.cluster.nodes}
    if config.training.backend == "fsdp":
        larger["training.backend"] = "megatron"
    if config.cluster.engine_gpus is not None:
        larger["cluster.engine_gpus"] = None
    return larger


def _nearest(config: RunConfig, shape: ModelShape, larger: Sizes, search: "_Search") -> list[Sizes]:
    """What to change for the layouts of the `larger` job that fit, the nearest ones first."""
    job = with_sizes(config, larger)
    tries = [changes(job, sizes) for sizes in candidates(job, shape)]
    tries.sort(key=lambda changed: _distance(job, changed))
    found: list[Sizes] = []
    # One that only adds to one that fits is not looked at.
    others = (
        changed for changed in tries if not any(named.items() <= changed.items() for named in found)
    )
    for changed in search.fitting(job, shape, others):
        found.append(changed)
        if len(found) == _NAMED:
            break
    return [larger | changed for changed in found]


class _Search:
    """A search for layouts that fit, which ends after some time."""

    def __init__(self) -> None:
        self.end = time.process_time() + _SEARCH_S
        # Whether the time was over before all was looked at.
        self.is_cut = False
        # How many layouts were planned.
        self.planned = 0

    def fitting(
        self, config: RunConfig, shape: ModelShape, tries: Iterable[Sizes]
    ) -> Iterator[Sizes]:
        """Those of the changes that make a layout that fits, in their order.

        The engines of all have room. So trainers that do not fit with one size of engine fit with
        none, unless they are on the same GPUs.
        """
        too_large = set()
        for changed in tries:
            others = {name: size for name, size in changed.items() if name != _ENGINE_TP}
            trainers = tuple(sorted(others.items(), key=itemgetter(0)))
            if trainers in too_large:
                continue
            if time.process_time() > self.end:
                self.is_cut = True
                return
            self.planned += 1
            if fitting(config, shape, changed):
                yield changed
            elif not config.cluster.colocate:
                too_large.add(trainers)


def _distance(config: RunConfig, changed: Sizes) -> float:
    """How far the changed sizes are from what is there: the sum of the powers of two between."""
    distance = 0.0
    for field, value in changed.items():
        before = _get(config, field)
        if field != "training.sequence_parallel":
            distance += abs(log2(value / before)) if value and before else 1
    return distance


def candidates(config: RunConfig, shape: ModelShape) -> list[Sizes]:
    """Sizes that divide what they have to, whatever is set, with engines that have room; the best
    ones first."""
    if config.cluster.device == "cpu":
        return []
    field, shares = _engine_shares(config)
    found = []
    for number, share in enumerate(shares):
        try:
            with_share = with_sizes(config, {field: share})
            ranks = layouts.trainer_ranks(with_share)
        except RunError:
            continue
        engine_tps = _engine_tps(with_share, shape)
        for (tp, pp, ep), engine_tp in product(_trainer_sizes(config, shape, ranks), engine_tps):
            found.append((number, tp * pp, pp, ep, engine_tp))
    return [
        {
            field: shares[number],
            "training.tp_size": model_ranks // pp,
            "training.pp_size": pp,
            "training.ep_size": ep,
            _ENGINE_TP: engine_tp,
        }
        for number, model_ranks, pp, ep, engine_tp in sorted(found)
    ]


def _trainer_sizes(
    config: RunConfig, shape: ModelShape, ranks: int
) -> Iterator[tuple[int, int, int]]:
    """TP, PP and EP of so many trainers."""
    training = config.training
    if training.backend != "megatron" or config.rollout.rollout_only:
        yield 1, 1, 1
        return
    stages = sorted({*_STAGES, training.pp_size})
    experts = divisors(shape.moe.num_experts) if shape.moe else [1]
    for tp, pp in product(tp_sizes(shape, config.cluster.slots), stages):
        if pp * training.vpp_size > shape.num_layers or ranks % (tp * training.cp_size * pp):
            continue
        for ep in experts:
            if ranks // pp % (ep * training.etp_size) == 0:
                yield tp, pp, ep


def _engine_tps(config: RunConfig, shape: ModelShape) -> list[int]:
    """The GPUs of an engine with which it has room; memory of trainers does not depend on it."""
    given = config.rollout.engine_tp_size
    if not takes_slots(config.rollout):
        return [given]
    found = []
    for tp in divisors(config.cluster.slots):
        try:
            sized = with_sizes(config, {_ENGINE_TP: tp})
            layouts.check_engines(sized, shape)
        except RunError:
            continue
        if engine_gpu(sized, shape).sequences >= _ROOM:
            found.append(tp)
    return found


def _engine_shares(config: RunConfig) -> tuple[str, list[int | None]]:
    """The field that says how much engines have of the job, and its values: what is given; None,
    which is half; half of that, and so on."""
    cluster = config.cluster
    is_one_node = cluster.nodes == 1
    field = "cluster.engine_gpus" if is_one_node else "cluster.rollout_nodes"
    given = cluster.engine_gpus if is_one_node else cluster.rollout_nodes
    if cluster.colocate or config.rollout.rollout_only or not takes_slots(config.rollout):
        return field, [given]
    if is_one_node and config.training.num_gpus is not None:
        return field, [given]
    shares: list[int | None] = [given, None]
    share = (cluster.slots if is_one_node else cluster.nodes) // 4
    while share:
        shares.append(share)
        share //= 2
    return field, list(dict.fromkeys(shares))


def changes(config: RunConfig, sizes: Sizes) -> Sizes:
    """Those of the sizes that differ from what is there. With TP goes sequence parallelism, without
    which it saves few activations and no experts can be trained."""
    changed = {field: value for field, value in sizes.items() if _get(config, field) != value}
    tp_size = sizes.get("training.tp_size", 1)
    if changed and tp_size > 1 and not config.training.sequence_parallel:
        changed["training.sequence_parallel"] = True
    return changed


def with_sizes(config: RunConfig, sizes: Sizes) -> RunConfig:
    """The configuration with these fields, by dotted name. Raises RunError where it allows no
    such values."""
    sections: dict[str, Sizes] = {}
    for field, value in sizes.items():
        section, _, leaf = field.partition(".")
        sections.setdefault(section, {})[leaf] = value
    try:
        changed = {name: replace(getattr(config, name), **sections[name]) for name in sections}
        return replace(config, **changed)
    except ValidationError as error:
        raise RunError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error


def fitting(config: RunConfig, shape: ModelShape, sizes: Sizes) -> Layout | None:
    """The layout with these sizes, if it fits with headroom."""
    try:
        config = with_sizes(config, sizes)
        if not _trainers_fit(config, shape):
            return None
        layout = memory_plan.plan(config, shape)
    except RunError:
        return None
    return layout if has_headroom(config, shape, layout) else None


def _trainers_fit(config: RunConfig, shape: ModelShape) -> bool:
    """Whether trainers have headroom: to know that takes a fraction of the time of a plan."""
    if config.rollout.rollout_only:
        return True
    parallel = layouts.parallel_dims(config, shape)
    budget = config.training.max_tokens_per_microbatch
    need = trainer_gpu(config, shape, parallel, budget)
    return need.total <= config.cluster.gpu_memory_gib * GIB


def has_headroom(config: RunConfig, shape: ModelShape, layout: Layout) -> bool:
    """Whether trainer GPUs have what they should have to spare, and engines room for sequences."""
    return not shortage(config, shape, layout)


def shortage(config: RunConfig, shape: ModelShape, layout: Layout) -> str:
    """What there is too little of, though the layout may do; nothing where all is well."""
    if layout.device == "cpu":
        return ""
    need = estimate_memory(config, shape, layout.parallel)
    gpu_gib = config.cluster.gpu_memory_gib
    if need.trainer and need.trainer.total > gpu_gib * GIB:
        without_headroom = (need.trainer.total - need.trainer.headroom) / GIB
        if without_headroom > gpu_gib:
            return f"a trainer GPU needs {without_headroom:.0f} of {gpu_gib:g} GiB"
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
