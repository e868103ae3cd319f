"""Norm and attention of Megatron's local layer spec, in plain PyTorch.

They serve where there is no Transformer Engine: megatron-core's own local norm refuses
sequence parallelism, and its local attention packed sequences. LatentAttention also
serves where there is Transformer Engine.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
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

from nanoslime.training.flash_attention import Pack, attend, attend_each
from nanoslime.training.megatron.packed_sequences import PackedRotaryEmbedding, PackedSequences


class RMSNorm(torch.nn.Module):
    """Root mean square norm, computed in float32.

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
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


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
        packed_seq_params: PackedSequences,
        **__: Any,
    ) -> Tensor:
        """query [T, heads, d], key [T, groups, d], value [T, groups, v] -> [T, 1, heads * v].

        T is this context-parallel rank's part of the pack; a dimension of 1 may follow it.
        """
        cp_shard = packed_seq_params.cp_shard
        query = query.flatten(0, -3)
        key = cp_shard.gather_padded(key.flatten(0, -3))
        value = cp_shard.gather_padded(value.flatten(0, -3))
        if self._cp_group.size() == 1:
            pack = Pack(cp_shard.padded_lengths, packed_seq_params.cu_seqlens_q)
            attended = attend(query, key, value, pack, scale=self.scale)
        else:
            lengths = (cp_shard.local_lengths, cp_shard.padded_lengths)
            attended = attend_each(query, key, value, lengths, self._mask, scale=self.scale)
        return attended.flatten(1)[:, None]

    def _mask(self, key: Tensor) -> Tensor:
        """bool [T_i / cp_size, T_i]: what the queries of this rank see of a sequence's `key` [T_i].

        The queries are those of chunks r and 2 cp_size - 1 - r; see context_parallel.
        """
        cp_size = self._cp_group.size()
        rank = self._cp_group.rank()
        positions = torch.arange(len(key), device=key.device)
        chunks = positions.view(2 * cp_size, -1)
        own_chunks = torch.cat([chunks[rank], chunks[-1 - rank]])
        return positions <= own_chunks[:, None]


class LatentAttention(MLASelfAttention):
    """Latent attention with the norms and projections of its spec.

    Queries without a low rank (q_lora_rank=None) have no norm, keys and values have
    one. megatron-core 0.19.2 knows one switch for both and would put a norm before the
    projection of the queries.
    """

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        if packed_seq_params is not None:
            packed_seq_params = replace(packed_seq_params, qkv_format="sbhd")
        return super().get_query_key_value_tensors(
            hidden_states, key_value_states, position_ids, packed_seq_params, **options
        )

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_q_up_proj": submodules.linear_q_up_proj,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": submodules.q_layernorm,
            "kv_layernorm": submodules.kv_layernorm,
        }


def use_packed_rotary_embedding(gpt: GPTModel, *, local_spec: bool) -> None:
    """Replaces megatron-core's rotary embedding where it would ask the device for lengths.

    Transformer Engine has a kernel for it, but not for latent attention.
    """
    if local_spec and hasattr(gpt, "rotary_pos_emb"):
        # It is added to [T, 1, heads, d].
        gpt.rotary_pos_emb = PackedRotaryEmbedding(gpt.rotary_pos_emb, num_dims=4)
    for module in gpt.modules():
        if isinstance(module, LatentAttention):
            # Latent attention drops the dimension of the batch from packs: [T, heads, d].
            module.rotary_pos_emb = PackedRotaryEmbedding(module.rotary_pos_emb, num_dims=3)


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
