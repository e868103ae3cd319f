"""The architectures: sizes read from config.json, and their tensors' place in Megatron.

One file per family and one line here: the `model_type` of config.json -> an
`Architecture` of shape.py. Torch-free.
"""

ARCHITECTURES = {
    "deepseek_v3": "nanoslime.models.deepseek:DEEPSEEK_V3",
    "glm4": "nanoslime.models.glm4:GLM4",
    "glm4_moe": "nanoslime.models.glm4:GLM4_MOE",
    "llama": "nanoslime.models.llama:LLAMA",
    "mistral": "nanoslime.models.llama:LLAMA",
    "mixtral": "nanoslime.models.mixtral:MIXTRAL",
    "qwen2": "nanoslime.models.qwen2:QWEN2",
    "qwen2_moe": "nanoslime.models.qwen2:QWEN2_MOE",
    "qwen3": "nanoslime.models.qwen3:QWEN3",
    "qwen3_moe": "nanoslime.models.qwen3:QWEN3_MOE",
}
