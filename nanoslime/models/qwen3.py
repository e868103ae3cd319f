"""Qwen 3 (dense): queries and keys are normalized per head; head_dim is apart from the hidden size."""

from __future__ import annotations

from nanoslime.models.rules import dense_decoder
from nanoslime.models.shape import Architecture, ConfigFile, ModelShape


def _read(config: ConfigFile) -> ModelShape:
    config.refuse("use_sliding_window", False)
    config.refuse("attention_bias", False)
    return ModelShape(**config.sizes() | {"head_dim": config.get("head_dim", 128)}, qk_norm=True)


QWEN3 = Architecture(_read, dense_decoder)
