"""Qwen 3, dense and MoE: queries and keys are normalized per head; head_dim is apart
from the hidden size."""

from nanoslime.models.blocks import dense_decoder, expert_decoder
from nanoslime.models.shape import Architecture, ConfigFile, ModelShape


def _read(config: ConfigFile) -> ModelShape:
    config.refuse("attention_bias", False)
    sizes = config.sizes()
    sizes["head_dim"] = config.get("head_dim", 128)
    return ModelShape(**sizes, qk_norm=True)


def _read_moe(config: ConfigFile) -> ModelShape:
    config.refuse("attention_bias", False)
    return ModelShape(**config.sizes(), qk_norm=True, moe=config.softmax_moe())


QWEN3 = Architecture(_read, dense_decoder)
QWEN3_MOE = Architecture(_read_moe, expert_decoder)
