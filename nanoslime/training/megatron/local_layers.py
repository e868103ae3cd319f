"""Norm and attention of Megatron's local layer spec in plain PyTorch, where there is no Transformer Engine.

megatron-core's own local ones refuse sequence parallelism (norm) and packed sequences (attention).
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from nanoslime.training.megatron import context_parallel


class RMSNorm(torch.nn.Module):
    """Root mean square norm in float32, as transformers computes it.

    With `sequence_parallel` on the weight, finalize_model_grads sums its gradient over tensor parallelism.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class PackedAttention(MegatronModule):
    """Causal attention within each sequence of a pack, by scaled_dot_product_attention; no dropout.

    Under context parallelism every rank gathers the keys and values of the whole pack, layer by layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *_: Any,
        pg_collection: ProcessGroupCollection,
        **options: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = options.get("softmax_scale") or config.kv_channels**-0.5
        self._cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        packed_seq_params: PackedSeqParams,
        **__: Any,
    ) -> Tensor:
        """query [T, heads, d], key [T, groups, d], value [T, groups, v] -> [T, heads * v]."""
        bounds, group = packed_seq_params.cu_seqlens_q, self._cp_group
        key, value = (
            context_parallel.gather(x, bounds, group, sum_gradients=True) for x in (key, value)
        )
        lengths, local = bounds.diff(), bounds.diff() // group.size()
        sizes = zip((query, key, value), (local, lengths, lengths), strict=True)
        parts = zip(*(x.split(n.tolist()) for x, n in sizes), strict=True)
        return torch.cat([self._attend(q, k, v) for q, k, v in parts]).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Of one sequence: the queries of this rank, the keys and values of all."""
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))  # [1, heads, T_i, d]
        gqa, mask, rank = q.shape[1] != k.shape[1], None, self._cp_group.rank()
        if self._cp_group.size() > 1:
            places = torch.arange(len(key), device=key.device)
            mask = places <= places.view(2 * self._cp_group.size(), -1)[[rank, -1 - rank]].view(
                -1, 1
            )
        options = {"is_causal": mask is None, "scale": self.scale, "enable_gqa": gqa}
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)[0].transpose(0, 1)


def local_block_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of a virtual one, and the norm after the last."""
    pattern = (
        config.moe_layer_freq
        if isinstance(config.moe_layer_freq, list)
        else [1] * config.num_layers
    )
    kinds = [_layer_spec(config, None), _layer_spec(config, config.num_moe_experts)]
    first = get_transformer_layer_offset(config, vp_stage)
    here = pattern[first : first + get_num_layers_to_build(config, vp_stage)]
    return TransformerBlockSubmodules(
        layer_specs=[kinds[kind] for kind in here], layer_norm=RMSNorm
    )


def _layer_spec(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    """One layer. In torch_dist files its norms have the names that Transformer Engine's modules give them."""
    latent = config.multi_latent_attention
    kind = dict(
        qk_layernorm=config.qk_layernorm, multi_latent_attention=latent, normalization="RMSNorm"
    )
    layer = get_gpt_layer_local_spec(num_experts, **kind)
    modules, attention = layer.submodules, layer.submodules.self_attention.submodules
    modules.input_layernorm = modules.pre_mlp_layernorm = RMSNorm
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = attention.kv_layernorm = RMSNorm
    fused = {"input_layernorm.": "self_attention.linear_qkv."}
    if latent:
        fused = {
            f"self_attention.{x}_layernorm.": f"self_attention.linear_{x}_up_proj."
            for x in ("q", "kv")
        }
        attention.linear_q_down_proj = attention.linear_kv_down_proj = (
            Linear  # whole on every rank, as there
        )
    if num_experts is None:
        fused["pre_mlp_layernorm."] = "mlp.linear_fc1."
    modules.sharded_state_dict_keys_map = {
        norm: into + "layer_norm_" for norm, into in fused.items()
    }
    return layer
