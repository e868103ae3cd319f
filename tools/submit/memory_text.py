"""What a run holds on a GPU, a node and the disk, as its plan shows it."""

import shutil
from pathlib import Path

from nanoslime.config import RunConfig
from nanoslime.models.parallel_sizes import ParallelDims
from nanoslime.models.shape import ModelShape
from tools.memory.checks import node_parts, ways_to_hold
from tools.memory.estimate import estimate_memory, trainer_gpu
from tools.memory.parts import GIB, EngineGPU, Memory, NodeMemory, TrainerGPU, size_text


def memory_lines(config: RunConfig, shape: ModelShape, parallel: ParallelDims) -> list[str]:
    """What a GPU of each kind, a node and the disk hold, one line each, as the plan shows it."""
    need = estimate_memory(config, shape, parallel)
    lines = []
    if need.trainer:
        lines.append(_trainer_line(config, shape, parallel, need.trainer))
    if need.engine:
        lines.append(_engine_line(config, need.engine))
    lines.append(_node_line(need.node))
    if need.disk.total:
        lines.append(_disk_line(config, need))
    return lines


def _trainer_line(
    config: RunConfig, shape: ModelShape, parallel: ParallelDims, trainer: TrainerGPU
) -> str:
    line = (
        f"trainer: {size_text(trainer.states)} states, about {size_text(trainer.activations)} "
        f"activations of {trainer.budget_tokens:,} tokens"
    )
    if trainer.longest_tokens > trainer.budget_tokens:
        line += (
            f", {size_text(trainer.longest_activations)} of the longest sequence "
            f"({trainer.longest_tokens:,} a GPU)"
        )
    if config.cluster.device == "cpu":
        return line
    gpu_gib = config.cluster.gpu_memory_gib
    others = trainer.logprobs + trainer.reserve
    line += (
        f", {size_text(others)} logprobs, CUDA and NCCL; with {size_text(trainer.headroom)} "
        f"headroom {size_text(trainer.total)} of {gpu_gib:g} GiB"
    )
    if trainer.total <= gpu_gib * GIB:
        return line
    ways = ways_to_hold(config, shape)
    if largest := largest_budget(config, shape, parallel):
        ways.insert(0, f"lower training.max_tokens_per_microbatch to {largest} or less")
    return f"{line}; MAY NOT FIT: {', or '.join(ways)}"


def _engine_line(config: RunConfig, engine: EngineGPU) -> str:
    line = f"engine: {size_text(engine.weights)} weights"
    if config.cluster.device == "cpu":
        return line
    return (
        f"{line}, room for about {engine.cached_tokens:,} tokens of KV cache, "
        f"{engine.sequences:,} sequences of {engine.longest_tokens:,}"
    )


def _node_line(node: NodeMemory) -> str:
    line = f"node: {size_text(node.total)} of main memory ({node_parts(node)})"
    if node.available is None:
        return line
    line += f", of {size_text(node.available)}"
    if node.total > node.available:
        line += "; MAY NOT FIT: raise cluster.memory_per_node"
    return line


def _disk_line(config: RunConfig, need: Memory) -> str:
    disk = need.disk
    number = "1 checkpoint" if disk.checkpoints == 1 else f"{disk.checkpoints} checkpoints"
    line = f"disk: {size_text(disk.total)} (at most {number} of {size_text(disk.checkpoint)}"
    if disk.export:
        line += f", {size_text(disk.export)} export"
    line += ")"
    free = free_bytes(config.cluster.run_root)
    if free is None:
        return line
    line += f", {size_text(free)} free at cluster.run_root (a quota does not show there)"
    if disk.total > free:
        line += "; MAY NOT FIT: set cluster.run_root to another filesystem"
        if disk.checkpoints > 1:
            line += ", or keep fewer by checkpoint.keep_last, keep_every and keep_best"
    return line


def largest_budget(config: RunConfig, shape: ModelShape, parallel: ParallelDims) -> int:
    """The largest training.max_tokens_per_microbatch, a multiple of 512, with which a trainer
    GPU holds everything, headroom included; 0 where none does."""
    gpu_bytes = int(config.cluster.gpu_memory_gib * GIB)
    low = 0
    high = 1 << 12  # times 512 tokens
    while low < high:
        middle = (low + high + 1) // 2
        if trainer_gpu(config, shape, parallel, 512 * middle).total <= gpu_bytes:
            low = middle
        else:
            high = middle - 1
    return 512 * low


def free_bytes(run_root: str) -> int | None:
    """Free bytes of the filesystem of the run root, or of the nearest directory above it.

    None where that cannot be asked. A quota of the user or of the project does not count in it.
    """
    place = Path(run_root or "runs").expanduser().absolute()
    for folder in (place, *place.parents):
        if folder.is_dir():
            try:
                return shutil.disk_usage(folder).free
            except OSError:
                return None
    return None
