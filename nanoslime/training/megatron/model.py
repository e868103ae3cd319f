"""A GPTModel of the checkpoint's shape, wrapped for data parallelism."""

from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel as DDP
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from nanoslime.config import RunConfig
from nanoslime.models.rules import padded_vocab_size
from nanoslime.models.shape import MLA, ModelShape, MoE
from nanoslime.training.megatron import weights
from nanoslime.training.megatron.cpu_compat import cuda_names
from nanoslime.training.megatron.local_layers import local_block_spec
from nanoslime.training.megatron.parallel import Ranks, megatron_sizes


def model_config(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, **options: Any
) -> TransformerConfig:
    """megatron-core's configuration of this model; `options` are further fields of it, or others' values.

    Raises ValueError for a field that megatron-core does not have, and for a model that it cannot compute.
    """
    if lacks := shape.megatron_lacks:
        raise ValueError(
            f"megatron-core cannot compute this {shape.model_type}: it lacks {'; '.join(lacks)}"
        )
    on_cpu = device.type == "cpu"
    values: dict[str, Any] = dict(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_key_value_heads,
        kv_channels=shape.head_dim,
        qk_layernorm=shape.qk_norm,
        rotary_interleaved=shape.rotary_interleaved,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=on_cpu,
        perform_initialization=True,  # it also marks what TP splits; without, the norm counts rank 0 only
        variable_seq_lengths=True,  # packed micro-batches differ in length
        moe_token_dispatcher_type="alltoall",  # the default refuses variable_seq_lengths, MoE or not
        calculate_per_token_loss=True,  # gradients are summed over data parallelism, not averaged
        deallocate_pipeline_outputs=not on_cpu,  # gloo may still read what NCCL has already taken
        batch_p2p_sync=False,
    )
    if shape.moe:
        values |= _expert_fields(
            shape.moe, shape.num_layers, grouped=has_transformer_engine(device)
        )
    if shape.mla:
        values |= _latent_fields(shape.mla, shape)
    kind = MLATransformerConfig if shape.mla else TransformerConfig
    if unknown := options.keys() - {field.name for field in fields(kind)}:
        raise ValueError(
            f"training.megatron: megatron-core's {kind.__name__} has no field {sorted(unknown)}"
        )
    return kind(**values | options)


def transformer_config(
    shape: ModelShape, config: RunConfig, device: torch.device
) -> TransformerConfig:
    """The configuration for training; `training.megatron` overrides single fields. Raises as model_config."""
    training = config.training
    options: dict[str, Any] = dict(
        sequence_parallel=training.sequence_parallel and training.tp_size > 1
    )
    options |= megatron_sizes(training)
    if training.vpp_size > 1:  # how megatron-core's own training sends between virtual stages
        options |= dict(overlap_p2p_comm=True, batch_p2p_comm=False)
    if training.recompute:
        options |= dict(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        )
    return model_config(
        shape, getattr(torch, config.model.dtype), device, **options | training.megatron
    )


def gpt_model(
    shape: ModelShape,
    settings: TransformerConfig,
    device: torch.device,
    *,
    first: bool,
    last: bool,
    vp_stage: int | None = None,
) -> GPTModel:
    """This rank's part of the model with uninitialized weights; first, last: at that end of the pipeline.

    `vp_stage`: which of this rank's pieces, where it has several.
    """
    if has_transformer_engine(device):
        spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=True, vp_stage=vp_stage)
    else:
        spec = local_block_spec(settings, vp_stage)
    with cuda_names():
        return GPTModel(
            settings,
            spec,
            padded_vocab_size(shape, settings.tensor_model_parallel_size),
            shape.max_position_embeddings,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=shape.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_percent=shape.rotary_fraction,
            rotary_base=shape.rope_theta,
            rope_scaling=shape.rope_scaling_factor is not None,
            rope_scaling_factor=shape.rope_scaling_factor or 1.0,
            vp_stage=vp_stage,
        ).to(device)


def build(shape: ModelShape, config: RunConfig, ranks: Ranks, device: torch.device) -> list[DDP]:
    """This rank's pieces of the model for training, in gradient buffers of float32."""
    settings = transformer_config(shape, config, device)
    settings.finalize_model_grads_func = _finalize_grads
    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=config.training.distributed_optimizer
    )
    pieces: list[DDP] = []
    for number, part in enumerate(ranks.parts(shape)):
        vp_stage = number if ranks.vpp_size > 1 else None
        gpt = gpt_model(
            shape, settings, device, first=part.first, last=part.last, vp_stage=vp_stage
        )
        weights.freeze(gpt, weights.bind(gpt, shape, part), shape, config.training.freeze)
        model: torch.nn.Module = gpt
        if settings.bf16:
            model = Float16Module(settings, gpt)
            for router in (module for module in model.modules() if isinstance(module, TopKRouter)):
                router._maintain_float32_expert_bias()  # else only at the first forward, after loading
        for name, parameter in model.named_parameters():
            if ".mlp.experts." in name:
                # gradients are summed over the ranks with the same experts, which have an optimizer of their
                # own, and each rank's part counts in the norm; megatron-core does so only where ep_size > 1
                parameter.allreduce, parameter.tensor_model_parallel = False, True
        pieces.append(DDP(settings, buffers, model))
    return pieces


def _expert_fields(moe: MoE, num_layers: int, *, grouped: bool) -> dict[str, Any]:
    """Routing as transformers does it; no auxiliary loss, and the bias of the scores stays as it is."""
    pattern = [int(layer in moe.layers) for layer in range(num_layers)]
    sigmoid, in_groups = moe.score == "sigmoid", moe.num_groups > 1
    return dict(
        num_moe_experts=moe.num_experts,
        moe_layer_freq=1 if all(pattern) else pattern,
        moe_ffn_hidden_size=moe.intermediate_size,
        moe_grouped_gemm=grouped,
        moe_shared_expert_intermediate_size=moe.shared_intermediate_size or None,
        moe_shared_expert_gate=moe.shared_gate,
        moe_router_topk=moe.num_experts_per_token,
        moe_router_score_function=moe.score,
        moe_router_dtype="fp32" if sigmoid else None,
        moe_router_pre_softmax=not sigmoid and not moe.normalized,
        moe_router_topk_scaling_factor=moe.scaling_factor,
        moe_router_num_groups=moe.num_groups if in_groups else None,
        moe_router_group_topk=moe.num_groups_per_token if in_groups else None,
        moe_router_enable_expert_bias=moe.score_bias,
        moe_router_bias_update_rate=0.0,
        moe_router_load_balancing_type="none",
    )


def _latent_fields(mla: MLA, shape: ModelShape) -> dict[str, Any]:
    """Latent attention, which has no query groups; megatron-core pairs its rotary dimensions by itself."""
    return dict(
        num_query_groups=shape.num_attention_heads,
        qk_layernorm=True,
        q_lora_rank=mla.q_lora_rank,
        kv_lora_rank=mla.kv_lora_rank,
        qk_head_dim=mla.qk_nope_head_dim,
        qk_pos_emb_head_dim=mla.qk_rope_head_dim,
        v_head_dim=mla.v_head_dim,
        rope_type="rope",
        rotary_base=shape.rope_theta,
        rotary_percent=shape.rotary_fraction,
        rotary_interleaved=False,
        rotary_scaling_factor=1.0,
    )


def has_transformer_engine(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("transformer_engine") is not None


def unwrap(model: torch.nn.Module) -> GPTModel:
    while not isinstance(model, GPTModel):
        model = model.module
    return model


def _finalize_grads(model: list[torch.nn.Module], num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Sums gradients over ranks, no more: the loss was already divided by the global denominator."""
    finalize_model_grads(model, None, **kwargs)
