"""AdamW on Megatron's gradient buffers."""

from importlib.util import find_spec
from typing import Any

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


def build(model_chunks: list[DDP], config: RunConfig) -> ChainedOptimizer:
    """AdamW over the model chunks, whose weights must be loaded: it copies them to float32."""
    device = next(model_chunks[0].parameters()).device
    if config.training.optimizer_offload:
        _check_offload(config, device)
    settings = optimizer_config(config)
    with cuda_names():
        overrides = get_standard_config_overrides(settings)
        return get_megatron_optimizer(settings, model_chunks, overrides)


def optimizer_config(config: RunConfig) -> OptimizerConfig:
    training = config.training
    dtype = getattr(torch, config.model.dtype)
    # With a precision-aware optimizer the main parameters leave the GPU too.
    # megatron-core's class itself looks for Transformer Engine.
    precision_aware = training.optimizer_offload and find_spec("transformer_engine") is not None
    values: dict[str, Any] = dict(
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
        use_precision_aware_optimizer=precision_aware,
    )
    for name, value in training.megatron_optimizer.items():
        values[name] = _dtype(name, value) if name.endswith("_dtype") else value
    return OptimizerConfig(**values)


def _dtype(name: str, value: Any) -> torch.dtype:
    dtype = getattr(torch, str(value), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"training.megatron_optimizer.{name}={value!r} is no type of torch; "
            "choose float32, bfloat16 or float16"
        )
    return dtype


def set_rates(optimizer: ChainedOptimizer, lr: float, weight_decay: float) -> None:
    """Sets the rates by the groups' multipliers, as Megatron's own scheduler would.

    By them, vectors do not decay.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]


def tensors(optimizer: ChainedOptimizer) -> list[Tensor]:
    """This rank's main parameters and their moments."""
    parameters = []
    moments = []
    for chained in optimizer.chained_optimizers:
        inner = chained.optimizer
        if inner is None:
            continue
        for group in inner.param_groups:
            parameters += [parameter.detach() for parameter in group["params"]]
        for state in inner.state.values():
            moments += [value for value in state.values() if isinstance(value, Tensor)]
    return parameters + moments


def _check_offload(config: RunConfig, device: torch.device) -> None:
    if not (has_transformer_engine(device) and config.training.distributed_optimizer):
        # megatron-core 0.19.2 would train without Transformer Engine, but not load what
        # it has saved.
        raise ValueError(
            "training.optimizer_offload=true: Megatron's needs CUDA, Transformer Engine and"
            " training.distributed_optimizer=true; training.backend=fsdp does not"
        )
