"""Llama 2, 3 and models of its shape: no biases; Llama 3.1 and later scale their rotary frequencies."""

from nanoslime.models.rules import dense_decoder
from nanoslime.models.shape import Architecture, ConfigFile, ModelShape


def _read(config: ConfigFile) -> ModelShape:
    config.refuse("attention_bias", False)
    config.refuse("mlp_bias", False)
    return ModelShape(**config.sizes())


LLAMA = Architecture(_read, dense_decoder)
MISTRAL = Architecture(
    _read, dense_decoder
)  # the same tensors; version 0.1 attends within a sliding window
