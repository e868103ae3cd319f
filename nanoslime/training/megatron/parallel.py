"""Which rank does what: Megatron's process groups.

They are in Megatron's default order tp, cp, dp, pp, in which tp varies fastest.
Experts have a grid of their own over the same ranks of a pipeline stage: etp, ep, edp.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as state
from megatron.core import tensor_parallel
from torch.distributed import ProcessGroup

from nanoslime.config.training import PARALLEL_SIZES, TrainingConfig
from nanoslime.models.parallel_sizes import PipelineSizes
from nanoslime.models.rules import ModelPartition
from nanoslime.models.shape import ModelShape
from nanoslime.training.backend import RankEnv, init_process_group


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's place in the model: ranks of the same place hold the same weights."""

    tp_rank: int
    pp_rank: int
    ep_rank: int
    etp_rank: int


@dataclass(frozen=True, slots=True)
class Ranks:
    """This rank's place in the grids [pp, dp, cp, tp] and [pp, edp, ep, etp], and groups."""

    place: Place
    tp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    pp_size: int
    vpp_size: int  # model chunks on this rank
    ep_size: int
    etp_size: int
    tp_group: ProcessGroup
    cp_group: ProcessGroup
    dp_group: ProcessGroup  # ranks with other sequences
    pp_group: ProcessGroup

    @property
    def is_last_stage(self) -> bool:
        return self.place.pp_rank == self.pp_size - 1


def place_of(rank: int, world_size: int, config: TrainingConfig) -> Place:
    """The place of any rank; no process group is needed."""
    ranks_of_stage = world_size // config.pp_size
    in_stage = rank % ranks_of_stage
    return Place(
        tp_rank=in_stage % config.tp_size,
        pp_rank=rank // ranks_of_stage,
        ep_rank=in_stage // config.etp_size % config.ep_size,
        etp_rank=in_stage % config.etp_size,
    )


def partitions(place: Place, config: TrainingConfig, shape: ModelShape) -> list[ModelPartition]:
    """The part of the model in each model chunk; chunk v of rank p is stage v * pp_size + p."""
    stages = PipelineSizes.of(config).stages(shape.num_layers)
    num_experts = shape.moe.num_experts // config.ep_size if shape.moe else 0
    first_expert = place.ep_rank * num_experts
    found = []
    for stage in range(place.pp_rank, len(stages), config.pp_size):
        partition = ModelPartition(
            place.tp_rank,
            config.tp_size,
            layers=stages[stage],
            first=stage == 0,
            last=stage == len(stages) - 1,
            experts=range(first_expert, first_expert + num_experts),
            expert_tp=(place.etp_rank, config.etp_size),
        )
        found.append(partition)
    return found


def megatron_sizes(config: TrainingConfig) -> dict[str, int | None]:
    """The parallel sizes by megatron-core's names."""
    return dict(
        tensor_model_parallel_size=config.tp_size,
        pipeline_model_parallel_size=config.pp_size,
        virtual_pipeline_model_parallel_size=config.vpp_size if config.vpp_size > 1 else None,
        context_parallel_size=config.cp_size,
        expert_model_parallel_size=config.ep_size,
        expert_tensor_parallel_size=config.etp_size,
    )


def megatron_stages(shape: ModelShape, config: TrainingConfig) -> list[list[str]] | None:
    """The pipeline stages as megatron-core's pipeline_model_parallel_layout lists them."""
    if config.pp_size == 1:
        return None
    stages = []
    for layers in PipelineSizes.of(config).stages(shape.num_layers):
        stages.append(["decoder"] * len(layers))
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def initialize(config: TrainingConfig, env: RankEnv, seed: int) -> Ranks:
    """Joins the default process group and makes Megatron's groups.

    Nothing happens to a default group that is there already. Every collective has
    training.collective_deadline_s.
    """
    init_process_group(env, config)
    state.destroy_model_parallel()  # of an earlier backend in this process
    minutes = config.collective_deadline_s / 60
    state.initialize_model_parallel(**megatron_sizes(config), distributed_timeout_minutes=minutes)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Ranks(
        **{name: getattr(config, name) for name in PARALLEL_SIZES},
        place=Place(
            tp_rank=state.get_tensor_model_parallel_rank(),
            pp_rank=state.get_pipeline_model_parallel_rank(),
            ep_rank=state.get_expert_model_parallel_rank(),
            etp_rank=state.get_expert_tensor_parallel_rank(),
        ),
        tp_group=state.get_tensor_model_parallel_group(),
        cp_rank=state.get_context_parallel_rank(),
        cp_group=state.get_context_parallel_group(),
        dp_rank=state.get_data_parallel_rank(),
        dp_group=state.get_data_parallel_group(),
        pp_group=state.get_pipeline_model_parallel_group(),
        dp_size=state.get_data_parallel_world_size(),
    )


def from_last_stage(value: Any, ranks: Ranks) -> Any:
    """The `value` of the last pipeline stage, on every stage; others are ignored."""
    if ranks.pp_size == 1:
        return value
    message = [value]
    dist.broadcast_object_list(message, group_src=ranks.pp_size - 1, group=ranks.pp_group)
    return message[0]
