"""What a run holds, by part: the arithmetic of the other files put together."""

from math import ceil

from nanoslime.config import RunConfig
from nanoslime.engine_kind import engine_kind, takes_slots
from nanoslime.models.parallel_sizes import ParallelDims
from nanoslime.models.shape import ModelShape
from tools.memory.activations import Microbatch, activations_of_ranks
from tools.memory.host import disk_need, longest_answer, longest_sequence, node_memory
from tools.memory.parts import GIB, EngineGPU, Memory, TrainerGPU
from tools.memory.states import States, states_of_ranks, width_of

# CUDA's context takes about half a GiB of a GPU, and NCCL's buffers take some hundred MiB for
# a few groups. Neither was measured here.
CONTEXT_AND_NCCL = 3 * GIB // 2
# What a sleeping SGLang engine keeps: its context, its buffers and its captured graphs.
SLEEPING_ENGINE = 2 * GIB
# The share of a GPU that is left for fragments and for short-lived tensors of a backward pass.
HEADROOM = 0.05
# Sizes of the blocks of logits on a GPU (training/logprobs.py).
_BLOCK_TOKENS = 2048
_BLOCK_COLUMNS = 16_384


def estimate_memory(config: RunConfig, shape: ModelShape, parallel: ParallelDims) -> Memory:
    """What the fullest trainer GPU, an engine GPU and the fullest node must hold, and the
    disk."""
    states = states_of_ranks(config, shape, parallel)
    trainer = None
    if not config.rollout.rollout_only:
        budget = config.training.max_tokens_per_microbatch
        trainer = _trainer(config, shape, parallel, states, budget)
    engine = engine_gpu(config, shape) if takes_slots(config.rollout) else None
    fullest = max(states, key=lambda of_rank: of_rank.weights + of_rank.optimizer)
    return Memory(
        trainer=trainer,
        engine=engine,
        node=node_memory(config, shape, parallel, fullest),
        disk=disk_need(config, shape),
    )


def _trainer(
    config: RunConfig,
    shape: ModelShape,
    parallel: ParallelDims,
    states: list[States],
    budget: int,
) -> TrainerGPU:
    """The rank of the pipeline that needs most, be it at the budget or at the longest sequence."""
    longest = ceil(longest_sequence(config, shape) / parallel.cp)
    # A sequence that is longer than the budget has a micro-batch for itself; otherwise the
    # budget is what is full.
    lone = max(budget, longest)
    at_budget = _activations(config, shape, parallel, budget)
    at_longest = at_budget
    if lone > budget:
        at_longest = _activations(config, shape, parallel, lone)
    on_gpu = config.cluster.device == "cuda"
    reserve = 0
    headroom = 0
    if on_gpu:
        reserve = CONTEXT_AND_NCCL + (SLEEPING_ENGINE if config.cluster.colocate else 0)
        headroom = int(HEADROOM * config.cluster.gpu_memory_gib * GIB)
    found = []
    for rank, of_rank in enumerate(states):
        is_last = rank == parallel.pp - 1
        found.append(
            TrainerGPU(
                weights=of_rank.weights,
                gradients=of_rank.gradients,
                optimizer=of_rank.optimizer,
                gathered=of_rank.gathered,
                activations=at_budget[rank],
                longest_activations=at_longest[rank],
                logprobs=_logprob_bytes(config, shape, parallel, lone) if is_last else 0,
                sync_buckets=2 * config.weight_sync.bucket_bytes,
                reserve=reserve,
                headroom=headroom,
                budget_tokens=budget,
                longest_tokens=longest,
            )
        )
    return max(found, key=lambda rank: rank.total)


def trainer_gpu(
    config: RunConfig, shape: ModelShape, parallel: ParallelDims, budget: int
) -> TrainerGPU:
    """What the fullest trainer GPU holds with this training.max_tokens_per_microbatch."""
    states = states_of_ranks(config, shape, parallel)
    return _trainer(config, shape, parallel, states, budget)


def _activations(
    config: RunConfig, shape: ModelShape, parallel: ParallelDims, tokens: int
) -> list[int]:
    length = min(longest_sequence(config, shape), tokens * parallel.cp)
    return activations_of_ranks(config, shape, parallel, Microbatch(tokens, length))


def _logprob_bytes(
    config: RunConfig, shape: ModelShape, parallel: ParallelDims, tokens: int
) -> int:
    """What the backward pass of the logprobs holds beside all activations.

    In float32: a block of logits and one of their exponentials, the gradient of a block of
    columns and that of the hidden states [T, H]; in model.dtype the gradient of the rank's part
    of the output weight.
    """
    columns = ceil(shape.vocab_size / parallel.tp)
    block_columns = min(columns, _BLOCK_COLUMNS)
    blocks = 2 * 4 * min(tokens, _BLOCK_TOKENS) * block_columns
    gradients = 4 * shape.hidden_size * (block_columns + tokens)
    return blocks + gradients + width_of(config) * columns * shape.hidden_size


def engine_gpu(config: RunConfig, shape: ModelShape) -> EngineGPU:
    """An engine cuts its weights over its GPUs; what the share leaves is cache."""
    tp_size = config.rollout.engine_tp_size
    width = width_of(config)
    weights = width * shape.num_parameters // tp_size
    fraction = engine_kind(config.rollout).memory_fraction(config)
    share = int(config.cluster.gpu_memory_gib * GIB * fraction)
    return EngineGPU(
        weights=weights,
        cache=share - weights,
        kv_bytes_per_token=width * shape.num_layers * _cached_numbers(shape, tp_size),
        longest_tokens=min(
            config.data.max_prompt_tokens + longest_answer(config)[1], shape.context_length
        ),
    )


def _cached_numbers(shape: ModelShape, engine_tp: int) -> int:
    """Numbers that one engine GPU caches for one token of one layer."""
    if shape.mla:
        # One latent serves all heads, and every rank holds it.
        return shape.mla.kv_lora_rank + shape.mla.qk_rope_head_dim
    heads = ceil(shape.num_key_value_heads / engine_tp)
    keys_and_values = 2
    return keys_and_values * heads * shape.head_dim
