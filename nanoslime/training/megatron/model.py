"""A GPTModel of the checkpoint's shape, wrapped for data parallelism."""

from __future__ import annotations

from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel as DDP
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nanoslime.config import RunConfig
from nanoslime.models.rules import padded_vocab_size
from nanoslime.models.shape import ModelShape
from nanoslime.training.megatron.cpu_compat import cuda_names
from nanoslime.training.megatron.local_layers import local_block_spec
from nanoslime.training.megatron.parallel import Ranks


def transformer_config(shape: ModelShape, config: RunConfig, device: torch.device) -> TransformerConfig:
    """megatron-core's configuration of this model; `training.megatron` overrides single fields of it.

    Raises ValueError for a field that megatron-core does not have.
    """
    training, dtype = config.training, getattr(torch, config.model.dtype)
    on_cpu = device.type == "cpu"
    values: dict[str, Any] = dict(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=training.tp_size,
        pipeline_model_parallel_size=training.pp_size,
        sequence_parallel=training.sequence_parallel and training.tp_size > 1,
        use_cpu_initialization=on_cpu,
        perform_initialization=True,  # it also marks what TP splits; without, the norm counts rank 0 only
        variable_seq_lengths=True,  # packed micro-batches differ in length
        moe_token_dispatcher_type="alltoall",  # the default refuses variable_seq_lengths, MoE or not
        calculate_per_token_loss=True,  # gradients are summed over data parallelism, not averaged
        deallocate_pipeline_outputs=not on_cpu,  # gloo may still read what NCCL has already taken
        batch_p2p_sync=False,
    )
    if training.recompute:
        values |= dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    unknown = training.megatron.keys() - {field.name for field in fields(TransformerConfig)}
    if unknown:
        raise ValueError(
            f"training.megatron: megatron-core's TransformerConfig has no field {sorted(unknown)}"
        )
    return TransformerConfig(**{**values, **training.megatron})


def build(shape: ModelShape, config: RunConfig, ranks: Ranks, device: torch.device) -> DDP:
    """This rank's part of the model with uninitialized weights, in gradient buffers of float32."""
    settings = transformer_config(shape, config, device)
    if device.type == "cuda" and find_spec("transformer_engine") is not None:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=shape.qk_norm)
    else:
        spec = local_block_spec(settings)
    with cuda_names():
        model = GPTModel(
            config=settings,
            transformer_layer_spec=spec,
            vocab_size=padded_vocab_size(shape, ranks.tp_size),
            max_sequence_length=shape.max_position_embeddings,
            pre_process=ranks.is_first_stage,
            post_process=ranks.is_last_stage,
            share_embeddings_and_output_weights=shape.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
            rope_scaling=shape.rope_scaling_factor is not None,
            rope_scaling_factor=shape.rope_scaling_factor or 1.0,
        ).to(device)
    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=config.training.distributed_optimizer
    )
    settings.finalize_model_grads_func = _finalize_grads
    return DDP(settings, buffers, Float16Module(settings, model) if settings.bf16 else model)


def unwrap(model: torch.nn.Module) -> GPTModel:
    while not isinstance(model, GPTModel):
        model = model.module
    return model


def _finalize_grads(model: list[torch.nn.Module], num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Sums gradients over ranks, no more: the loss was already divided by the global denominator."""
    finalize_model_grads(model, None, **kwargs)
