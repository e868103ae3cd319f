"""How many bytes a trainer GPU and an engine GPU must hold: arithmetic and its errors."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from nanoslime.config import RunConfig, TrainingConfig
from nanoslime.engine_kind import engine_kind, takes_slots
from nanoslime.models.freezing import frozen_names
from nanoslime.models.parallel_sizes import ParallelDims, PipelineSizes
from nanoslime.models.rules import tensors
from nanoslime.models.shape import ModelShape
from nanoslime.types import RunError

_MIB = 1 << 20
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the fullest GPU of a kind."""

    # A trainer's weights, gradients and optimizer state; reference weights wait on the CPU.
    states: int
    # An estimate for the largest micro-batch.
    activations: int
    engine_weights: int
    kv_bytes_per_token: int

    @property
    def trainer(self) -> int:
        return self.states + self.activations


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How Megatron's ranks divide weights, gradients and optimizer state among themselves."""

    tp_size: int = 1
    pipeline: PipelineSizes = PipelineSizes()
    # Ranks with the same weights outside of the experts: data times context parallelism.
    dp_size: int = 1
    # Ranks of a pipeline stage that share its experts: ep_size times etp_size.
    expert_ways: int = 1
    distributed_optimizer: bool = True
    optimizer_offload: bool = False
    # The share of the parameters that is trained; the rest is frozen and has weights only.
    trained: float = 1.0


def estimate_memory(config: RunConfig, shape: ModelShape, parallel: ParallelDims) -> Memory:
    """Bytes that the fullest trainer GPU and an engine GPU must hold."""
    engine_tp = config.rollout.engine_tp_size
    width = _bytes_per_number(config)
    return Memory(
        states=_state_bytes(config, shape, parallel),
        activations=_activation_bytes(config, shape, parallel),
        engine_weights=width * shape.num_parameters // engine_tp,
        kv_bytes_per_token=width * shape.num_layers * _cached_numbers(shape, engine_tp),
    )


def check_memory(config: RunConfig, shape: ModelShape, parallel: ParallelDims) -> None:
    """Raises RunError for what cannot fit on a GPU whatever the batch is.

    The plan shows the rest, which is an estimate.
    """
    if config.cluster.device == "cpu":
        return
    need = estimate_memory(config, shape, parallel)
    gpu_gib = config.cluster.gpu_memory_gib
    gpu_bytes = gpu_gib * _GIB
    if not config.rollout.rollout_only and need.states > gpu_bytes:
        raise RunError(
            f"weights, gradients and optimizer state take {need.states / _GIB:.0f} GiB of each "
            f"trainer GPU, which has cluster.gpu_memory_gib={gpu_gib:g}; raise the number "
            "of trainer GPUs, or with --backend megatron training.tp_size or training.pp_size"
        )
    while_sent = need.states + need.engine_weights
    if config.cluster.colocate and while_sent > gpu_bytes:
        raise RunError(
            f"cluster.colocate: a GPU holds {while_sent / _GIB:.0f} GiB, the trainer's states and "
            "the engine's weights, while weights are sent; it has "
            f"cluster.gpu_memory_gib={gpu_gib:g}; raise rollout.engine_tp_size or the nodes"
        )
    if takes_slots(config.rollout):
        _check_engine_memory(config, need)


def memory_lines(config: RunConfig, shape: ModelShape, parallel: ParallelDims) -> list[str]:
    """What a trainer GPU and an engine GPU hold, one line each, as the plan shows it."""
    need = estimate_memory(config, shape, parallel)
    lines = []
    if not config.rollout.rollout_only:
        lines.append(_trainer_line(config, need))
    if takes_slots(config.rollout):
        lines.append(_engine_line(config, need))
    return lines


def _trainer_line(config: RunConfig, need: Memory) -> str:
    states = size_text(need.states)
    activations = size_text(need.activations)
    line = f"trainer: {states} states, about {activations} activations"
    if config.cluster.device == "cpu":
        return line
    gpu_gib = config.cluster.gpu_memory_gib
    line += f", of {gpu_gib:g} GiB"
    if need.trainer > gpu_gib * _GIB:
        line += "; MAY NOT FIT: lower training.max_tokens_per_microbatch"
        line += ", or set training.recompute"
    return line


def size_text(num_bytes: int) -> str:
    if num_bytes < _GIB // 10:
        return f"{num_bytes / _MIB:.1f} MiB"
    return f"{num_bytes / _GIB:.1f} GiB"


def rank_parameters(shape: ModelShape, sharding: Sharding) -> tuple[int, int]:
    """Parameters of the fullest rank: outside of its experts, and in them."""
    moe_layers = set(shape.moe_layers)
    experts_of_layer = shape.num_expert_parameters // (len(moe_layers) or 1)
    all_dense = shape.num_layers * shape.num_layer_parameters - shape.num_expert_parameters
    dense_of_layer = all_dense // shape.num_layers
    pp_size = sharding.pipeline.pp_size
    stages = sharding.pipeline.stages(shape.num_layers)
    found = []
    for rank in range(pp_size):
        layers = [layer for stage in stages[rank::pp_size] for layer in stage]
        embeddings = int(rank == 0)
        if rank == pp_size - 1 and not (pp_size == 1 and shape.tie_word_embeddings):
            embeddings += 1
        dense = len(layers) * dense_of_layer + embeddings * shape.num_embedding_parameters
        experts = len(moe_layers.intersection(layers)) * experts_of_layer
        found.append((ceil(dense / sharding.tp_size), ceil(experts / sharding.expert_ways)))
    return max(found, key=sum)


def training_bytes(shape: ModelShape, sharding: Sharding) -> int:
    """Bytes of weights, gradients and optimizer state on the fullest rank, without
    activations.

    A parameter has 2 bytes of weight and, where it is trained, 4 of gradient (float32)
    and 12 of main parameter and two moments (float32). The distributed optimizer
    spreads these 12 over data parallelism, for experts over the ranks of a stage that
    have the same ones; with `optimizer_offload` they are elsewhere.
    """
    dense, experts = rank_parameters(shape, sharding)
    optimizer = 0 if sharding.optimizer_offload else 12
    dense_copies = 1.0
    expert_copies = 1.0
    if sharding.distributed_optimizer:
        dense_copies = sharding.dp_size
        expert_copies = sharding.tp_size * sharding.dp_size / sharding.expert_ways
    of_dense = 2 + sharding.trained * (4 + optimizer / dense_copies)
    of_experts = 2 + sharding.trained * (4 + optimizer / expert_copies)
    return int(dense * of_dense + experts * of_experts)


def _state_bytes(config: RunConfig, shape: ModelShape, parallel: ParallelDims) -> int:
    training = config.training
    trained = _trained_share(training.freeze, shape)
    if training.backend == "megatron":
        sharding = Sharding(
            tp_size=parallel.tp,
            pipeline=PipelineSizes.of(training),
            dp_size=parallel.dp * parallel.cp,
            expert_ways=parallel.ep * training.etp_size,
            distributed_optimizer=training.distributed_optimizer,
            optimizer_offload=training.optimizer_offload,
            trained=trained,
        )
        return training_bytes(shape, sharding)
    # FSDP shards everything over data parallelism; the largest block is gathered, and
    # the next one.
    largest_block = max(shape.num_layer_parameters, shape.num_embedding_parameters)
    gathered = 2 * _bytes_per_number(config) * largest_block
    if training.optimizer_offload:
        return gathered
    unsharded = training_bytes(shape, Sharding(distributed_optimizer=False, trained=trained))
    return unsharded // parallel.dp + gathered


def _trained_share(freeze: Sequence[str], shape: ModelShape) -> float:
    """The share of the parameters that `freeze` leaves to be trained."""
    if not freeze:
        return 1.0
    sizes = {name: prod(full_shape) for name, full_shape in tensors(shape).items()}
    frozen = sum(sizes[name] for name in frozen_names(freeze, sizes))
    return 1 - frozen / sum(sizes.values())


def _activation_bytes(config: RunConfig, shape: ModelShape, parallel: ParallelDims) -> int:
    """Bytes that the backward passes of a rank's micro-batches keep.

    A layer keeps what arXiv 2205.05198 section 4 counts, for gated MLPs and an
    attention that keeps no scores. With context parallelism each rank has its share of
    a micro-batch. Logits exist for a block of some megabytes only (training/logprobs.py).
    """
    training = config.training
    width = _bytes_per_number(config)
    layer = width * _layer_numbers(training, shape, parallel.tp)
    if training.backend == "fsdp" and width < 4:
        layer += 4 * _normalized_numbers(shape)
    kept_layers = _kept_layers(PipelineSizes.of(training), shape)
    if training.recompute:
        per_token = kept_layers * shape.hidden_size * width + layer
    else:
        per_token = kept_layers * layer
    return training.max_tokens_per_microbatch * per_token


def _kept_layers(pipeline: PipelineSizes, shape: ModelShape) -> int:
    """Layers of a rank times their micro-batches in flight, on the rank with most.

    Rank r of the pipeline holds pp_size - r micro-batches. Interleaved, it has run 2
    (pp_size - r - 1) + (vpp_size - 1) pp_size + 1 of its chunks before the first
    backward (arXiv 2104.04473, section 2.2).
    """
    kept = []
    for rank, layers in enumerate(pipeline.layers_of_ranks(shape.num_layers)):
        later_ranks = pipeline.pp_size - rank - 1
        if pipeline.vpp_size == 1:
            kept.append(layers * (later_ranks + 1))
            continue
        chunks = 2 * later_ranks + (pipeline.vpp_size - 1) * pipeline.pp_size + 1
        kept.append(layers * chunks // pipeline.vpp_size)
    return max(kept)


def _layer_numbers(training: TrainingConfig, shape: ModelShape, tp_size: int) -> int:
    """Numbers that the backward pass of one layer keeps for one token, on one
    tensor-parallel rank."""
    # Inputs and outputs of the two norms.
    norms = 4 * shape.hidden_size
    if training.sequence_parallel:
        norms //= tp_size
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    attention = 2 * queries + 2 * keys
    mlp = 3 * shape.intermediate_size
    moe = shape.moe
    if moe:
        # A token goes to several experts.
        of_expert = 2 * shape.hidden_size + 3 * moe.intermediate_size
        routed = moe.num_experts_per_token * of_expert
        shared = 3 * moe.shared_intermediate_size
        mlp = max(mlp, routed + shared)
    return norms + (attention + mlp) // tp_size


def _normalized_numbers(shape: ModelShape) -> int:
    """Numbers of one token that go through a norm in one layer.

    The norms of transformers keep them once more in float32. Measured on an H200, that is most
    of what FSDP needs beyond the other terms (tools/BENCHMARKS.md).
    """
    numbers = 2 * shape.hidden_size
    if shape.qk_norm:
        numbers += (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim
    return numbers


def _bytes_per_number(config: RunConfig) -> int:
    return 2 if config.model.dtype == "bfloat16" else 4


def _check_engine_memory(config: RunConfig, need: Memory) -> None:
    gpu_gib = config.cluster.gpu_memory_gib
    engine = engine_kind(config.rollout)
    if need.engine_weights > gpu_gib * _GIB * engine.memory_fraction(config):
        raise RunError(
            f"rollout.engine_tp_size={config.rollout.engine_tp_size}: the weights take "
            f"{need.engine_weights / _GIB:.0f} GiB of each engine GPU, more than {engine.title}'s "
            f"share of cluster.gpu_memory_gib={gpu_gib:g}; raise it"
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    room = _cached_tokens(config, need)
    if longest > room:
        raise RunError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} and rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens} make a sequence of {longest} tokens, and an engine "
            f"caches about {room}; lower them, or raise rollout.engine_tp_size"
        )


def _engine_line(config: RunConfig, need: Memory) -> str:
    line = f"engine: {size_text(need.engine_weights)} weights"
    if config.cluster.device == "cpu":
        return line
    return f"{line}, room for about {_cached_tokens(config, need):,} tokens of KV cache"


def _cached_tokens(config: RunConfig, need: Memory) -> int:
    """Tokens whose keys and values fit an engine."""
    fraction = engine_kind(config.rollout).memory_fraction(config)
    share = config.cluster.gpu_memory_gib * _GIB * fraction
    return int((share - need.engine_weights) / need.kv_bytes_per_token)


def _cached_numbers(shape: ModelShape, engine_tp: int) -> int:
    """Numbers that one engine GPU caches for one token of one layer."""
    if shape.mla:
        # One latent serves all heads, and every rank holds it.
        return shape.mla.kv_lora_rank + shape.mla.qk_rope_head_dim
    heads = ceil(shape.num_key_value_heads / engine_tp)
    keys_and_values = 2
    return keys_and_values * heads * shape.head_dim
