"""Names of the options that Megatron and SGLang take, known without importing either.

A typo is thus found on the login node. The lists come from the sources of the installed
packages; `python -m tools.option_names` writes them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoslime.config.flags import suggest
from nanoslime.types import RunError

# Options that config.json decides.
_SHAPE = """num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size kv_channels
    qk_layernorm rotary_interleaved add_bias_linear add_qkv_bias normalization layernorm_epsilon
    gated_linear_unit activation_func num_moe_experts moe_layer_freq moe_ffn_hidden_size
    mtp_num_layers moe_shared_expert_intermediate_size moe_shared_expert_gate moe_router_topk
    moe_router_score_function moe_router_pre_softmax moe_router_topk_scaling_factor
    moe_router_num_groups moe_router_group_topk moe_router_enable_expert_bias use_mup""".split()
# Options that would add to the loss, or divide it.
_LOSS = """calculate_per_token_loss moe_aux_loss_coeff moe_z_loss_coeff
    moe_router_bias_update_rate""".split()
# Options that packed sequences and the loading of weights rest on.
_FIXED = """variable_seq_lengths use_cpu_initialization perform_initialization
    transformer_impl""".split()
# Options that cut weights in another way than the weight map does.
_WEIGHT_SHARDS = """tensor_parallel_num_weight_shards gtp_weight_remat_size
    expert_tensor_parallel_num_weight_shards expert_gtp_weight_remat_size""".split()
# Options that cut the layers into stages in another way than the weight map does.
_STAGES = """pipeline_model_parallel_layout account_for_embedding_in_pipeline_split
    account_for_loss_in_pipeline_split""".split()
_DTYPES = "params_dtype pipeline_dtype bf16 fp16".split()

_MEGATRON = {
    "tensor_model_parallel_size": "training.tp_size",
    "pipeline_model_parallel_size": "training.pp_size",
    "context_parallel_size": "training.cp_size",
    "expert_model_parallel_size": "training.ep_size",
    "expert_tensor_parallel_size": "training.etp_size",
    "virtual_pipeline_model_parallel_size": "training.vpp_size",
    "num_layers_in_first_pipeline_stage": "training.num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage": "training.num_layers_in_last_pipeline_stage",
    "sequence_parallel": "training.sequence_parallel",
    **dict.fromkeys(_DTYPES, "model.dtype"),
    **dict.fromkeys(_LOSS, "algorithm.*: gradients are those of its loss alone, divided once"),
    **dict.fromkeys(_FIXED, "nothing: packed sequences and the weights' loading rest on it"),
    **dict.fromkeys(_STAGES, "training.num_layers_in_first_pipeline_stage, or _last_"),
    **dict.fromkeys(_WEIGHT_SHARDS, "training.tp_size: the weight map knows no other shards"),
    **dict.fromkeys(_SHAPE, "model.hf_checkpoint (its config.json)"),
}

# Options of data parallelism in Megatron's own FSDP, which is not run.
_MEGATRON_FSDP = """use_megatron_fsdp use_custom_fsdp data_parallel_sharding_strategy
    gradient_reduce_div_fusion suggested_communication_unit_size keep_fp8_transpose_cache
    fsdp_double_buffer fsdp_db_use_persist_buf_on_alloc_fail fsdp_all_gather_in_start_param_sync
    outer_dp_sharding_strategy fsdp_manual_registration megatron_fsdp_main_params_dtype
    megatron_fsdp_main_grads_dtype megatron_fsdp_grad_comm_dtype megatron_fsdp_use_decoupled_grad
    megatron_fsdp_cuda_graph_mode""".split()
_GRAD_CHECKS = "check_for_nan_in_grad check_for_large_grads".split()
_PARAMS_FP8 = "fp8_param_gather fp4_param_gather reuse_grad_buf_for_mxfp8_param_ag".split()
_DDP = {
    "use_distributed_optimizer": "training.distributed_optimizer",
    "average_in_collective": "nothing: gradients are sums over ranks",
    "num_distributed_optimizer_instances": "nothing: there is one over all of data parallelism",
    "delay_wgrad_compute": "nothing: no schedule here uses the delay",
    **dict.fromkeys(_GRAD_CHECKS, "training.skip_grad_norm_above; what is not finite is skipped"),
    **dict.fromkeys(_PARAMS_FP8, "model.dtype"),
    **dict.fromkeys(_MEGATRON_FSDP, "--backend fsdp"),
}

# Options of optimizers other than AdamW.
_OTHER_OPTIMIZERS = """optimizer decoupled_weight_decay sgd_momentum muon_momentum muon_split_qkv
    muon_nesterov muon_scale_mode muon_fp32_matmul_prec muon_coefficient_type muon_num_ns_steps
    muon_tp_mode muon_extra_scale_factor muon_scalar_optimizer lion_beta1 lion_beta2
    soap_shampoo_beta soap_precondition_frequency soap_use_kl_shampoo adaptive_muon_moment2_method
    adaptive_muon_beta2 adaptive_muon_eps use_layer_wise_distributed_optimizer""".split()
_FP16 = """fp16 loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis
    fp8_recipe reuse_grad_buf_for_mxfp8_param_ag params_dtype bf16""".split()
# Options that Megatron's own training loop reads.
_LOOP = "log_num_zeros_in_grad barrier_with_L1_time timers config_logger_dir".split()
_OWN_NAMES = "lr min_lr weight_decay adam_beta1 adam_beta2 adam_eps clip_grad".split()
_OVERLAPS = "overlap_param_gather overlap_param_gather_with_optimizer_step".split()
_OPTIMIZER = {
    "use_distributed_optimizer": "training.distributed_optimizer",
    "optimizer_cpu_offload": "training.optimizer_offload",
    "grad_norm_skip_threshold": "training.skip_grad_norm_above",
    **{name: f"training.{name}" for name in _OWN_NAMES},
    **dict.fromkeys(("decoupled_lr", "decoupled_min_lr"), "training.lr: there is one for all"),
    **dict.fromkeys(_OVERLAPS, "training.megatron_ddp.overlap_param_gather"),
    **dict.fromkeys(_FP16, "model.dtype"),
    **dict.fromkeys(_LOOP, "tracking.*: only Megatron's own loop reads it"),
    **dict.fromkeys(_OTHER_OPTIMIZERS, "nothing: the optimizer is AdamW"),
}

# For each of TrainingConfig's MEGATRON_OPTIONS: what nanoslime sets itself, and what to set
# instead.
SET_BY_NANOSLIME = {"megatron": _MEGATRON, "megatron_ddp": _DDP, "megatron_optimizer": _OPTIMIZER}


def check(
    which: str, place: str, options: Mapping[str, Any], set_by_nanoslime: Mapping[str, str]
) -> None:
    """Raises RunError for an option that the package does not have, or that nanoslime sets.

    `set_by_nanoslime` maps the options that nanoslime sets to what a user sets instead.
    """
    listed = known(which)
    for name in options:
        if name in set_by_nanoslime:
            raise RunError(f"{place}.{name} is set by nanoslime; use {set_by_nanoslime[name]}")
        if name not in listed["names"]:
            hint = suggest(name, {known_name: known_name for known_name in listed["names"]})
            raise RunError(
                f"{place}.{name}: {listed['package']} {listed['version']} has no such option{hint}"
            )


def list_file(which: str) -> Path:
    return Path(__file__).with_name(f"{which}.json")


def known(which: str) -> dict[str, Any]:
    """The committed list: package, version, names."""
    return json.loads(list_file(which).read_text(encoding="utf-8"))
