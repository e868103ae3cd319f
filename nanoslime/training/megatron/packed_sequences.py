"""A pack of sequences as the arguments of GPTModel, and the rotary embedding of its tokens.

Transformer Engine takes packs in the format thd: it knows from cu_seqlens where a
sequence begins. megatron-core's own rotary embedding for this format asks the device for
the lengths in every layer and works through the sequences one by one. So the local layer
spec gets a pack as one long sequence instead (sbhd, [T, 1, heads, d]), with the angles
of each token's place within its own sequence, and only attention (local_layers) parts
the sequences.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nanoslime.training.megatron.context_parallel import ContextParallelShard


@dataclass
class PackedSequences(PackedSeqParams):
    """megatron-core's description of a pack, and which part of it is on this rank."""

    cp_shard: ContextParallelShard | None = None


def packed_inputs(
    token_ids: Tensor, cp_shard: ContextParallelShard, *, local_spec: bool
) -> dict[str, Any]:
    """GPTModel's arguments for this rank's `token_ids` [P / cp_size] of a pack."""
    longest = max(cp_shard.padded_lengths)
    packed = PackedSequences(
        qkv_format="sbhd" if local_spec else "thd",
        cu_seqlens_q=cp_shard.padded_cu_seqlens,
        cu_seqlens_kv=cp_shard.padded_cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        cp_shard=cp_shard,
    )
    return {
        "input_ids": token_ids[None],
        "position_ids": cp_shard.positions[None],
        "attention_mask": None,
        "packed_seq_params": packed,
    }


class PackedRotaryEmbedding(torch.nn.Module):
    """Angles [T, 1, (1,) d] of the tokens of a pack, each by its place in its own sequence.

    It has megatron-core's two calls. The first one returns what the second one gets:
    there the length of the longest sequence, here the places.
    """

    def __init__(self, built: RotaryEmbedding, *, num_dims: int) -> None:
        super().__init__()
        self._interleaved = built.rotary_interleaved
        self._inv_freq = built.inv_freq
        self._num_dims = num_dims

    def get_rotary_seq_len(self, *arguments: Any) -> Tensor:
        packed: PackedSequences = arguments[-1]
        return packed.cp_shard.positions

    def forward(self, positions: Tensor, **_: Any) -> Tensor:
        inv_freq = self._inv_freq.to(positions.device)
        angles = torch.outer(positions.to(inv_freq.dtype), inv_freq)
        if self._interleaved:
            angles = angles.repeat_interleave(2, dim=-1)
        else:
            angles = torch.cat([angles, angles], dim=-1)
        ones = [1] * (self._num_dims - 2)
        return angles.view(len(positions), *ones, -1)
