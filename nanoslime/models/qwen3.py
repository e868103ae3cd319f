"""Qwen 3, dense and MoE: queries and keys are normalized per head; head_dim is apart
from the hidden size."""

from nanoslime.models.blocks import attention, dense_decoder, ends, mixed_mlp
from nanoslime.models.rules import Rule
from nanoslime.models.shape import Architecture, ConfigFile, ModelShape, MoE


def _read(config: ConfigFile) -> ModelShape:
    config.refuse("attention_bias", False)
    sizes = config.sizes()
    sizes["head_dim"] = config.get("head_dim", 128)
    return ModelShape(**sizes, qk_norm=True)


def _read_moe(config: ConfigFile) -> ModelShape:
    config.refuse("attention_bias", False)
    num_experts = config.get("num_experts", None) or config["num_local_experts"]
    moe = MoE(
        layers=config.sparse_layers(),
        num_experts=num_experts,
        num_experts_per_token=config["num_experts_per_tok"],
        normalized=config.get("norm_topk_prob", False),
        intermediate_size=config["moe_intermediate_size"],
    )
    return ModelShape(**config.sizes(), qk_norm=True, moe=moe)


def _moe_rules(shape: ModelShape) -> list[Rule]:
    return [*ends(shape), *attention(shape), *mixed_mlp(shape)]


QWEN3 = Architecture(_read, dense_decoder)
QWEN3_MOE = Architecture(_read_moe, _moe_rules)
