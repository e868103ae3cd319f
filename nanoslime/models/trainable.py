"""Whether a backend can train a model with the sizes and settings of a configuration."""

from nanoslime.config.training import PARALLEL_SIZES, TrainingConfig
from nanoslime.models.freezing import frozen_names
from nanoslime.models.parallel_sizes import (
    check_experts,
    check_pipeline,
    check_tp_size,
    divisors,
    one_of,
    tp_sizes,
)
from nanoslime.models.rules import tensors
from nanoslime.models.shape import ModelShape
from nanoslime.types import RunError


def check_parallel(training: TrainingConfig, shape: ModelShape, ranks: int, slots: int) -> None:
    """Raises RunError where these trainers cannot train this model.

    That is: the backend lacks something of the model, the sizes do not fit the model or
    the `ranks` on nodes of `slots` each, or frozen_names refuses what is to be frozen.
    """
    _check_backend(training, shape)
    if training.freeze:
        # This names all tensors: half a second for a model with many experts.
        frozen_names(training.freeze, tensors(shape))
    check_tp_size(shape, training.tp_size, slots)
    check_pipeline(shape, training)
    if ranks % training.cp_size:
        raise RunError(
            f"training.cp_size={training.cp_size} does not divide the {ranks} trainer ranks; "
            f"choose {one_of(divisors(ranks))}"
        )
    model_ranks = training.tp_size * training.cp_size * training.pp_size
    if ranks % model_ranks:
        pairs = _fitting_pairs(shape, training, slots, ranks // training.cp_size)
        raise RunError(
            f"training.tp_size={training.tp_size} x training.cp_size={training.cp_size} x "
            f"training.pp_size={training.pp_size} = {model_ranks} does not divide the {ranks} "
            f"trainer ranks; choose TP x PP {one_of(pairs)}, or change cluster.nodes"
        )
    check_experts(shape, training, ranks // training.pp_size)


def _check_backend(training: TrainingConfig, shape: ModelShape) -> None:
    """Raises RunError for a model, or a setting with it, that the backend cannot train."""
    if training.backend == "megatron" and shape.megatron_lacks:
        raise RunError(
            f"training.backend=megatron cannot train this {shape.model_type}: "
            f"{', '.join(shape.megatron_lacks)}"
        )
    if training.backend == "fsdp" and shape.moe:
        raise RunError(
            f"training.backend=fsdp cannot train this {shape.model_type}, which has experts; "
            "use --backend megatron"
        )
    if training.routing_replay != "none" and not shape.moe_layers:
        raise RunError(
            f"training.routing_replay={training.routing_replay}: {shape.model_type} has no "
            "experts; set none"
        )
    if training.backend == "fsdp":
        check_data_parallel_only(training)


def check_data_parallel_only(training: TrainingConfig) -> None:
    """Raises RunError for a parallel size above 1, which FSDP does not have."""
    for name in PARALLEL_SIZES:
        size = getattr(training, name)
        if size != 1:
            raise RunError(f"training.{name}={size} needs --backend megatron; with fsdp set 1")


def _fitting_pairs(
    shape: ModelShape, training: TrainingConfig, slots: int, ranks: int
) -> list[str]:
    """The sizes "TP x PP" that divide the ranks."""
    pairs = []
    for tp in tp_sizes(shape, slots):
        for pp in divisors(ranks):
            if ranks % (tp * pp) == 0 and pp * training.vpp_size <= shape.num_layers:
                pairs.append(f"{tp} x {pp}")
    return pairs


def check_kernels(training: TrainingConfig, shape: ModelShape, *, transformer_engine: bool) -> None:
    """Raises RunError for what is slow on GPUs without Transformer Engine, unless allowed."""
    if transformer_engine or training.allow_slow or training.backend != "megatron":
        return
    if training.cp_size > 1:
        raise RunError(
            f"training.cp_size={training.cp_size}: without Transformer Engine each rank gathers "
            "the keys and values of all in every layer; install transformer_engine in the "
            "environment of the job, or allow this by --allow-slow"
        )
    if shape.moe:
        raise RunError(
            f"{shape.model_type}: without Transformer Engine experts are multiplied one after the "
            "other; install transformer_engine in the environment of the job, or allow this by "
            "--allow-slow"
        )
