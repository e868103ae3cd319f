"""Random Hugging Face models, small, with every weight far enough from its default to matter."""

from pathlib import Path

import torch
import transformers

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-6,
    vocab_size=250,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
FAMILIES = {
    "llama": (transformers.LlamaConfig, dict(tie_word_embeddings=False)),
    "llama3": (transformers.LlamaConfig, dict(tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE)),
    "qwen2": (transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen3": (transformers.Qwen3Config, dict(tie_word_embeddings=True, head_dim=16)),
    "qwen3_untied": (transformers.Qwen3Config, dict(tie_word_embeddings=False, head_dim=16)),
}


def make_model(family: str, **changes: object) -> transformers.PreTrainedModel:
    config_class, own = FAMILIES[family]
    config = config_class(**{**SIZES, **own, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    return model.eval()


def save_model(directory: Path, family: str, *, max_shard_size: str = "5GB", **changes: object) -> Path:
    make_model(family, **changes).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory
