"""The architectures: sizes read from config.json, and how their tensors lie in Megatron. Torch-free.

One file per architecture and one line here: the `model_type` of config.json -> an `Architecture` of shape.py.
"""

ARCHITECTURES = {
    "llama": "nanoslime.models.llama:LLAMA",
    "qwen2": "nanoslime.models.qwen2:QWEN2",
    "qwen3": "nanoslime.models.qwen3:QWEN3",
}
