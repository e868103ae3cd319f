"""Llama 2, 3 and models of its shape: no biases; Llama 3.1 and later scale their rotary
frequencies."""

from nanoslime.models.blocks import dense_decoder
from nanoslime.models.shape import Architecture, ConfigFile, ModelShape


def _read(config: ConfigFile) -> ModelShape:
    config.refuse("attention_bias", False)
    config.refuse("mlp_bias", False)
    return ModelShape(**config.sizes())


LLAMA = Architecture(_read, dense_decoder)

# Mistral has the same tensors; its version 0.1 attends within a sliding window.
