"""Random Hugging Face models, small, with every weight far enough from its default to matter."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

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
EXPERTS = dict(moe_intermediate_size=16, num_experts_per_tok=2)
SIGMOID = dict(
    **EXPERTS,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    num_nextn_predict_layers=1,
)
MLA = dict(kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)

LLAMA = dict(tie_word_embeddings=False)
MISTRAL = dict(head_dim=16, sliding_window=None)
QWEN2_MOE = dict(
    **EXPERTS,
    num_experts=4,
    shared_expert_intermediate_size=24,
    decoder_sparse_step=2,
    mlp_only_layers=[1],
)
QWEN3_MOE = dict(**EXPERTS, num_experts=4, head_dim=16)
GLM4_MOE = dict(
    **SIGMOID, head_dim=16, first_k_dense_replace=1, use_qk_norm=True, attention_bias=True
)
GLM4_MOE_NO_DENSE = dict(
    **SIGMOID, head_dim=16, first_k_dense_replace=0, use_qk_norm=False, n_shared_experts=2
)
DEEPSEEK_V3 = dict(**SIGMOID, **MLA, q_lora_rank=20, first_k_dense_replace=1, n_shared_experts=2)
DEEPSEEK_V3_NO_Q_LORA = {
    **SIGMOID,
    **MLA,
    "q_lora_rank": None,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "num_nextn_predict_layers": 0,
}

# Name -> class of the configuration, and its values beside SIZES.
FAMILIES = {
    "llama": (transformers.LlamaConfig, LLAMA),
    "llama3": (transformers.LlamaConfig, {**LLAMA, "rope_parameters": LLAMA3_ROPE}),
    "mistral": (transformers.MistralConfig, MISTRAL),
    "qwen2": (transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen2_untied": (transformers.Qwen2Config, dict(tie_word_embeddings=False)),
    "qwen3": (transformers.Qwen3Config, dict(tie_word_embeddings=True, head_dim=16)),
    "qwen3_untied": (transformers.Qwen3Config, dict(tie_word_embeddings=False, head_dim=16)),
    "mixtral": (transformers.MixtralConfig, dict(num_local_experts=4)),
    "qwen2_moe": (transformers.Qwen2MoeConfig, QWEN2_MOE),
    "qwen3_moe": (transformers.Qwen3MoeConfig, QWEN3_MOE),
    "qwen3_moe_mixed": (
        transformers.Qwen3MoeConfig,
        {**QWEN3_MOE, "mlp_only_layers": [0, 2], "tie_word_embeddings": True},
    ),
    "glm4": (transformers.Glm4Config, dict(head_dim=16, pad_token_id=0)),
    "glm4_no_bias": (
        transformers.Glm4Config,
        dict(head_dim=8, pad_token_id=0, attention_bias=False),
    ),
    "glm4_moe": (transformers.Glm4MoeConfig, GLM4_MOE),
    "glm4_moe_no_dense": (transformers.Glm4MoeConfig, GLM4_MOE_NO_DENSE),
    "deepseek_v3": (transformers.DeepseekV3Config, DEEPSEEK_V3),
    "deepseek_v3_no_q_lora": (transformers.DeepseekV3Config, DEEPSEEK_V3_NO_Q_LORA),
}


def make_model(family: str, **changes: object) -> transformers.PreTrainedModel:
    config_class, own = FAMILIES[family]
    config = config_class(**{**SIZES, **own, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *score_biases(model).items()]:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    return model.eval()


def score_biases(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The biases of experts' scores, which are buffers, by name."""
    buffers = dict(model.named_buffers())
    return {name: buffers[name] for name in buffers if name.endswith("e_score_correction_bias")}


def save_model(
    directory: Path,
    family: str,
    *,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    **changes: object,
) -> Path:
    """A checkpoint as transformers writes it.

    Whatever the `dtype` is, the bias of the experts' scores is float32.
    """
    model = make_model(family, **changes)
    biases = {name: bias.clone() for name, bias in score_biases(model).items()}
    model.to(dtype)
    for name, bias in biases.items():
        router, _, _ = name.rpartition(".")
        model.get_submodule(router).e_score_correction_bias = bias
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def add_mtp(directory: Path, *, repeats: bool = True) -> Path:
    """Adds the multi-token prediction layer that transformers leaves out.

    It is a decoder layer like the last one, numbered after it, with two norms, a
    projection and a final norm. With `repeats` it also holds the embedding and the
    output layer once more, as published checkpoints do.
    """
    files = sorted(directory.glob("*.safetensors"))
    content = {}
    for file in files:
        content.update(load_file(file))
    config = json.loads((directory / "config.json").read_text())
    added = mtp_tensors(content, config["num_hidden_layers"], repeats=repeats)
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        save_file({**content, **added}, files[0], {"format": "pt"})
        return directory
    save_file(added, directory / "model-mtp.safetensors", {"format": "pt"})
    values = json.loads(index.read_text())
    values["weight_map"].update(dict.fromkeys(added, "model-mtp.safetensors"))
    values["metadata"]["total_size"] += sum(tensor.nbytes for tensor in added.values())
    index.write_text(json.dumps(values))
    return directory


def mtp_tensors(
    content: dict[str, torch.Tensor], num_layers: int, *, repeats: bool
) -> dict[str, torch.Tensor]:
    """The tensors of a multi-token prediction layer for a model with this content."""
    generator = torch.Generator().manual_seed(1)

    def random(tensor: torch.Tensor) -> torch.Tensor:
        noise = 0.15 * torch.randn(tensor.shape, generator=generator)
        # The weights of norms are about 1.
        mean = 1 if tensor.dim() == 1 else 0
        return (noise + mean).to(tensor.dtype)

    last_layer = f"model.layers.{num_layers - 1}."
    new_layer = f"model.layers.{num_layers}."
    added = {}
    for name, tensor in content.items():
        if name.startswith(last_layer):
            added[new_layer + name.removeprefix(last_layer)] = random(tensor)
    norm = content["model.norm.weight"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        added[f"{new_layer}{name}.weight"] = random(norm)
    hidden_size = len(norm)
    added[new_layer + "eh_proj.weight"] = random(norm.new_empty(hidden_size, 2 * hidden_size))
    if repeats:
        added[new_layer + "embed_tokens.weight"] = content["model.embed_tokens.weight"].clone()
        added[new_layer + "shared_head.head.weight"] = content["lm_head.weight"].clone()
    return added
