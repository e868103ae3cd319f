"""Qwen 2 and 2.5: biases on queries, keys and values; Qwen2-MoE with a gated shared expert."""

from nanoslime.models.blocks import ExpertNames, attention, dense_decoder, ends, mixed_mlp
from nanoslime.models.rules import Rule
from nanoslime.models.shape import Architecture, ConfigFile, ModelShape

_MOE_NAMES = ExpertNames(shared="mlp.shared_expert.", shared_gate="mlp.shared_expert_gate.weight")


def _read(config: ConfigFile) -> ModelShape:
    return ModelShape(**config.sizes(), qkv_bias=True)


def _read_moe(config: ConfigFile) -> ModelShape:
    moe = config.softmax_moe(
        shared_intermediate_size=config["shared_expert_intermediate_size"], shared_gate=True
    )
    return ModelShape(**config.sizes(), qkv_bias=config.get("qkv_bias", True), moe=moe)


def _moe_rules(shape: ModelShape) -> list[Rule]:
    return [*ends(shape), *attention(shape), *mixed_mlp(shape, _MOE_NAMES)]


QWEN2 = Architecture(_read, dense_decoder)
QWEN2_MOE = Architecture(_read_moe, _moe_rules)
