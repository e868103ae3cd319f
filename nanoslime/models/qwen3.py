"""Qwen 3, dense and MoE: queries and keys are normalized per head; head_dim is apart
from the hidden size."""

from nanoslime.models.blocks import attention, dense_decoder, ends, mixed_mlp
from nanoslime.models.rules import Rule
from nanoslime.models.shape import Architecture, ConfigFile, ModelShape


def _read(config: ConfigFile) -> ModelShape:
    config.refuse("attention_bias", False)
    sizes = config.sizes()
    sizes["head_dim"] = config.get("head_dim", 128)
    return ModelShape(**sizes, qk_norm=True)


def _read_moe(config: ConfigFile) -> ModelShape:
    config.refuse("attention_bias", False)
    return ModelShape(**config.sizes(), qk_norm=True, moe=config.softmax_moe())


def _moe_rules(shape: ModelShape) -> list[Rule]:
    return [*ends(shape), *attention(shape), *mixed_mlp(shape)]


QWEN3 = Architecture(_read, dense_decoder)
QWEN3_MOE = Architecture(_read_moe, _moe_rules)
