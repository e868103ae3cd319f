"""Bytes of weights, gradients and optimizer state on a rank, and of a checkpoint of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

from nanoslime.config import RunConfig
from nanoslime.models.freezing import frozen_names
from nanoslime.models.parallel_sizes import ParallelDims, PipelineSizes
from nanoslime.models.rules import FLOAT32, Rule, padded_vocab_size, tensors
from nanoslime.models.shape import ModelShape

# Bytes of a number, by the names that torch and megatron-core's options have for types.
_WIDTHS = {"bfloat16": 2, "float16": 2, "uint8": 1}
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    # FSDP: weights that are whole for a moment, and their gradients.
    gathered: int = 0
    # What training.optimizer_offload keeps on the host: the optimizer's, with FSDP all.
    offloaded: int = 0
    # The rank's weights, wherever they are.
    own_weights: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered


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

    @classmethod
    def of(cls, config: RunConfig, parallel: ParallelDims) -> "Sharding":
        training = config.training
        return cls(
            tp_size=parallel.tp,
            pipeline=PipelineSizes.of(training),
            dp_size=parallel.dp * parallel.cp,
            expert_ways=parallel.ep * training.etp_size,
            distributed_optimizer=training.distributed_optimizer,
        )


def width_of(config: RunConfig) -> int:
    """Bytes of a number in model.dtype."""
    return 2 if config.model.dtype == "bfloat16" else _FLOAT32_BYTES


def states_of_ranks(config: RunConfig, shape: ModelShape, parallel: ParallelDims) -> list[States]:
    """[pp_size]: the states of a rank of each pipeline stage; with FSDP, of rank 0, which has
    most."""
    trained = _trained_share(config.training.freeze, shape)
    if config.training.backend == "fsdp":
        return [_fsdp_states(config, shape, parallel.dp, trained)]
    sharding = Sharding.of(config, parallel)
    found = []
    for rank in range(parallel.pp):
        parameters = rank_parameters(shape, sharding, rank)
        found.append(_megatron_states(config, sharding, parameters, trained))
    return found


def rank_parameters(shape: ModelShape, sharding: Sharding, rank: int) -> tuple[int, int]:
    """Parameters of a rank of the pipeline: outside of its experts, and in them.

    The padding of the vocabulary counts, and so does the copy of a tied embedding on the
    last stage. The bias of experts' scores is no parameter.
    """
    stages = sharding.pipeline.stages(shape.num_layers)
    layers = {layer for stage in stages[rank :: sharding.pipeline.pp_size] for layer in stage}
    dense = 0
    experts = 0
    for rule in shape.architecture.rules(shape):
        if rule.hf_tensors[0].name.endswith(FLOAT32):
            continue
        number = _elements(rule, shape, sharding.tp_size) * _instances(
            rule, shape, layers, rank, sharding.pipeline.pp_size
        )
        if rule.num_experts:
            experts += ceil(number * rule.num_experts / sharding.expert_ways)
        elif rule.tp_dim is None:
            dense += number
        else:
            dense += ceil(number / sharding.tp_size)
    return dense, experts


def _elements(rule: Rule, shape: ModelShape, tp_size: int) -> int:
    """Elements of a rule in one layer and expert, over all tensor-parallel ranks."""
    if rule.layout == "vocab":
        return padded_vocab_size(shape, tp_size) * shape.hidden_size
    return sum(prod(tensor.shape) for tensor in rule.hf_tensors)


def _instances(rule: Rule, shape: ModelShape, layers: set[int], rank: int, pp_size: int) -> int:
    """How many layers of a rank have the rule's tensors; 0 or 1 outside of layers."""
    if rule.layers is not None:
        return len(layers.intersection(rule.layers))
    if rule.is_embedding:
        return int(rank == 0)
    if rule.is_output_layer and shape.tie_word_embeddings and pp_size == 1:
        return 0
    return int(rank == pp_size - 1)


def _megatron_states(
    config: RunConfig, sharding: Sharding, parameters: tuple[int, int], trained: float
) -> States:
    """A parameter has its weight in model.dtype and, where it is trained, a gradient and two
    moments in float32; in half precision also a main parameter in float32.

    The distributed optimizer spreads moments and main parameters over data parallelism, for
    experts over the ranks of a stage that have the same ones. `training.megatron_ddp` and
    `training.megatron_optimizer` may set other types.
    """
    training = config.training
    dense, experts = parameters
    width = width_of(config)
    gradient = _FLOAT32_BYTES
    if training.megatron_ddp.get("grad_reduce_in_fp32") is False:
        gradient = width
    options = training.megatron_optimizer
    names = ["exp_avg_dtype", "exp_avg_sq_dtype"]
    if width < _FLOAT32_BYTES:
        names.append("main_params_dtype")
    optimizer = sum(_WIDTHS.get(str(options.get(name)), _FLOAT32_BYTES) for name in names)
    own = float(dense + experts)
    if sharding.distributed_optimizer:
        expert_copies = sharding.tp_size * sharding.dp_size / sharding.expert_ways
        own = dense / sharding.dp_size + experts / expert_copies
    state = int(optimizer * own * trained)
    offloads = training.optimizer_offload
    return States(
        own_weights=width * (dense + experts),
        weights=width * (dense + experts),
        gradients=int(gradient * (dense + experts) * trained),
        optimizer=0 if offloads else state,
        offloaded=state if offloads else 0,
    )


def _fsdp_states(config: RunConfig, shape: ModelShape, dp_size: int, trained: float) -> States:
    """Each rank has rows of every tensor: a weight, a gradient and two moments, float32.

    Whole for a moment, in model.dtype, are the root's weights (embedding and output layer) and
    those of a layer and the next one, and the gradients of the root and of a layer.
    """
    rows = 0
    for full_shape in tensors(shape).values():
        rows += ceil(full_shape[0] / dp_size) * prod(full_shape[1:])
    root = shape.num_embedding_parameters * (1 if shape.tie_word_embeddings else 2)
    gathered = width_of(config) * (2 * root + 3 * shape.num_layer_parameters)
    weights = _FLOAT32_BYTES * rows
    if config.training.optimizer_offload:
        return States(
            own_weights=weights,
            weights=0,
            gradients=0,
            optimizer=0,
            gathered=gathered,
            offloaded=int(weights * (1 + 3 * trained)),
        )
    return States(
        own_weights=weights,
        weights=weights,
        gradients=int(weights * trained),
        optimizer=int(2 * weights * trained),
        gathered=gathered,
    )


def _trained_share(freeze: Sequence[str], shape: ModelShape) -> float:
    """The share of the parameters that `freeze` leaves to be trained."""
    if not freeze:
        return 1.0
    sizes = {name: prod(full_shape) for name, full_shape in tensors(shape).items()}
    frozen = sum(sizes[name] for name in frozen_names(freeze, sizes))
    return 1 - frozen / sum(sizes.values())


def checkpoint_bytes(config: RunConfig, shape: ModelShape) -> int:
    """Bytes of a training checkpoint.

    FSDP writes float32 weights and two moments. Megatron writes weights, main parameters and
    two moments; in float32 the weights are their own main parameters, which only the
    distributed optimizer writes once more. 0.25 GB of float32 weights were 0.97 GB
    (tools/BENCHMARKS.md).
    """
    trained = _trained_share(config.training.freeze, shape)
    if config.training.backend == "fsdp":
        weight, state = _FLOAT32_BYTES, 8
    else:
        weight = width_of(config)
        has_main = weight < _FLOAT32_BYTES or config.training.distributed_optimizer
        state = 12 if has_main else 8
    return int(shape.num_parameters * (weight + state * trained))
