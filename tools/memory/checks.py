"""What cannot fit is refused; the rest is shown, with what may not fit."""

from nanoslime.config import RunConfig
from nanoslime.engine_kind import engine_kind
from nanoslime.models.parallel_sizes import ParallelDims
from nanoslime.models.shape import ModelShape
from nanoslime.types import RunError
from tools.memory.estimate import estimate_memory, trainer_gpu
from tools.memory.host import longest_answer
from tools.memory.parts import GIB, EngineGPU, NodeMemory, TrainerGPU, size_text


def check_memory(config: RunConfig, shape: ModelShape, parallel: ParallelDims) -> None:
    """Raises RunError for what cannot fit on a GPU or a node whatever the token budget is.

    That is without headroom: what fits only tightly, the plan shows.
    """
    need = estimate_memory(config, shape, parallel)
    _check_node(need.node)
    if config.cluster.device == "cpu":
        return
    if need.trainer:
        _check_states(config, shape, need.trainer)
        if need.engine and config.cluster.colocate:
            _check_colocated(config, need.trainer, need.engine)
        _check_longest(config, shape, parallel, need.trainer)
    if need.engine:
        _check_engine(config, need.engine)


def _check_states(config: RunConfig, shape: ModelShape, trainer: TrainerGPU) -> None:
    gpu_gib = config.cluster.gpu_memory_gib
    if trainer.states + trainer.reserve > gpu_gib * GIB:
        raise RunError(
            f"weights, gradients and optimizer state take {trainer.states / GIB:.0f} GiB of each "
            f"trainer GPU, which has cluster.gpu_memory_gib={gpu_gib:g} and needs "
            f"{trainer.reserve / GIB:g} of them for CUDA and NCCL; raise the number of trainer "
            f"GPUs, or with --backend megatron {_sizes_that_divide(shape)}"
        )


def _check_longest(
    config: RunConfig, shape: ModelShape, parallel: ParallelDims, trainer: TrainerGPU
) -> None:
    gpu_gib = config.cluster.gpu_memory_gib
    if trainer.at_longest <= gpu_gib * GIB:
        return
    if trainer.longest_tokens < trainer.budget_tokens:
        # A lower budget helps, as far as the longest sequence lets it.
        trainer = trainer_gpu(config, shape, parallel, trainer.longest_tokens)
        if trainer.at_longest <= gpu_gib * GIB:
            return
    ways = ["lower rollout.max_new_tokens or data.max_prompt_tokens"]
    ways += ways_to_hold(config, shape)
    others = trainer.at_longest - trainer.longest_activations
    raise RunError(
        f"data.max_prompt_tokens={config.data.max_prompt_tokens} and rollout.max_new_tokens="
        f"{config.rollout.max_new_tokens} make a sequence that has a micro-batch for itself, "
        f"{trainer.longest_tokens} tokens of it on a trainer GPU, whose activations take "
        f"{trainer.longest_activations / GIB:.0f} GiB beside {others / GIB:.0f} GiB of states, "
        f"logprobs, CUDA and NCCL, of cluster.gpu_memory_gib={gpu_gib:g}; {', or '.join(ways)}"
    )


def ways_to_hold(config: RunConfig, shape: ModelShape) -> list[str]:
    """What makes the activations of a sequence smaller on each GPU."""
    ways = []
    if not config.training.recompute:
        ways.append("set training.recompute")
    if config.training.backend == "megatron":
        ways.append("raise training.cp_size")
        if not config.training.sequence_parallel:
            ways.append("raise training.tp_size with --sequence-parallel")
        else:
            ways.append("raise training.tp_size")
        if shape.moe:
            ways.append("raise training.ep_size")
    else:
        ways.append("use --backend megatron with training.cp_size or training.tp_size")
    return ways


def _check_colocated(config: RunConfig, trainer: TrainerGPU, engine: EngineGPU) -> None:
    gpu_gib = config.cluster.gpu_memory_gib
    while_sent = trainer.states + trainer.reserve + trainer.sync_buckets + engine.weights
    if while_sent > gpu_gib * GIB:
        raise RunError(
            f"cluster.colocate: a GPU holds {while_sent / GIB:.0f} GiB, the trainer's states, "
            f"buckets and the engine's weights, while weights are sent; it has "
            f"cluster.gpu_memory_gib={gpu_gib:g}; raise rollout.engine_tp_size or the nodes, or "
            "lower weight_sync.bucket_bytes"
        )


def _check_engine(config: RunConfig, engine: EngineGPU) -> None:
    gpu_gib = config.cluster.gpu_memory_gib
    title = engine_kind(config.rollout).title
    if engine.cache < 0:
        raise RunError(
            f"rollout.engine_tp_size={config.rollout.engine_tp_size}: the weights take "
            f"{engine.weights / GIB:.0f} GiB of each engine GPU, more than {title}'s "
            f"share of cluster.gpu_memory_gib={gpu_gib:g}; raise it"
        )
    field, of_answer = longest_answer(config)
    asked = config.data.max_prompt_tokens + of_answer
    if asked > engine.cached_tokens:
        raise RunError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} and {field}={of_answer} make "
            f"a sequence of {asked} tokens, and an engine caches about {engine.cached_tokens}; "
            "lower them, or raise rollout.engine_tp_size"
        )


def _check_node(node: NodeMemory) -> None:
    """Only of tensors: what processes take beside them is an estimate, which the plan shows."""
    tensors = node.total - node.processes
    if node.available is None or tensors <= node.available:
        return
    raise RunError(
        f"a node needs {tensors / GIB:.0f} GiB of main memory for tensors ({node_parts(node)}), "
        f"and cluster.memory_per_node gives it {node.available / GIB:.0f} GiB; raise it, or "
        "spread the trainers over more nodes"
    )


def _sizes_that_divide(shape: ModelShape) -> str:
    sizes = "training.tp_size or training.pp_size"
    if shape.moe:
        return f"training.ep_size, {sizes}"
    return sizes


def node_parts(node: NodeMemory) -> str:
    parts = {
        "reference": node.reference,
        "sleeping trainers": node.sleeping,
        "offloaded optimizer": node.offloaded,
        "embedded engine": node.embedded,
        "rollouts": node.rollouts,
        "processes": node.processes,
    }
    return ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
