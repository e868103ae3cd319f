"""DeepSeek-V3 and R1 in bfloat16: multi-head latent attention, experts chosen by
sigmoid scores and a bias.

https://arxiv.org/abs/2412.19437. The checkpoints that DeepSeek publishes are in FP8:
dequantize them first.
"""

from nanoslime.models.blocks import all_layers, ends, mixed_mlp, mtp
from nanoslime.models.rules import Rule, Shapes
from nanoslime.models.shape import MLA, Architecture, ConfigFile, ModelShape


def _read(config: ConfigFile) -> ModelShape:
    config.refuse("attention_bias", False)
    config.refuse("moe_layer_freq", 1)
    config.refuse("scoring_func", "sigmoid")
    config.refuse("topk_method", "noaux_tc")
    mla = MLA(
        q_lora_rank=config.get("q_lora_rank", None),
        kv_lora_rank=config["kv_lora_rank"],
        qk_nope_head_dim=config["qk_nope_head_dim"],
        qk_rope_head_dim=config["qk_rope_head_dim"],
        v_head_dim=config["v_head_dim"],
    )
    sizes = config.sizes()
    sizes["head_dim"] = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    return ModelShape(
        **sizes,
        rotary_interleaved=config.get("rope_interleave", True),
        mla=mla,
        moe=config.sigmoid_moe(),
        num_mtp_layers=config.get("num_nextn_predict_layers", 0),
    )


def _rules(shape: ModelShape) -> list[Rule]:
    return [*ends(shape), *_attention(shape), *mixed_mlp(shape), *mtp(shape)]


def _attention(shape: ModelShape) -> list[Rule]:
    mla = shape.mla
    assert mla is not None
    layers = all_layers(shape)
    hidden = shape.hidden_size
    heads = shape.num_attention_heads
    kv_rank = mla.kv_lora_rank
    kv_up = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    kv_down = kv_rank + mla.qk_rope_head_dim
    o = heads * mla.v_head_dim
    return [
        layers.rule("input_layernorm.weight", {"input_layernorm.weight": (hidden,)}),
        layers.rule(
            "self_attention.linear_kv_down_proj.weight",
            {"self_attn.kv_a_proj_with_mqa.weight": (kv_down, hidden)},
        ),
        layers.rule(
            "self_attention.linear_kv_up_proj.layer_norm_weight",
            {"self_attn.kv_a_layernorm.weight": (kv_rank,)},
            local_spec_name="self_attention.kv_layernorm.weight",
        ),
        layers.rule(
            "self_attention.linear_kv_up_proj.weight",
            {"self_attn.kv_b_proj.weight": (kv_up, kv_rank)},
            tp_dim=0,
        ),
        layers.rule(
            "self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (hidden, o)}, tp_dim=1
        ),
        *_query_rules(shape, mla.q_lora_rank),
    ]


def _query_rules(shape: ModelShape, q_rank: int | None) -> list[Rule]:
    """The projection of queries: one matrix, or down to `q_rank`, a norm, and up again."""
    layers = all_layers(shape)
    hidden = shape.hidden_size
    q = shape.num_attention_heads * shape.head_dim
    if q_rank is None:
        matrix: Shapes = {"self_attn.q_proj.weight": (q, hidden)}
        return [layers.rule("self_attention.linear_q_proj.weight", matrix, tp_dim=0)]
    return [
        layers.rule(
            "self_attention.linear_q_down_proj.weight",
            {"self_attn.q_a_proj.weight": (q_rank, hidden)},
        ),
        layers.rule(
            "self_attention.linear_q_up_proj.layer_norm_weight",
            {"self_attn.q_a_layernorm.weight": (q_rank,)},
            local_spec_name="self_attention.q_layernorm.weight",
        ),
        layers.rule(
            "self_attention.linear_q_up_proj.weight",
            {"self_attn.q_b_proj.weight": (q, q_rank)},
            tp_dim=0,
        ),
    ]


DEEPSEEK_V3 = Architecture(_read, _rules)
