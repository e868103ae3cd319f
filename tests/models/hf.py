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
SIGMOID = EXPERTS | dict(n_routed_experts=4, n_group=2, topk_group=1, num_nextn_predict_layers=1)
MLA = dict(kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
FAMILIES = {
    "llama": (transformers.LlamaConfig, dict(tie_word_embeddings=False)),
    "llama3": (
        transformers.LlamaConfig,
        dict(tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE),
    ),
    "mistral": (transformers.MistralConfig, dict(head_dim=16, sliding_window=None)),
    "qwen2": (transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    "qwen2_untied": (transformers.Qwen2Config, dict(tie_word_embeddings=False)),
    "qwen3": (transformers.Qwen3Config, dict(tie_word_embeddings=True, head_dim=16)),
    "qwen3_untied": (transformers.Qwen3Config, dict(tie_word_embeddings=False, head_dim=16)),
    "mixtral": (transformers.MixtralConfig, dict(num_local_experts=4)),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        EXPERTS
        | dict(
            num_experts=4,
            shared_expert_intermediate_size=24,
            decoder_sparse_step=2,
            mlp_only_layers=[1],
        ),
    ),
    "qwen3_moe": (transformers.Qwen3MoeConfig, EXPERTS | dict(num_experts=4, head_dim=16)),
    "qwen3_moe_mixed": (
        transformers.Qwen3MoeConfig,
        EXPERTS
        | dict(num_experts=4, head_dim=16, mlp_only_layers=[0, 2], tie_word_embeddings=True),
    ),
    "glm4": (transformers.Glm4Config, dict(head_dim=16, pad_token_id=0)),
    "glm4_no_bias": (
        transformers.Glm4Config,
        dict(head_dim=8, pad_token_id=0, attention_bias=False),
    ),
    "glm4_moe": (
        transformers.Glm4MoeConfig,
        SIGMOID | dict(head_dim=16, first_k_dense_replace=1, use_qk_norm=True, attention_bias=True),
    ),
    "glm4_moe_no_dense": (
        transformers.Glm4MoeConfig,
        SIGMOID | dict(head_dim=16, first_k_dense_replace=0, use_qk_norm=False, n_shared_experts=2),
    ),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        SIGMOID | MLA | dict(q_lora_rank=20, first_k_dense_replace=1, n_shared_experts=2),
    ),
    "deepseek_v3_no_q_lora": (
        transformers.DeepseekV3Config,
        SIGMOID
        | MLA
        | dict(q_lora_rank=None, first_k_dense_replace=0, n_group=1, num_nextn_predict_layers=0),
    ),
}


def make_model(family: str, **changes: object) -> transformers.PreTrainedModel:
    config_class, own = FAMILIES[family]
    config = config_class(**{**SIZES, **own, **changes})
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).float()
    generator = torch.Generator().manual_seed(0)
    biases = [item for item in model.named_buffers() if item[0].endswith("e_score_correction_bias")]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *biases]:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    return model.eval()


def save_model(
    directory: Path,
    family: str,
    *,
    max_shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    **changes: object,
) -> Path:
    """A checkpoint as transformers writes it; in any `dtype` the bias of the experts'
    scores is float32."""
    model = make_model(family, **changes)
    biases = {
        n: b.clone() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")
    }
    model.to(dtype)
    for name, bias in biases.items():
        model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = bias
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def add_mtp(directory: Path, *, repeats: bool = True) -> Path:
    """Adds the multi-token prediction layer that published checkpoints hold and
    transformers leaves out.

    It is a decoder layer like the last one, numbered after it, with two norms, a
    projection and a final norm; `repeats`: and the embedding and the output layer once
    more.
    """
    config = json.loads((directory / "config.json").read_text())
    last, new = (f"model.layers.{config['num_hidden_layers'] + i}." for i in (-1, 0))
    files = sorted(directory.glob("*.safetensors"))
    content = {name: tensor for file in files for name, tensor in load_file(file).items()}
    generator = torch.Generator().manual_seed(1)
    norm = content["model.norm.weight"]
    h = len(norm)

    def random(tensor: torch.Tensor) -> torch.Tensor:
        noise = 0.15 * torch.randn(tensor.shape, generator=generator)
        return (noise + (tensor.dim() == 1)).to(tensor.dtype)

    added = {
        new + n.removeprefix(last): random(t) for n, t in content.items() if n.startswith(last)
    }
    added |= {
        new + name + ".weight": random(norm) for name in ("enorm", "hnorm", "shared_head.norm")
    }
    added[new + "eh_proj.weight"] = random(norm.new_empty(h, 2 * h))
    if repeats:
        added[new + "embed_tokens.weight"] = content["model.embed_tokens.weight"].clone()
        added[new + "shared_head.head.weight"] = content["lm_head.weight"].clone()
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        save_file(content | added, files[0], {"format": "pt"})
        return directory
    save_file(added, directory / "model-mtp.safetensors", {"format": "pt"})
    values = json.loads(index.read_text())
    values["weight_map"] |= dict.fromkeys(added, "model-mtp.safetensors")
    values["metadata"]["total_size"] += sum(t.nbytes for t in added.values())
    index.write_text(json.dumps(values))
    return directory
