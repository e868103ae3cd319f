"""AdamW on Megatron's gradient buffers."""

from importlib.util import find_spec

import torch
from megatron.core.distributed import DistributedDataParallel as DDP
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from torch import Tensor

from nanoslime.config import RunConfig
from nanoslime.training.megatron.cpu_compat import cuda_names
from nanoslime.training.megatron.model import has_transformer_engine


def build(pieces: list[DDP], config: RunConfig) -> ChainedOptimizer:
    """AdamW over the model's `pieces`, whose weights must be loaded: it copies them to float32."""
    possible = has_transformer_engine(next(pieces[0].parameters()).device)
    if config.training.optimizer_offload and not (
        possible and config.training.distributed_optimizer
    ):
        # megatron-core 0.16.1 would train without Transformer Engine, but not load what it has saved
        needs = "Megatron's needs CUDA, Transformer Engine, distributed_optimizer=true; backend=fsdp does not"
        raise ValueError(f"training.optimizer_offload=true: {needs}")
    settings = optimizer_config(config)
    with cuda_names():
        return get_megatron_optimizer(settings, pieces, get_standard_config_overrides(settings))


def optimizer_config(config: RunConfig) -> OptimizerConfig:
    training, dtype = config.training, getattr(torch, config.model.dtype)
    return OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=0.0,  # TrainBackend.train_step clips, and looks at the norm first
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=training.distributed_optimizer,
        optimizer_cpu_offload=training.optimizer_offload,
        optimizer_offload_fraction=1.0,
        # then the main parameters leave the GPU too; the class itself looks for that package
        use_precision_aware_optimizer=training.optimizer_offload
        and bool(find_spec("transformer_engine")),
    )


def set_rates(optimizer: ChainedOptimizer, lr: float, weight_decay: float) -> None:
    """By the groups' multipliers, which Megatron's own scheduler would apply: vectors do not decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]


def tensors(optimizer: ChainedOptimizer) -> list[Tensor]:
    """This rank's main parameters and their moments."""
    inner = [each.optimizer for each in optimizer.chained_optimizers if each.optimizer is not None]
    states = [state for each in inner for state in each.state.values()]
    parameters = [
        p.detach() for each in inner for group in each.param_groups for p in group["params"]
    ]
    return parameters + [v for state in states for v in state.values() if isinstance(v, Tensor)]
