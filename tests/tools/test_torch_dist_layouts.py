"""The boxes in which torch_dist is written, and the layouts of trainers, read; torch is the judge.

What the real megatron-core makes of them is for test_megatron_core.py.
"""

import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nanoslime.models.rules import ModelPartition, padded_vocab_size, pieces
from nanoslime.models.shape import ModelShape
from tests.models.hf import save_model
from tests.tools.checkpoints import (
    Box,
    Tensors,
    contents,
    cut,
    load,
    load_stock,
    make,
    same_bits,
    save_stock,
    to_huggingface,
    to_megatron,
)
from tools.conversion import keys, torch_dist, torch_pickle

WIDE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=8,
    vocab_size=1000,
)
SPARSE = dict(moe_intermediate_size=16, shared_expert_intermediate_size=64)


def megatron_tensors(directory: Path) -> Tensors:
    """Megatron's tensors, unpadded and experts one by one, put together by hand from query, key, gate ..."""
    hf, shape = load(directory), ModelShape.read(directory)
    groups, found = shape.num_key_value_heads, {}
    found["embedding.word_embeddings.weight"] = hf["model.embed_tokens.weight"]
    found["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
    if not shape.tie_word_embeddings:
        found["output_layer.weight"] = hf["lm_head.weight"]
    for layer in range(shape.num_layers):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias") if shape.qkv_bias else ("weight",):
            parts = [hf[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            by_group = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
            found[f"{new}self_attention.linear_qkv.{kind}"] = torch.cat(by_group, 1).flatten(0, 1)
        found[new + "self_attention.linear_proj.weight"] = hf[old + "self_attn.o_proj.weight"]
        found[new + "self_attention.linear_qkv.layer_norm_weight"] = hf[
            old + "input_layernorm.weight"
        ]
        if shape.qk_norm:
            for x in "qk":
                found[f"{new}self_attention.{x}_layernorm.weight"] = hf[
                    f"{old}self_attn.{x}_norm.weight"
                ]
        norm = hf[old + "post_attention_layernorm.weight"]
        found[
            new + ("pre_mlp_layernorm.weight" if shape.moe else "mlp.linear_fc1.layer_norm_weight")
        ] = norm
        mlps = {"mlp.": "mlp."}
        if shape.moe:
            found[new + "mlp.router.weight"] = hf[old + "mlp.gate.weight"]
            mlps = {
                f"mlp.experts.experts.{e}.": f"mlp.experts.{e}."
                for e in range(shape.moe.num_experts)
            }
        for megatron, name in mlps.items():
            gate, up, down = (hf[f"{old}{name}{x}_proj.weight"] for x in ("gate", "up", "down"))
            found[f"{new}{megatron}linear_fc1.weight"] = torch.cat([gate, up])
            found[f"{new}{megatron}linear_fc2.weight"] = down
    return found


def by_key(tensors: Tensors) -> Tensors:
    """In layout B: the experts of a layer as one tensor."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found.setdefault(keys.key_of(name)[0], []).append(tensor)
    return {k: torch.stack(v) if ".experts.experts." in k else v[0] for k, v in found.items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_torch_reads_what_is_written_bit_for_bit(tmp_path, family):
    source = make(tmp_path / "hf", family, bf16=True)
    assert to_megatron(source, tmp_path / "megatron") == 0
    stored = load_stock(tmp_path / "megatron/release")
    expected = by_key(megatron_tensors(source))
    assert expected.keys() <= stored.keys()
    assert [key for key, tensor in expected.items() if not same_bits(stored[key], tensor)] == []
    others = {
        p.other: keys.key_of(p.megatron)[0]
        for p in pieces(ModelShape.read(source))
        if p.other != p.megatron
    }
    assert stored.keys() == expected.keys() | others.keys()
    assert all(same_bits(stored[other], stored[key]) for other, key in others.items())
    metadata = pickle.loads((tmp_path / "megatron/release/.metadata").read_bytes())
    stubs = {
        k
        for k, entry in metadata.state_dict_metadata.items()
        if type(entry).__name__.startswith("Bytes")
    }
    layer = "decoder.layers.1.self_attention.core_attention._extra_state/shard_0_1"
    experts = "decoder.layers.1.mlp.experts.experts.linear_fc1._extra_state/shard_3_4"
    dense = "decoder.layers.1.mlp.linear_fc1._extra_state/shard_0_1"
    assert layer in stubs and ((experts if family == "qwen3_moe" else dense) in stubs)
    for index, place in metadata.storage_data.items():
        if index.fqn in stubs:
            with open(tmp_path / "megatron/release" / place.relative_path, "rb") as file:
                file.seek(place.offset)
                assert file.read(place.length) == torch_pickle.OBJECT_STUB


@pytest.mark.parametrize("tp_size", [2, 8])
@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "glm4_moe", "deepseek_v3", "glm4"])
def test_a_rank_finds_its_rows_in_chunks_of_its_own(tmp_path, family, tp_size):
    """The chunks that a rank needs hold what it needs only, for what tensor parallelism splits by rows."""
    sizes = WIDE | (SPARSE if family == "qwen2_moe" else {})
    if family == "deepseek_v3":
        sizes = {
            k: v for k, v in sizes.items() if k not in ("head_dim", "num_key_value_heads")
        } | dict(num_key_value_heads=16, q_lora_rank=64, kv_lora_rank=64)
    source = save_model(tmp_path / "hf", family, **sizes)
    assert to_megatron(source, tmp_path / "megatron") == 0
    stored, _ = torch_dist.read(tmp_path / "megatron/release")
    shape, checked = ModelShape.read(source), set()
    rows_of: dict[
        tuple[str, str], np.ndarray
    ] = {}  # Hugging Face row -> row of the whole Megatron tensor
    for piece in pieces(shape):
        rows = rows_of.setdefault((piece.megatron, piece.hf), np.zeros(piece.full_shape[0], int))
        rows[piece.box[0]] = np.arange(piece.local[0].start, piece.local[0].stop)
    for rank in range(tp_size):
        own: dict[str, set[int]] = {}
        for piece in pieces(shape, ModelPartition(rank, tp_size)):
            if (
                piece.rule.tp_dim == 0
                and not piece.rule.num_experts
                and piece.rule.layout != "vocab"
            ):
                own.setdefault(piece.megatron, set()).update(
                    rows_of[piece.megatron, piece.hf][piece.box[0]].tolist()
                )
        for name, rows in own.items():
            if math.prod(stored[name].shape) < 1 << 12:
                continue  # too small to be cut
            chunks = [range(c.start[0], c.start[0] + c.shape[0]) for c in stored[name].chunks]
            read = {row for chunk in chunks if rows & set(chunk) for row in chunk}
            assert read == rows, (name, rank)
            checked.add(name.partition("layers.1.")[2])
    checked.discard("")
    assert (
        checked
        >= {
            "llama": {"self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"},
            "qwen2_moe": {"self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"},
            "glm4_moe": {"self_attention.linear_qkv.weight"},
            "glm4": {"self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"},
            "deepseek_v3": {
                "self_attention.linear_q_up_proj.weight",
                "self_attention.linear_kv_up_proj.weight",
            },
        }[family]
    )
    for key, tensor in stored.items():
        if ".experts.experts." in key:
            halves = 2 if "linear_fc1" in key else 1
            expected = [(e, 1) for e in range(shape.moe.num_experts) for _ in range(halves)]
            assert [(c.start[0], c.shape[0]) for c in tensor.chunks] == expected
    vocab = stored["embedding.word_embeddings.weight"]
    assert len(vocab.chunks) == 8 and {c.shape[0] for c in vocab.chunks} == {125}


def test_query_groups_stay_whole(tmp_path):
    source = save_model(tmp_path / "hf", "llama", **WIDE | dict(num_key_value_heads=4))
    assert to_megatron(source, tmp_path / "megatron") == 0
    stored, _ = torch_dist.read(tmp_path / "megatron/release")
    chunks = stored["decoder.layers.0.self_attention.linear_qkv.weight"].chunks
    assert [chunk.shape[0] for chunk in chunks] == [(16 // 4 + 2) * 8] * 4


@pytest.mark.parametrize("vocab_size", [65, 66, 71, 72, 129, 1001])
def test_a_vocabulary_of_any_size_is_cut(tmp_path, vocab_size):
    source = save_model(tmp_path / "hf", "llama", hidden_size=64, vocab_size=vocab_size)
    assert to_megatron(source, tmp_path / "megatron") == 0
    assert to_huggingface(tmp_path / "megatron", tmp_path / "back") == 0
    assert contents(source).items() <= contents(tmp_path / "back").items()
    stored, _ = torch_dist.read(tmp_path / "megatron/release")
    assert len(stored["output_layer.weight"].chunks) > 5


def test_a_vocabulary_smaller_than_the_number_of_chunks(tmp_path):
    source = save_model(
        tmp_path / "hf",
        "llama",
        hidden_size=1024,
        intermediate_size=8,
        num_hidden_layers=1,
        vocab_size=10,
    )
    assert to_megatron(source, tmp_path / "megatron") == 0
    assert to_huggingface(tmp_path / "megatron", tmp_path / "back") == 0
    assert contents(source).items() <= contents(tmp_path / "back").items()


def trained(directory: Path, layout: str) -> dict[str, object]:
    """What a trainer keeps: weights with a padded vocabulary, and beside them what is no weight."""
    shape, tensors = ModelShape.read(directory), megatron_tensors(directory)
    rows = padded_vocab_size(shape, 2)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in tensors:
            padding = torch.full((rows - shape.vocab_size, shape.hidden_size), 7.0)
            tensors[name] = torch.cat([tensors[name], padding.to(tensors[name].dtype)])
    if layout == "C":
        state = {}
        for name, tensor in tensors.items():
            if name.endswith("linear_fc1.weight"):
                state |= zip((name + "_w", name + "_v"), tensor.chunk(2), strict=True)
            else:
                state[name] = tensor
    else:
        state = by_key(tensors)
    if layout == "A":
        stacked: dict[str, list[torch.Tensor]] = {}
        for key in [key for key in state if ".layers." in key]:
            stacked.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.", key), []).append(
                state.pop(key)
            )
        state |= {key: torch.stack(parts) for key, parts in stacked.items()}
    weights = {
        f"optimizer.state.exp_avg.{key}": torch.zeros_like(tensor) for key, tensor in state.items()
    }
    beside = {
        "chained_0.optimizer.state.exp_avg_sq.decoder.layers.0.mlp.linear_fc1.weight": torch.zeros(
            8
        ),
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_0.bucket_idx_0.param": torch.zeros(
            5
        ),
        "rng_state/shard_0_1": {"seed": 1},
        "rerun_state_machine_state/shard_0_1": [1],
        "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1": None,
    }
    return state | weights | beside


def tp_boxes(key: str, tensor: torch.Tensor) -> list[Box]:
    """As two tensor-parallel ranks write: by rows, each half of gate and up for itself, or by columns."""
    stacked = ".layers.mlp" in key or ".layers.self_attention" in key or ".layers.pre_mlp" in key
    experts = re.search(r"\.experts\.experts\.linear", key) is not None
    outer = [tensor.shape[0]] * stacked + [tensor.shape[stacked]] * experts
    if key.endswith("linear_fc1.weight"):
        return cut(tensor.shape, *outer, 4)
    if (
        key.endswith(("weight_w", "weight_v", "linear_qkv.weight", "linear_qkv.bias"))
        or "embedding" in key
    ):
        return cut(tensor.shape, *outer, 2)
    if key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return cut(tensor.shape, *outer, 1, 2)
    return cut(tensor.shape, *outer)


@pytest.mark.parametrize("layout", "AB")
def test_layers_and_experts_may_share_a_chunk(tmp_path, layout):
    source = make(tmp_path / "hf", "qwen3_moe")
    save_stock(tmp_path / "trained", trained(source, layout))
    assert to_huggingface(tmp_path / "trained", tmp_path / "back", "--hf-checkpoint", source) == 0
    assert contents(source).items() <= contents(tmp_path / "back").items()


@pytest.mark.parametrize("layout", "ABC")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_what_trainers_write_converts_to_the_original_files(tmp_path, family, layout):
    source = make(tmp_path / "hf", family, bf16=True, shards=True)
    state = trained(source, layout)
    assert keys.layout(
        k for k, v in state.items() if isinstance(v, torch.Tensor) and keys.is_weight(k)
    ).startswith(layout)
    directory = tmp_path / "run" / "iter_0000042"
    save_stock(directory, state, tp_boxes)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("42")
    columns = torch_dist.read(directory)[0]
    assert any(
        len({c.start[-1] for c in t.chunks}) == 2 for t in columns.values() if len(t.shape) > 1
    )
    for number, place in enumerate((tmp_path / "run", directory)):
        assert to_huggingface(place, tmp_path / f"back{number}", "--hf-checkpoint", source) == 0
        back = contents(tmp_path / f"back{number}")
        del back["manifest.json"]
        assert back == contents(source)


@pytest.mark.parametrize("layout", "ABC")
def test_one_swapped_row_is_seen(tmp_path, layout):
    source = make(tmp_path / "hf", "qwen2")
    state = trained(source, layout)
    key = next(key for key in state if key.endswith("linear_qkv.weight"))
    tensor = state[key].flatten(0, -2)
    tensor[[0, 1]] = tensor[[1, 0]]
    save_stock(tmp_path / "trained", state, tp_boxes)
    assert to_huggingface(tmp_path / "trained", tmp_path / "back", "--hf-checkpoint", source) == 0
    old, new = load(source), load(tmp_path / "back")
    assert [name for name in old if not same_bits(old[name], new[name])] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]


def test_many_chunks_lie_in_one_file(tmp_path):
    source = make(tmp_path / "hf", "qwen3_moe")
    assert to_megatron(source, tmp_path / "megatron") == 0
    assert [p.name for p in (tmp_path / "megatron/release").glob("*.distcp")] == ["__0_0.distcp"]
