"""Which rank does what: Megatron's process groups, in its default order tp, cp, dp, pp (tp varies fastest).

Experts have a grid of their own over the same ranks of a pipeline stage: etp, ep, edp.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from nanoslime.config import TrainingConfig
from nanoslime.models.rules import Part, check_experts, check_tp_size
from nanoslime.models.shape import ModelShape
from nanoslime.training.backend import RankEnv, init_process_group


@dataclass(frozen=True, slots=True)
class Ranks:
    """This rank's place in the grids [pp, dp, cp, tp] and [pp, edp, ep, etp], and its groups."""

    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    pp_rank: int
    pp_size: int
    vpp_size: int  # pieces of the model on this rank
    ep_rank: int
    ep_size: int
    etp_rank: int
    etp_size: int
    last_stage: int  # global rank of the last stage of this rank's pipeline
    tp_group: ProcessGroup
    cp_group: ProcessGroup
    dp_group: ProcessGroup  # ranks with other sequences
    dp_cp_group: ProcessGroup  # those, and the ranks with other parts of the same sequences
    pp_group: ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def parts(self, shape: ModelShape) -> list[Part]:
        """What lies here, by virtual stage: piece v of rank p is stage v * pp_size + p of the pipeline."""
        stages, experts = (
            self.vpp_size * self.pp_size,
            shape.moe.num_experts // self.ep_size if shape.moe else 0,
        )
        each, of_expert = shape.num_layers // stages, (self.etp_rank, self.etp_size)
        return [
            Part(
                self.tp_rank, self.tp_size, range(stage * each, (stage + 1) * each),
                first=stage == 0, last=stage == stages - 1,
                experts=range(self.ep_rank * experts, (self.ep_rank + 1) * experts), expert_tp=of_expert,
            )
            for stage in range(self.pp_rank, stages, self.pp_size)
        ]  # fmt: skip


def check(config: TrainingConfig, shape: ModelShape, world_size: int) -> None:
    """Raises ValueError for a layout that this model, this number of ranks or this backend does not have."""
    check_tp_size(shape, config.tp_size, 1)
    stages, sizes = config.pp_size, f"training.pp_size={config.pp_size}"
    if config.vpp_size > 1:
        stages, sizes = stages * config.vpp_size, f"{sizes} x training.vpp_size={config.vpp_size}"
    if shape.num_layers % stages:
        fit = [n for n in range(1, shape.num_layers + 1) if shape.num_layers % n == 0]
        problem = f"{sizes} does not divide num_hidden_layers={shape.num_layers}"
        raise ValueError(f"{problem}; choose one of {fit}")
    if world_size % (config.tp_size * config.cp_size * config.pp_size):
        sizes = " x ".join(f"training.{n}={getattr(config, n)}" for n in ("tp_size", "cp_size", "pp_size"))
        raise ValueError(f"{world_size} trainer ranks are not a multiple of {sizes}")
    check_experts(shape, config, world_size // config.pp_size)


def initialize(config: TrainingConfig, env: RankEnv, seed: int) -> Ranks:
    """Joins the default process group, where that has not been done, and makes Megatron's groups.

    Every collective has training.collective_deadline_s.
    """
    init_process_group(env, config)
    parallel_state.destroy_model_parallel()  # of an earlier backend in this process
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tp_size,
        pipeline_model_parallel_size=config.pp_size,
        virtual_pipeline_model_parallel_size=config.vpp_size if config.vpp_size > 1 else None,
        context_parallel_size=config.cp_size,
        expert_model_parallel_size=config.ep_size,
        expert_tensor_parallel_size=config.etp_size,
        distributed_timeout_minutes=config.collective_deadline_s / 60,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Ranks(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=config.tp_size,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=config.cp_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=config.pp_size,
        vpp_size=config.vpp_size,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=config.ep_size,
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_size=config.etp_size,
        last_stage=parallel_state.get_pipeline_model_parallel_last_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
    )


def from_last_stage(value: Any, ranks: Ranks) -> Any:
    """`value` of the last pipeline stage, on every stage; what other stages pass in is ignored."""
    if ranks.pp_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=ranks.last_stage, group=ranks.pp_group)
    return box[0]
