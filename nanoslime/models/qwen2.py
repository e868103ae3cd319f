"""Qwen 2 and 2.5: biases on queries, keys and values; Qwen2-MoE with a gated shared expert."""

from functools import partial

from nanoslime.models.blocks import ExpertNames, dense_decoder, expert_decoder
from nanoslime.models.shape import Architecture, ConfigFile, ModelShape

_MOE_NAMES = ExpertNames(shared="mlp.shared_expert.", shared_gate="mlp.shared_expert_gate.weight")


def _read(config: ConfigFile) -> ModelShape:
    return ModelShape(**config.sizes(), qkv_bias=True)


def _read_moe(config: ConfigFile) -> ModelShape:
    moe = config.softmax_moe(
        shared_intermediate_size=config["shared_expert_intermediate_size"], shared_gate=True
    )
    return ModelShape(**config.sizes(), qkv_bias=config.get("qkv_bias", True), moe=moe)


QWEN2 = Architecture(_read, dense_decoder)
QWEN2_MOE = Architecture(_read_moe, partial(expert_decoder, names=_MOE_NAMES))
