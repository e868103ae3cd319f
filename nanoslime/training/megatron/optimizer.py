"""Adam on Megatron's gradient buffers: one update, which is skipped where the gradient is not finite."""

from __future__ import annotations

import math

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)

from nanoslime.config import RunConfig
from nanoslime.training.megatron.cpu_compat import cuda_names


def build(model: DistributedDataParallel, config: RunConfig) -> ChainedOptimizer:
    """AdamW over `model`, whose weights must be loaded: it copies them to float32 main parameters."""
    training, dtype = config.training, getattr(torch, config.model.dtype)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        weight_decay=training.weight_decay,
        clip_grad=0.0,  # clipped by `update`, which looks at the norm first
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=training.distributed_optimizer,
    )
    with cuda_names():
        return get_megatron_optimizer(settings, [model], get_standard_config_overrides(settings))


def set_rates(optimizer: ChainedOptimizer, lr: float, weight_decay: float) -> None:
    """Megatron keeps the decay of 1-D parameters (norms, biases) off by a multiplier that only its scheduler
    applies.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]


@torch.no_grad()
def update(optimizer: ChainedOptimizer, clip_grad: float) -> tuple[float, bool]:
    """(norm of the whole gradient before clipping, whether the update was skipped because it is not finite).

    Both are the same on every rank. clip_grad=0: no clipping. Afterwards the parameters of all ranks are
    current.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm, True
    scale = clip_grad / (norm + 1e-6)
    if 0 < scale < 1:
        for inner in optimizer.chained_optimizers:
            for parameter in inner.get_parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
    optimizer.step_with_ready_grads()
    return norm, False
