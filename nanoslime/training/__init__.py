"""From samples to a gradient step: batching, logprobs, and the backends behind one
protocol.
"""

BACKENDS = {
    "megatron": "nanoslime.training.megatron.backend:MegatronBackend",
    "fsdp": "nanoslime.training.fsdp:FSDPBackend",
}
