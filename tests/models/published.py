"""Excerpts of config.json files as their authors published them, before transformers 5
renamed keys.

Left out: ids of tokens, dropout and initialization, and the quantization of
DeepSeek-V3's FP8 weights.
"""

_COMMON = dict(hidden_act="silu", tie_word_embeddings=False, use_cache=True)
_LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
_SWITCHED_OFF = dict(use_sliding_window=False, max_window_layers=21)


def _sizes(
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    groups: int,
    vocab: int,
    positions: int,
    eps: float,
) -> dict[str, object]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps")
    return _COMMON | dict(
        zip(names, (hidden, mlp, layers, heads, groups, vocab, positions, eps), strict=True)
    )


CONFIGS: dict[str, dict[str, object]] = {
    "Llama-2-7b": _sizes(4096, 11008, 32, 32, 32, 32000, 4096, 1e-5)
    | dict(model_type="llama", rope_scaling=None, pretraining_tp=1),
    "Llama-3.2-1B": _sizes(2048, 8192, 16, 32, 8, 128256, 131072, 1e-5)
    | dict(
        model_type="llama",
        head_dim=64,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        mlp_bias=False,
    )
    | dict(attention_bias=False, rope_scaling=_LLAMA3 | dict(rope_type="llama3", factor=32.0)),
    "Mistral-7B-v0.1": _sizes(4096, 14336, 32, 32, 8, 32000, 32768, 1e-5)
    | dict(model_type="mistral", rope_theta=10000.0, sliding_window=4096),
    "Mistral-7B-v0.3": _sizes(4096, 14336, 32, 32, 8, 32768, 32768, 1e-5)
    | dict(model_type="mistral", rope_theta=1000000.0, sliding_window=None, head_dim=None),
    "Mistral-Nemo-2407": _sizes(5120, 14336, 40, 32, 8, 131072, 1024000, 1e-5)
    | dict(model_type="mistral", rope_theta=1000000.0, sliding_window=None, head_dim=128),
    "Mixtral-8x7B-v0.1": _sizes(4096, 14336, 32, 32, 8, 32000, 32768, 1e-5)
    | dict(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2, rope_theta=1000000.0)
    | dict(sliding_window=None, output_router_logits=False),
    "Qwen2.5-0.5B": _sizes(896, 4864, 24, 14, 2, 151936, 32768, 1e-6)
    | _SWITCHED_OFF
    | dict(
        model_type="qwen2", rope_theta=1000000.0, sliding_window=32768, tie_word_embeddings=True
    ),
    "Qwen2.5-7B": _sizes(3584, 18944, 28, 28, 4, 152064, 131072, 1e-6)
    | _SWITCHED_OFF
    | dict(model_type="qwen2", rope_theta=1000000.0, sliding_window=131072, attention_bias=True),
    "Qwen1.5-MoE-A2.7B": _sizes(2048, 5632, 24, 16, 16, 151936, 8192, 1e-6)
    | _SWITCHED_OFF
    | dict(
        model_type="qwen2_moe", rope_theta=1000000.0, sliding_window=32768, decoder_sparse_step=1
    )
    | dict(num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408, norm_topk_prob=False)
    | dict(shared_expert_intermediate_size=5632, qkv_bias=True),
    "Qwen2-57B-A14B": _sizes(3584, 18944, 28, 28, 4, 151936, 131072, 1e-6)
    | _SWITCHED_OFF
    | dict(
        model_type="qwen2_moe", rope_theta=1000000.0, sliding_window=65536, decoder_sparse_step=1
    )
    | dict(num_experts=64, num_experts_per_tok=8, moe_intermediate_size=2560, norm_topk_prob=False)
    | dict(shared_expert_intermediate_size=20480, mlp_only_layers=[]),
    "Qwen3-4B": _sizes(2560, 9728, 36, 32, 8, 151936, 40960, 1e-6)
    | dict(model_type="qwen3", head_dim=128, rope_theta=1000000, attention_bias=False)
    | dict(
        tie_word_embeddings=True, sliding_window=None, use_sliding_window=False, rope_scaling=None
    ),
    "Qwen3-30B-A3B": _sizes(2048, 6144, 48, 32, 4, 151936, 40960, 1e-6)
    | dict(model_type="qwen3_moe", head_dim=128, rope_theta=1000000.0, attention_bias=False)
    | dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True)
    | dict(
        decoder_sparse_step=1, mlp_only_layers=[], sliding_window=None, use_sliding_window=False
    ),
    "GLM-4-9B-0414": _sizes(4096, 13696, 40, 32, 2, 151552, 32768, 1e-5)
    | dict(model_type="glm4", head_dim=128, partial_rotary_factor=0.5, rope_theta=10000.0)
    | dict(attention_bias=True, pad_token_id=151329),
    "GLM-4-32B-0414": _sizes(6144, 23040, 61, 48, 8, 151552, 32768, 1e-5)
    | dict(model_type="glm4", head_dim=128, partial_rotary_factor=0.5, rope_theta=10000.0)
    | dict(attention_bias=False, pad_token_id=151329),
    "GLM-4.5-Air": _sizes(4096, 10944, 46, 96, 8, 151552, 131072, 1e-5)
    | dict(model_type="glm4_moe", head_dim=128, partial_rotary_factor=0.5, rope_theta=1000000)
    | dict(rope_scaling=None, attention_bias=True, use_qk_norm=False, first_k_dense_replace=1)
    | dict(
        n_routed_experts=128, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=1408
    )
    | dict(n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.0)
    | dict(num_nextn_predict_layers=1),
    "GLM-4.5": _sizes(5120, 12288, 92, 96, 8, 151552, 131072, 1e-5)
    | dict(model_type="glm4_moe", head_dim=128, partial_rotary_factor=0.5, rope_theta=1000000)
    | dict(rope_scaling=None, attention_bias=True, use_qk_norm=True, first_k_dense_replace=3)
    | dict(
        n_routed_experts=160, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=1536
    )
    | dict(n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5)
    | dict(num_nextn_predict_layers=1),
    "DeepSeek-V3": _sizes(7168, 18432, 61, 128, 128, 129280, 163840, 1e-6)
    | dict(
        model_type="deepseek_v3", rope_theta=10000, attention_bias=False, first_k_dense_replace=3
    )
    | dict(rope_scaling=dict(type="yarn", factor=40, beta_fast=32, beta_slow=1, mscale=1.0))
    | dict(
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    | dict(
        n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048
    )
    | dict(
        n_group=8, topk_group=4, norm_topk_prob=True, routed_scaling_factor=2.5, moe_layer_freq=1
    )
    | dict(scoring_func="sigmoid", topk_method="noaux_tc", num_nextn_predict_layers=1),
    "Moonlight-16B-A3B": _sizes(2048, 11264, 27, 16, 16, 163840, 8192, 1e-5)
    | dict(
        model_type="deepseek_v3", rope_theta=50000.0, attention_bias=False, first_k_dense_replace=1
    )
    | dict(
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    | dict(
        n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=1408
    )
    | dict(
        n_group=1, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.446, moe_layer_freq=1
    )
    | dict(scoring_func="sigmoid", topk_method="noaux_tc", num_nextn_predict_layers=0),
}
