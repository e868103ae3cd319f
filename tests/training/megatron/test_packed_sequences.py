"""Packs in GPTModel's local spec: what it computes from them, and what it asks the device."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig

from nanoslime.models.shape import ModelShape
from nanoslime.training.megatron import cpu_compat
from nanoslime.training.megatron.context_parallel import ContextParallelShard
from nanoslime.training.megatron.model import gpt_model, model_config
from nanoslime.training.megatron.packed_sequences import (
    PackedRotaryEmbedding,
    PackedSequences,
    packed_inputs,
)
from tests.models.hf import save_model
from tests.training.megatron.gpt import Grid
from tests.training.megatron.test_architectures import changes

pytestmark = pytest.mark.megatron

LENGTHS = [5, 7, 1]
CPU = torch.device("cpu")
META = torch.device("meta")


def forward_and_backward(env, model_dir):
    """The dense GPTModel on a device without values: what asks for one raises."""
    Grid().start()
    shape = ModelShape.read(model_dir)
    gpt = gpt_model(shape, model_config(shape, torch.float32, CPU), CPU, first=True, last=True)
    gpt.to(META)
    cp_shard = ContextParallelShard(LENGTHS, parallel_state.get_context_parallel_group(), 1, META)
    token_ids = cp_shard.local(torch.empty(sum(LENGTHS), dtype=torch.long, device=META))
    logits = gpt(**packed_inputs(token_ids, cp_shard, local_spec=True))
    logits.sum().backward()
    return list(logits.shape), all(p.grad is not None for p in gpt.parameters())


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_a_dense_model_computes_a_pack_without_a_look_at_the_device(family, one_rank, tmp_path):
    sizes = changes(family)
    if family == "deepseek_v3":
        sizes["first_k_dense_replace"] = 9
    model_dir = save_model(tmp_path / family, family, **sizes)
    [(logits_shape, all_have_gradients)] = one_rank(forward_and_backward, model_dir)
    assert logits_shape[:2] == [1, sum(LENGTHS)]
    assert all_have_gradients


def rotated(env, interleaved):
    """Queries [T, 1, 2, 8] turned by our angles, and by megatron-core's own way for packs."""
    cpu_compat.install()
    Grid().start()
    settings = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, rotary_interleaved=interleaved
    )
    cp_group = parallel_state.get_context_parallel_group()
    cp_shard = ContextParallelShard(LENGTHS, cp_group, 1, CPU)
    built = RotaryEmbedding(8, 0.5, rotary_interleaved=interleaved, use_cpu_initialization=True)
    ours = PackedRotaryEmbedding(built, num_dims=4)
    positions = ours.get_rotary_seq_len(None, PackedSequences(cp_shard=cp_shard))
    query = torch.randn(sum(LENGTHS), 1, 2, 8)
    turned = apply_rotary_pos_emb(query, ours(positions), settings, cp_group=cp_group)
    by_sequence = apply_rotary_pos_emb(
        query[:, 0],
        built(max(LENGTHS), packed_seq=True),
        settings,
        cu_seqlens=cp_shard.padded_cu_seqlens,
        cp_group=cp_group,
    )
    return torch.equal(turned[:, 0], by_sequence), torch.equal(turned, query)


@pytest.mark.parametrize("interleaved", [False, True])
def test_tokens_are_turned_as_megatron_turns_each_sequence_by_itself(interleaved, one_rank):
    assert one_rank(rotated, interleaved) == [(True, False)]
