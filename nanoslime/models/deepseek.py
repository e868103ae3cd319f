"""DeepSeek-V3 and R1 in bfloat16: multi-head latent attention, experts chosen by sigmoid scores and a bias.

https://arxiv.org/abs/2412.19437. The checkpoints that DeepSeek publishes are in FP8: dequantize them first.
"""

from nanoslime.models.rules import Rule, all_layers, ends, mixed_mlp, mtp
from nanoslime.models.shape import MLA, Architecture, ConfigFile, ModelShape


def _read(config: ConfigFile) -> ModelShape:
    config.refuse("attention_bias", False)
    config.refuse("moe_layer_freq", 1)
    config.refuse("scoring_func", "sigmoid")
    config.refuse("topk_method", "noaux_tc")
    own = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    mla = MLA(q_lora_rank=config.get("q_lora_rank", None), **{name: config[name] for name in own})
    return ModelShape(
        **config.sizes() | {"head_dim": mla.qk_nope_head_dim + mla.qk_rope_head_dim},
        rotary_interleaved=config.get("rope_interleave", True),
        mla=mla,
        moe=config.sigmoid_moe(),
        num_mtp_layers=config.get("num_nextn_predict_layers", 0),
    )


def _rules(shape: ModelShape) -> list[Rule]:
    return [*ends(shape), *_attention(shape), *mixed_mlp(shape), *mtp(shape)]


def _attention(shape: ModelShape) -> list[Rule]:
    mla, h, heads, layer = (
        shape.mla,
        shape.hidden_size,
        shape.num_attention_heads,
        all_layers(shape),
    )
    assert mla is not None
    rank, kv_rank, hf, own = mla.q_lora_rank, mla.kv_lora_rank, "self_attn.", "self_attention."
    q, kv = heads * shape.head_dim, heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    kv_down = own + "linear_kv_down_proj.weight"
    kv_norm, kv_local = own + "linear_kv_up_proj.layer_norm_weight", own + "kv_layernorm.weight"
    rules = [
        layer.copy("input_layernorm.weight", "input_layernorm.weight", h),
        layer.copy(kv_down, hf + "kv_a_proj_with_mqa.weight", kv_rank + mla.qk_rope_head_dim, h),
        layer.copy(kv_norm, hf + "kv_a_layernorm.weight", kv_rank, local=kv_local),
        layer.copy(
            own + "linear_kv_up_proj.weight", hf + "kv_b_proj.weight", kv, kv_rank, tp_dim=0
        ),
        layer.copy(
            own + "linear_proj.weight", hf + "o_proj.weight", h, heads * mla.v_head_dim, tp_dim=1
        ),
    ]
    if rank is None:
        return [
            *rules,
            layer.copy(own + "linear_q_proj.weight", hf + "q_proj.weight", q, h, tp_dim=0),
        ]
    norm, local = own + "linear_q_up_proj.layer_norm_weight", own + "q_layernorm.weight"
    return [
        *rules,
        layer.copy(own + "linear_q_down_proj.weight", hf + "q_a_proj.weight", rank, h),
        layer.copy(norm, hf + "q_a_layernorm.weight", rank, local=local),
        layer.copy(own + "linear_q_up_proj.weight", hf + "q_b_proj.weight", q, rank, tp_dim=0),
    ]


DEEPSEEK_V3 = Architecture(_read, _rules)
