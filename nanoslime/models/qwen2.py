"""Qwen 2 and 2.5 (dense): biases on queries, keys and values."""

from __future__ import annotations

from nanoslime.models.rules import dense_decoder
from nanoslime.models.shape import Architecture, ConfigFile, ModelShape


def _read(config: ConfigFile) -> ModelShape:
    config.refuse("use_sliding_window", False)
    return ModelShape(**config.sizes(), qkv_bias=True)


QWEN2 = Architecture(_read, dense_decoder)
