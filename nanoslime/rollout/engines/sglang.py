"""The kind `sglang`: its options, and what it can serve. Its server is in
sglang_server.py."""

from typing import Any

from nanoslime.config import RolloutConfig, RunConfig, upstream
from nanoslime.config.rollout import TOKEN_LIMITS
from nanoslime.engine_kind import EngineKind
from nanoslime.models.parallel_sizes import divisors, one_of
from nanoslime.models.shape import ModelShape
from nanoslime.types import RunError

# About what SGLang chooses by itself, which depends on the GPU.
_MEM_FRACTION = 0.85
# A sleeping trainer keeps its CUDA context, NCCL's buffers and fragments on the GPU.
COLOCATED_MEM_FRACTION = 0.7

# What options count.
_COUNTS = dict.fromkeys(TOKEN_LIMITS, "tokens") | {
    "max_running_requests": "requests",
    "max_queued_requests": "requests",
    "max_prefill_tokens": "tokens",
    "chunked_prefill_size": "tokens",
    "page_size": "tokens",
}
# Of which -1 stands for none.
_OFF = ("chunked_prefill_size",)


class SGLang(EngineKind):
    name = "sglang"
    title = "SGLang"
    takes_slots = True
    transports = ("tensor", "broadcast", "disk")
    owner = "nanoslime.rollout.engines.sglang_server:SGLangServer"

    def check_options(self, rollout: RolloutConfig) -> None:
        """Raises RunError for a name in rollout.sglang that SGLang lacks or nanoslime sets,
        and for values of which the plan makes use and that cannot be."""
        upstream.check("sglang", "rollout.sglang", rollout.sglang)
        for name, value in rollout.sglang.items():
            if value is None:
                continue
            if name == "mem_fraction_static" and not _is_share(value):
                raise RunError(
                    f"rollout.sglang.{name}={value!r} is no share of a GPU's memory; "
                    "set a number between 0 and 1, or leave it out"
                )
            is_count = type(value) is int and (value > 0 or name in _OFF and value == -1)
            if name in _COUNTS and not is_count:
                raise RunError(
                    f"rollout.sglang.{name}={value!r} is no number of "
                    f"{_COUNTS[name]}; set 1 or more, or leave it out"
                )

    def check_plan(self, rollout: RolloutConfig, shape: ModelShape, slots_per_node: int) -> None:
        _check_layers_with_experts(shape)
        _check_tp_size(rollout.engine_tp_size, shape, slots_per_node)

    def memory_fraction(self, config: RunConfig) -> float:
        asked = config.rollout.sglang.get("mem_fraction_static")
        if asked is not None:
            return float(asked)
        return COLOCATED_MEM_FRACTION if config.cluster.colocate else _MEM_FRACTION


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1


def _check_layers_with_experts(shape: ModelShape) -> None:
    """SGLang 0.5.23 takes every layer of these models for one with experts."""
    num_sparse = len(shape.moe_layers)
    if shape.model_type in ("qwen2_moe", "qwen3_moe") and num_sparse < shape.num_layers:
        raise RunError(
            "rollout.engine=sglang: SGLang 0.5.23 has experts in all layers of a "
            f"{shape.model_type}, this one in {num_sparse}; use --engine embedded"
        )


def _check_tp_size(tp_size: int, shape: ModelShape, slots_per_node: int) -> None:
    """SGLang cuts the attention heads evenly; it may copy key-value heads to several ranks."""
    num_heads = shape.num_attention_heads
    num_kv_heads = shape.num_key_value_heads
    fitting = [
        size
        for size in divisors(num_heads)
        if size <= slots_per_node and (num_kv_heads % size == 0 or size % num_kv_heads == 0)
    ]
    if tp_size > slots_per_node:
        raise RunError(
            f"rollout.engine_tp_size={tp_size} exceeds the {slots_per_node} slots of a node; "
            f"choose {one_of(fitting)}"
        )
    if tp_size not in fitting:
        raise RunError(
            f"rollout.engine_tp_size={tp_size} does not fit num_attention_heads={num_heads} and "
            f"num_key_value_heads={num_kv_heads}; choose {one_of(fitting)}"
        )
