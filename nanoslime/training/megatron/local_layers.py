"""Norm and attention of Megatron's local layer spec, in plain PyTorch.

They serve where there is no Transformer Engine: megatron-core's own local norm refuses
sequence parallelism, and its local attention packed sequences. LatentAttention also
serves where there is Transformer Engine.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
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

    With `sequence_parallel` on the weight, finalize_model_grads sums its gradient over
    tensor parallelism.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(ones)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class PackedAttention(MegatronModule):
    """Causal attention within each sequence of a pack, without dropout.

    Under context parallelism every rank gathers the keys and values of the whole pack,
    layer by layer.
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
        cu_seqlens = packed_seq_params.cu_seqlens_q
        key = context_parallel.gather(key, cu_seqlens, self._cp_group, sum_gradients=True)
        value = context_parallel.gather(value, cu_seqlens, self._cp_group, sum_gradients=True)
        lengths = cu_seqlens.diff()
        local_lengths = lengths // self._cp_group.size()
        queries = query.split(local_lengths.tolist())
        keys = key.split(lengths.tolist())
        values = value.split(lengths.tolist())
        attended = [self._attend(q, k, v) for q, k, v in zip(queries, keys, values, strict=True)]
        return torch.cat(attended).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One sequence: the queries of this rank see the keys and values of all ranks.

        query [T_i / cp_size, heads, d], key [T_i, groups, d], value [T_i, groups, v]
        -> [T_i / cp_size, heads, v].
        """
        cp_size = self._cp_group.size()
        mask = None
        if cp_size > 1:
            # The queries of this rank are chunks r and 2 cp_size - 1 - r; see
            # context_parallel.
            rank = self._cp_group.rank()
            positions = torch.arange(len(key), device=key.device)
            chunks = positions.view(2 * cp_size, -1)
            query_positions = chunks[[rank, -1 - rank]].view(-1, 1)
            mask = positions <= query_positions
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],  # [1, heads, T_i, d]
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended[0].transpose(0, 1)


class LatentAttention(MLASelfAttention):
    """Latent attention with the norms and projections of its spec.

    Queries without a low rank (q_lora_rank=None) have no norm, keys and values have
    one. megatron-core 0.19.2 knows one switch for both and would put a norm before the
    projection of the queries.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_q_up_proj": submodules.linear_q_up_proj,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": submodules.q_layernorm,
            "kv_layernorm": submodules.kv_layernorm,
        }


def use_latent_attention(spec: TransformerBlockSubmodules) -> None:
    """Puts LatentAttention into the place of megatron-core's class in the layers of `spec`."""
    for layer in spec.layer_specs:
        attention = layer.submodules.self_attention
        if attention.module is MLASelfAttention:
            attention.module = LatentAttention


def local_block_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of a virtual one, and the norm after the last."""
    first = get_transformer_layer_offset(config, vp_stage)
    num_layers = get_num_layers_to_build(config, vp_stage)
    dense_layer = _layer_spec(config, None)
    expert_layer = _layer_spec(config, config.num_moe_experts)
    layer_specs = []
    for layer in range(first, first + num_layers):
        layer_specs.append(expert_layer if _has_experts(config, layer) else dense_layer)
    spec = TransformerBlockSubmodules(layer_specs=layer_specs, layer_norm=RMSNorm)
    use_latent_attention(spec)
    return spec


def _has_experts(config: TransformerConfig, layer: int) -> bool:
    if config.num_moe_experts is None:
        return False
    if isinstance(config.moe_layer_freq, list):
        return bool(config.moe_layer_freq[layer])
    return True


def _layer_spec(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    """One layer.

    In torch_dist files its norms have the names that Transformer Engine's modules give
    them.
    """
    layer = get_gpt_layer_local_spec(
        num_experts,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization="RMSNorm",
    )
    modules = layer.submodules
    modules.input_layernorm = RMSNorm
    modules.pre_mlp_layernorm = RMSNorm
    attention = modules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.multi_latent_attention:
        # megatron-core 0.19.2 imports this layer only beside Transformer Engine, although
        # it needs nothing of it, and latent attention takes no other layer that is whole
        # on every rank. Transformer Engine's spec keeps these whole too.
        multi_latent_attention.Linear = Linear
        attention.linear_q_down_proj = Linear
        attention.linear_kv_down_proj = Linear
        attention.kv_layernorm = RMSNorm
        attention.q_layernorm = RMSNorm if config.q_lora_rank is not None else IdentityOp
        saved_as = {
            "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
            "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        }
    else:
        if config.qk_layernorm:
            attention.q_layernorm = RMSNorm
            attention.k_layernorm = RMSNorm
        saved_as = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if num_experts is None:
        saved_as["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    modules.sharded_state_dict_keys_map = saved_as
    return layer
