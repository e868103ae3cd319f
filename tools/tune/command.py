"""Prints the five layouts of a job that a model of its cost finds fastest.

python jobs/submit_grpo.py --tune and the flags of the job
"""

import os
import sys
from collections.abc import Iterator, Mapping

from nanoslime.config import RunConfig
from nanoslime.engine_kind import takes_slots
from nanoslime.models.shape import ModelShape
from nanoslime.types import RunError
from tools.memory import plan as memory_plan
from tools.submit import choose, inputs, sites
from tools.submit import grpo as submit_grpo
from tools.tune.cost import MEAN_SHARE, StepTime, step_time

_SHOWN = 5
# Longer pipelines are not looked at.
_MAX_PP = 8
_NOTE = f"""\
This is a model, not a measurement: work over the speeds in the cluster file (gpu_tflops,
gpu_memory_gb_s, nvlink_gb_s, network_gb_s), with answers of {MEAN_SHARE:.0%} of the longest.
Take it for an order of layouts to try, and not for seconds."""


def main(argv: list[str]) -> int:
    """The exit code: 2 where no layout fits or a flag is wrong."""
    try:
        command, flags = submit_grpo.parse([word for word in argv if word != "--tune"])
        if not (command.cluster or command.resume or command.local):
            command.cluster = sites.of_this_machine(os.environ)
        config = submit_grpo.configure(command, flags)
        if config.cluster.device == "cpu":
            raise RunError("--tune needs a cluster with GPUs; name one by --cluster")
        sources = submit_grpo.sources_of(command, flags)
        config, shape, _ = inputs.resolve(config, download=False)
        print(table(config, best(config, shape, sources)))
    except (RunError, OSError) as error:
        print(f"submit_grpo: {error}", file=sys.stderr)
        return 2
    return 0


def best(
    config: RunConfig, shape: ModelShape, sources: Mapping[str, str]
) -> list[tuple[StepTime, choose.Sizes]]:
    """The fastest layouts that fit and keep all that is set, the fastest first."""
    sizes_to_try = [
        sizes for sizes in _all_sizes(config, shape) if _is_free(config, sizes, sources)
    ]
    # Each share of the engines is first timed with every size of engine, and one of trainers.
    of_engines: dict[tuple[int | None, int], StepTime] = {}
    for sizes in sizes_to_try:
        key = _engines(sizes)
        if key not in of_engines and (timed := _timed(config, shape, sizes)):
            of_engines[key] = timed
    fastest: dict[int | None, int] = {}
    for (share, size), timed in of_engines.items():
        known = fastest.setdefault(share, size)
        if timed.generate_s < of_engines[share, known].generate_s:
            fastest[share] = size
    found = []
    for sizes in sizes_to_try:
        share, size = _engines(sizes)
        if fastest.get(share) == size and (timed := _timed(config, shape, sizes)):
            found.append((timed, sizes))
    if not found:
        memory_plan.plan(config, shape)
        raise RunError("no layout fits with headroom that keeps all that is set")
    return sorted(found, key=lambda one: one[0].step_s)[:_SHOWN]


def _is_free(config: RunConfig, sizes: choose.Sizes, sources: Mapping[str, str]) -> bool:
    """Whether these sizes keep what is set, in pipelines that are not too long."""
    is_kept = choose.changes(config, sizes).keys().isdisjoint(sources)
    return is_kept and sizes["training.pp_size"] <= _MAX_PP


def _engines(sizes: choose.Sizes) -> tuple[int | None, int]:
    """What engines have of the job, and the GPUs of one."""
    share = sizes.get("cluster.rollout_nodes", sizes.get("cluster.engine_gpus"))
    return share, sizes["rollout.engine_tp_size"]


def _timed(config: RunConfig, shape: ModelShape, sizes: choose.Sizes) -> StepTime | None:
    """The time of a step with these sizes, if they fit."""
    changed = choose.changes(config, sizes)
    layout = choose.fitting(config, shape, changed)
    if layout is None:
        return None
    return step_time(choose.with_sizes(config, changed), shape, layout)


def _all_sizes(config: RunConfig, shape: ModelShape) -> Iterator[choose.Sizes]:
    """Those that a choice is made of, and more nodes for engines."""
    yield from choose.candidates(config, shape)
    nodes = config.cluster.nodes
    if config.cluster.colocate or not takes_slots(config.rollout):
        return
    trainer_nodes = nodes // 4
    while trainer_nodes:
        rollout_nodes = nodes - trainer_nodes
        with_more = choose.with_sizes(config, {"cluster.rollout_nodes": rollout_nodes})
        for sizes in choose.candidates(with_more, shape):
            if sizes["cluster.rollout_nodes"] == rollout_nodes:
                yield sizes
        trainer_nodes //= 2


def table(config: RunConfig, found: list[tuple[StepTime, choose.Sizes]]) -> str:
    """One line a layout: seconds of a step and of its parts, and the flags that make it of
    the job."""
    lines = ["step s  generate  train  sync  layout"]
    for timed, sizes in found:
        flags = choose.as_flags(choose.changes(config, sizes)) or "as the job is"
        seconds = f"{timed.step_s:6.0f}  {timed.generate_s:8.0f}  {timed.train_s:5.0f}"
        lines.append(f"{seconds}  {timed.sync_s:4.1f}  {flags}")
    return "\n".join([*lines, "", _NOTE])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
