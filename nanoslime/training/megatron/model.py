"""A GPTModel of the checkpoint's shape, wrapped for data parallelism."""

import logging
import shutil
import sysconfig
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
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
from nanoslime.training.megatron.local_layers import (
    local_block_spec,
    use_latent_attention,
    use_packed_rotary_embedding,
)
from nanoslime.training.megatron.parallel import Ranks, megatron_sizes, megatron_stages, partitions


@dataclass(frozen=True, slots=True)
class Kernels:
    """What is there for fused paths on this machine; by default nothing, as on a CPU."""

    transformer_engine: bool = False
    compiler: bool = False
    gradient_accumulation: bool = False


def fused_paths(shape: ModelShape, kernels: Kernels) -> dict[str, bool]:
    """megatron-core's switches of fused paths, on where this model and machine have them.

    They save kernels and memory, and each needs something of the machine:

        apply_rope_fusion             Transformer Engine; not latent attention, where
                                      megatron-core 0.19.2 has a kernel for YaRN only
        bias_activation_fusion        torch.compile for the GPU: Triton, a C compiler, Python's
                                      headers
        moe_permute_fusion            Transformer Engine
        gradient_accumulation_fusion  Apex's kernel, also beside Transformer Engine, because
                                      megatron-core's own output layer asks for it

    `masked_softmax_fusion` belongs to an attention that serves no packs, and
    `bias_dropout_fusion` to dropout: here both would do nothing. `training.megatron` can
    switch each by its name.
    """
    return {
        "apply_rope_fusion": kernels.transformer_engine and shape.mla is None,
        "bias_activation_fusion": kernels.compiler,
        "moe_permute_fusion": kernels.transformer_engine and shape.moe is not None,
        "gradient_accumulation_fusion": kernels.gradient_accumulation,
    }


def kernels_for(device: torch.device) -> Kernels:
    """What megatron-core and torch find installed for `device`."""
    if device.type != "cuda":
        return Kernels()
    return Kernels(
        transformer_engine=has_transformer_engine(device),
        compiler=_can_compile(),
        gradient_accumulation=find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )


def _can_compile() -> bool:
    """Whether torch.compile works for the GPU: Triton compiles its launchers in C."""
    headers = Path(sysconfig.get_path("include"))
    if find_spec("triton") is None or not (headers / "Python.h").is_file():
        return False
    return any(shutil.which(name) for name in ("cc", "gcc", "clang"))


def model_config(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, **options: Any
) -> TransformerConfig:
    """megatron-core's configuration of this model, with further fields in `options`.

    Raises ValueError for a field that megatron-core does not have, and for a model that
    it cannot compute.
    """
    if shape.megatron_lacks:
        lacks = "; ".join(shape.megatron_lacks)
        raise ValueError(f"megatron-core cannot compute this {shape.model_type}: it lacks {lacks}")
    values = _dense_fields(shape, dtype, device)
    if shape.moe:
        grouped = has_transformer_engine(device)
        values.update(_expert_fields(shape.moe, shape.num_layers, grouped=grouped))
    if shape.mla:
        values.update(_latent_fields(shape.mla, shape))
    values.update(fused_paths(shape, kernels_for(device)))
    values.update(options)
    config_class = MLATransformerConfig if shape.mla else TransformerConfig
    unknown = options.keys() - {field.name for field in fields(config_class)}
    if unknown:
        raise ValueError(
            f"training.megatron: megatron-core's {config_class.__name__} has no field"
            f" {sorted(unknown)}"
        )
    return config_class(**values)


def transformer_config(
    shape: ModelShape, config: RunConfig, device: torch.device
) -> TransformerConfig:
    """The configuration for training; `training.megatron` replaces single fields.

    Raises ValueError as model_config does.
    """
    training = config.training
    options: dict[str, Any] = dict(megatron_sizes(training))
    options["pipeline_model_parallel_layout"] = megatron_stages(shape, training)
    options["sequence_parallel"] = training.sequence_parallel and training.tp_size > 1
    if training.vpp_size > 1:
        # megatron-core's own training sends between virtual stages in this way.
        options["overlap_p2p_comm"] = True
        options["batch_p2p_comm"] = False
    if training.recompute:
        options["recompute_granularity"] = "full"
        options["recompute_method"] = "uniform"
        options["recompute_num_layers"] = 1
    options.update(training.megatron)
    return model_config(shape, getattr(torch, config.model.dtype), device, **options)


def gpt_model(
    shape: ModelShape,
    settings: TransformerConfig,
    device: torch.device,
    *,
    first: bool,
    last: bool,
    vp_stage: int | None = None,
) -> GPTModel:
    """One model chunk of this rank, with uninitialized weights.

    first, last: whether it is at this end of the pipeline. vp_stage: its number among
    the chunks of this rank, where there are several.
    """
    if not uses_local_spec(settings):
        spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=True, vp_stage=vp_stage)
        use_latent_attention(spec)
    else:
        spec = local_block_spec(settings, vp_stage)
    logging.getLogger(GPTModel.__module__).addFilter(_is_no_deprecation_notice)
    with cuda_names():
        model = GPTModel(
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
        )
    use_packed_rotary_embedding(model, local_spec=uses_local_spec(settings))
    return model.to(device)


def build(shape: ModelShape, config: RunConfig, ranks: Ranks, device: torch.device) -> list[DDP]:
    """This rank's model chunks for training, with gradient buffers of float32."""
    settings = transformer_config(shape, config, device)
    settings.finalize_model_grads_func = _finalize_grads
    ddp_options: dict[str, Any] = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": config.training.distributed_optimizer,
        **config.training.megatron_ddp,
    }
    model_chunks: list[DDP] = []
    for number, partition in enumerate(partitions(ranks.place, config.training, shape)):
        vp_stage = number if ranks.vpp_size > 1 else None
        gpt = gpt_model(
            shape, settings, device, first=partition.first, last=partition.last, vp_stage=vp_stage
        )
        bound = weights.bind(gpt, shape, partition)
        weights.freeze(gpt, bound, shape, config.training.freeze)
        model: torch.nn.Module = gpt
        if settings.bf16:
            model = Float16Module(settings, gpt)
            _keep_float32_biases(model)
        _mark_experts(model)
        buffers = DistributedDataParallelConfig(**ddp_options)
        # Later chunks are reduced as a whole, as in megatron-core's own training.
        model_chunks.append(DDP(settings, buffers, model, disable_bucketing=number > 0))
    if ddp_options.get("overlap_grad_reduce"):
        # All micro-batches but the last one only add to the gradients.
        no_sync = [chunk.no_sync for chunk in model_chunks]
        settings.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return model_chunks


def has_transformer_engine(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("transformer_engine") is not None


def uses_local_spec(settings: TransformerConfig) -> bool:
    """Whether the layers are local_layers', because there is no Transformer Engine."""
    return settings.transformer_impl == "local"


def unwrap(model: torch.nn.Module) -> GPTModel:
    while not isinstance(model, GPTModel):
        model = model.module
    return model


def _dense_fields(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The fields that every model sets."""
    on_cpu = device.type == "cpu"
    layers = "transformer_engine" if has_transformer_engine(device) else "local"
    return dict(
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
        transformer_impl=layers,
        use_cpu_initialization=on_cpu,
        # Initialization also marks what TP splits. Without the marks the norm would
        # count rank 0 only.
        perform_initialization=True,
        variable_seq_lengths=True,  # packed micro-batches differ in length
        # The default dispatcher refuses variable_seq_lengths, in a model without
        # experts too.
        moe_token_dispatcher_type="alltoall",
        # Gradients are summed over data parallelism, not averaged.
        calculate_per_token_loss=True,
        # gloo may still read what NCCL has already taken.
        deallocate_pipeline_outputs=not on_cpu,
        batch_p2p_sync=False,
    )


def _expert_fields(moe: MoE, num_layers: int, *, grouped: bool) -> dict[str, Any]:
    """Routing as in transformers: no auxiliary loss, and a constant bias of the scores."""
    has_experts = [int(layer in moe.layers) for layer in range(num_layers)]
    sigmoid = moe.score == "sigmoid"
    in_groups = moe.num_groups > 1
    return dict(
        num_moe_experts=moe.num_experts,
        moe_layer_freq=1 if all(has_experts) else has_experts,
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
    """Latent attention: no query groups; megatron-core pairs the rotary dimensions itself."""
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


def _keep_float32_biases(model: torch.nn.Module) -> None:
    """Makes the bias of experts' scores float32 now, before the weights are loaded.

    megatron-core would do so at the first forward.
    """
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module._maintain_float32_expert_bias()


def _mark_experts(model: torch.nn.Module) -> None:
    """Gives experts an optimizer of their own in every layout.

    megatron-core does so only where ep_size > 1. Their gradients are summed over the
    ranks with the same experts, and each rank's part counts in the norm.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False
            parameter.tensor_model_parallel = True


def _is_no_deprecation_notice(record: logging.LogRecord) -> bool:
    """Whether it does not say, as megatron-core 0.19.2 does, that HybridModel shall replace
    GPTModel."""
    return not record.getMessage().startswith("GPTModel IS DEPRECATED")


def _finalize_grads(model: list[torch.nn.Module], num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Only sums gradients over ranks; the loss was divided by the global denominator."""
    finalize_model_grads(model, None, **kwargs)
