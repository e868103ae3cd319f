"""GLM-4 (0414, dense): gate and up in one tensor, norms also after attention and MLP;
and GLM-4.5 (MoE).

megatron-core 0.19.2 has no GPTModel layer with GLM-4's two norms after attention and
MLP. Their Megatron names are the names in the layers that slime and mbridge patch in:
GLM-4 converts, it does not train with Megatron.
"""

from nanoslime.models.blocks import FUSED, all_layers, attention, dense_mlp, ends, expert_decoder
from nanoslime.models.rules import Rule
from nanoslime.models.shape import Architecture, ConfigFile, ModelShape


def _read(config: ConfigFile) -> ModelShape:
    sizes = config.sizes(rotary_fraction=0.5)
    sizes["megatron_lacks"] += ("norms after attention and MLP",)
    qkv_bias = config.get("attention_bias", True)
    return ModelShape(**sizes, qkv_bias=qkv_bias, rotary_interleaved=True)


def _rules(shape: ModelShape) -> list[Rule]:
    layers = all_layers(shape)
    rules = [*ends(shape), *attention(shape), *dense_mlp(shape, matrices=FUSED)]
    for name in ("post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"):
        rules.append(layers.rule(name, {name: (shape.hidden_size,)}))
    return rules


def _read_moe(config: ConfigFile) -> ModelShape:
    return ModelShape(
        **config.sizes(rotary_fraction=0.5),
        moe=config.sigmoid_moe(),
        qkv_bias=config.get("attention_bias", False),
        qk_norm=config.get("use_qk_norm", False),
        num_mtp_layers=config.get("num_nextn_predict_layers", 0),
    )


GLM4 = Architecture(
    _read,
    _rules,
    unconfirmed="the norms after attention and MLP are named as slime and mbridge do: "
    "no GPTModel has them",
)
GLM4_MOE = Architecture(_read_moe, expert_decoder)
