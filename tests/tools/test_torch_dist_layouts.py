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
    FORMS,
    Extents,
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
    turn_into_old_form,
)
from tools.conversion import keys, torch_dist, torch_pickle
from tools.conversion.checkpoint import LATEST
from tools.conversion.torch_dist import StoredTensor

WIDE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=8,
    vocab_size=1000,
)
# Latent attention has head dimensions of its own and as many key-value heads as heads.
WIDE_LATENT = dict(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=16,
    num_key_value_heads=16,
    vocab_size=1000,
    q_lora_rank=64,
    kv_lora_rank=64,
)
WIDE_SPARSE = WIDE | dict(moe_intermediate_size=16, shared_expert_intermediate_size=64)


def megatron_tensors(directory: Path) -> Tensors:
    """Megatron's tensors, unpadded and experts one by one, put together by hand from the files'."""
    hf = load(directory)
    shape = ModelShape.read(directory)
    found = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    if not shape.tie_word_embeddings:
        found["output_layer.weight"] = hf["lm_head.weight"]
    for layer in range(shape.num_layers):
        own = {}
        for name, tensor in hf.items():
            prefix = f"model.layers.{layer}."
            if name.startswith(prefix):
                own[name.removeprefix(prefix)] = tensor
        for name, tensor in (attention(own, shape) | mlp(own, shape)).items():
            found[f"decoder.layers.{layer}.{name}"] = tensor
    return found


def attention(hf: Tensors, shape: ModelShape) -> Tensors:
    """The attention of one layer; names are relative to the layer."""
    found = {
        "self_attention.linear_proj.weight": hf["self_attn.o_proj.weight"],
        "self_attention.linear_qkv.layer_norm_weight": hf["input_layernorm.weight"],
    }
    for kind in ("weight", "bias") if shape.qkv_bias else ("weight",):
        by_group = []
        for x in "qkv":
            tensor = hf[f"self_attn.{x}_proj.{kind}"]
            by_group.append(tensor.reshape(shape.num_key_value_heads, -1, *tensor.shape[1:]))
        found[f"self_attention.linear_qkv.{kind}"] = torch.cat(by_group, 1).flatten(0, 1)
    if shape.qk_norm:
        for x in "qk":
            norm = hf[f"self_attn.{x}_norm.weight"]
            found[f"self_attention.{x}_layernorm.weight"] = norm
    return found


def mlp(hf: Tensors, shape: ModelShape) -> Tensors:
    """The MLP or the experts of one layer, and the norm before them."""
    norm = hf["post_attention_layernorm.weight"]
    if shape.moe is None:
        found = {"mlp.linear_fc1.layer_norm_weight": norm}
        mlps = {"mlp": "mlp"}
    else:
        found = {"pre_mlp_layernorm.weight": norm, "mlp.router.weight": hf["mlp.gate.weight"]}
        mlps = {}
        for expert in range(shape.moe.num_experts):
            mlps[f"mlp.experts.experts.{expert}"] = f"mlp.experts.{expert}"
    for megatron, name in mlps.items():
        gate = hf[f"{name}.gate_proj.weight"]
        up = hf[f"{name}.up_proj.weight"]
        found[f"{megatron}.linear_fc1.weight"] = torch.cat([gate, up])
        found[f"{megatron}.linear_fc2.weight"] = hf[f"{name}.down_proj.weight"]
    return found


def by_key(tensors: Tensors) -> Tensors:
    """The tensors in layout B: the experts of a layer as one."""
    grouped: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        key, _ = keys.key_of(name)
        grouped.setdefault(key, []).append(tensor)
    found = {}
    for key, group in grouped.items():
        found[key] = torch.stack(group) if ".experts.experts." in key else group[0]
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_torch_reads_what_is_written_bit_for_bit(tmp_path, family):
    source = make(tmp_path / "hf", family, bf16=True)
    assert to_megatron(source, tmp_path / "megatron") == 0
    stored = load_stock(tmp_path / "megatron/release")
    expected = by_key(megatron_tensors(source))
    for key, tensor in expected.items():
        assert same_bits(stored[key], tensor), key
    others = {}
    for piece in pieces(ModelShape.read(source)):
        if piece.local_spec_name != piece.megatron:
            key, _ = keys.key_of(piece.megatron)
            others[piece.local_spec_name] = key
    assert stored.keys() == expected.keys() | others.keys()
    for other, key in others.items():
        assert same_bits(stored[other], stored[key]), other


@pytest.mark.parametrize(
    "family, module, shard",
    [
        ("llama", "mlp.linear_fc1", "shard_0_1"),
        ("qwen2", "mlp.linear_fc1", "shard_0_1"),
        ("qwen3_moe", "mlp.experts.experts.linear_fc1", "shard_3_4"),
    ],
)
def test_every_module_has_an_empty_extra_state(tmp_path, family, module, shard):
    source = make(tmp_path / "hf", family)
    assert to_megatron(source, tmp_path / "megatron") == 0
    release = tmp_path / "megatron/release"
    metadata = pickle.loads((release / ".metadata").read_bytes())
    objects = set()
    for key, entry in metadata.state_dict_metadata.items():
        if type(entry).__name__ == "BytesStorageMetadata" and key != torch_dist.COMMON_KEY:
            objects.add(key)
    assert f"decoder.layers.1.{module}._extra_state/{shard}" in objects
    assert "decoder.layers.1.self_attention.core_attention._extra_state/shard_0_1" in objects
    for index, place in metadata.storage_data.items():
        if index.fqn in objects:
            with open(release / place.relative_path, "rb") as file:
                file.seek(place.offset)
                assert file.read(place.length) == torch_pickle.EMPTY_OBJECT


SPLIT_BY_ROWS = {
    "llama": {"self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"},
    "qwen2_moe": {"self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"},
    "glm4_moe": {"self_attention.linear_qkv.weight"},
    "glm4": {"self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"},
    "deepseek_v3": {
        "self_attention.linear_q_up_proj.weight",
        "self_attention.linear_kv_up_proj.weight",
    },
}


def rows_of_rank(shape: ModelShape, tp_rank: int, tp_size: int) -> dict[str, set[int]]:
    """Rows of the whole Megatron tensors that a rank holds, of what is split by rows alone."""
    row_of: dict[tuple[str, str], np.ndarray] = {}  # Hugging Face row -> Megatron row
    for piece in pieces(shape):
        name = (piece.megatron, piece.hf)
        rows = row_of.setdefault(name, np.zeros(piece.full_shape[0], int))
        rows[piece.box[0]] = np.arange(piece.local[0].start, piece.local[0].stop)
    found: dict[str, set[int]] = {}
    for piece in pieces(shape, ModelPartition(tp_rank, tp_size)):
        rule = piece.rule
        if rule.tp_dim == 0 and not rule.num_experts and rule.layout != "vocab":
            rows = row_of[piece.megatron, piece.hf][piece.box[0]]
            found.setdefault(piece.megatron, set()).update(rows.tolist())
    return found


@pytest.mark.parametrize("family", SPLIT_BY_ROWS)
def test_a_rank_finds_its_rows_in_chunks_of_its_own(tmp_path, family):
    """The chunks that a rank needs hold only what it needs, where rows are split."""
    sizes = {"qwen2_moe": WIDE_SPARSE, "deepseek_v3": WIDE_LATENT}.get(family, WIDE)
    source = save_model(tmp_path / "hf", family, **sizes)
    assert to_megatron(source, tmp_path / "megatron") == 0
    stored = torch_dist.read(tmp_path / "megatron/release").tensors
    shape = ModelShape.read(source)
    for tp_size in (2, 8):
        checked = set()
        for tp_rank in range(tp_size):
            for name, rows in rows_of_rank(shape, tp_rank, tp_size).items():
                if math.prod(stored[name].shape) < 1 << 12:
                    continue  # too small to be cut
                assert rows_read(stored[name], rows) == rows, (name, tp_rank)
                if ".layers.1." in name:
                    checked.add(name.partition("layers.1.")[2])
        assert checked >= SPLIT_BY_ROWS[family]
    for key, tensor in stored.items():
        if ".experts.experts." in key:
            halves = 2 if "linear_fc1" in key else 1
            expected = [(e, 1) for e in range(shape.moe.num_experts) for _ in range(halves)]
            assert [(chunk.start[0], chunk.shape[0]) for chunk in tensor.chunks] == expected
    vocab = stored["embedding.word_embeddings.weight"]
    assert [chunk.shape[0] for chunk in vocab.chunks] == [125] * 8


def rows_read(tensor: StoredTensor, wanted: set[int]) -> set[int]:
    """The rows of all chunks that hold a wanted row."""
    found: set[int] = set()
    for chunk in tensor.chunks:
        rows = set(range(chunk.start[0], chunk.start[0] + chunk.shape[0]))
        if rows & wanted:
            found |= rows
    return found


def test_query_groups_stay_whole(tmp_path):
    source = save_model(tmp_path / "hf", "llama", **WIDE | dict(num_key_value_heads=4))
    assert to_megatron(source, tmp_path / "megatron") == 0
    stored = torch_dist.read(tmp_path / "megatron/release").tensors
    chunks = stored["decoder.layers.0.self_attention.linear_qkv.weight"].chunks
    assert [chunk.shape[0] for chunk in chunks] == [(16 // 4 + 2) * 8] * 4


@pytest.mark.parametrize("vocab_size", [65, 66, 71, 72, 129, 1001])
def test_a_vocabulary_of_any_size_is_cut(tmp_path, vocab_size):
    source = save_model(tmp_path / "hf", "llama", hidden_size=64, vocab_size=vocab_size)
    assert to_megatron(source, tmp_path / "megatron") == 0
    assert to_huggingface(tmp_path / "megatron", tmp_path / "back") == 0
    assert contents(source).items() <= contents(tmp_path / "back").items()
    stored = torch_dist.read(tmp_path / "megatron/release").tensors
    assert len(stored["output_layer.weight"].chunks) > 5


def test_a_vocabulary_smaller_than_the_number_of_chunks(tmp_path):
    sizes = dict(hidden_size=1024, intermediate_size=8, num_hidden_layers=1, vocab_size=10)
    source = save_model(tmp_path / "hf", "llama", **sizes)
    assert to_megatron(source, tmp_path / "megatron") == 0
    assert to_huggingface(tmp_path / "megatron", tmp_path / "back") == 0
    assert contents(source).items() <= contents(tmp_path / "back").items()


def trained(directory: Path, layout: str) -> dict[str, object]:
    """What a trainer keeps: weights with a padded vocabulary, and other state beside them."""
    tensors = with_padded_vocabulary(megatron_tensors(directory), ModelShape.read(directory))
    if layout == "A":
        weights = with_stacked_layers(by_key(tensors))
    elif layout == "B":
        weights = by_key(tensors)
    else:
        weights = with_gate_and_up_apart(tensors)
    state: dict[str, object] = dict(weights)
    for key, tensor in weights.items():
        state[f"optimizer.state.exp_avg.{key}"] = torch.zeros_like(tensor)
    state |= {
        "chained_0.optimizer.state.exp_avg_sq.decoder.layers.0.mlp.linear_fc1.weight": torch.zeros(
            8
        ),
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.bucket_idx_0.param": torch.zeros(5),
        "rng_state/shard_0_1": {"seed": 1},
        "rerun_state_machine_state/shard_0_1": [1],
        "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1": None,
    }
    return state


def with_padded_vocabulary(tensors: Tensors, shape: ModelShape) -> Tensors:
    rows = padded_vocab_size(shape, 2)
    found = dict(tensors)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in tensors:
            padding = torch.full((rows - shape.vocab_size, shape.hidden_size), 7.0)
            found[name] = torch.cat([tensors[name], padding.to(tensors[name].dtype)])
    return found


def with_stacked_layers(tensors: Tensors) -> Tensors:
    found: Tensors = {}
    stacked: dict[str, list[torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if ".layers." in key:
            stacked.setdefault(re.sub(r"\.layers\.\d+\.", ".layers.", key), []).append(tensor)
        else:
            found[key] = tensor
    for key, layers in stacked.items():
        found[key] = torch.stack(layers)
    return found


def with_gate_and_up_apart(tensors: Tensors) -> Tensors:
    found: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("linear_fc1.weight"):
            found[name + "_w"], found[name + "_v"] = tensor.chunk(2)
        else:
            found[name] = tensor
    return found


def tp_boxes(key: str, tensor: torch.Tensor) -> list[Extents]:
    """The boxes that two tensor-parallel ranks write.

    They cut by rows, each half of gate and up for itself, or by columns.
    """
    outer = []
    if any(f".layers.{name}" in key for name in ("mlp", "self_attention", "pre_mlp")):
        outer.append(tensor.shape[0])  # the layers are stacked
    if re.search(r"\.experts\.experts\.linear", key):
        outer.append(tensor.shape[len(outer)])  # and so are the experts
    if key.endswith("linear_fc1.weight"):
        return cut(tensor.shape, *outer, 4)
    by_rows = ("weight_w", "weight_v", "linear_qkv.weight", "linear_qkv.bias")
    if key.endswith(by_rows) or "embedding" in key:
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


def has_split_columns(tensor: StoredTensor) -> bool:
    last_starts = {chunk.start[-1] for chunk in tensor.chunks}
    return len(tensor.shape) > 1 and len(last_starts) == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", "ABC")
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_what_trainers_write_converts_to_the_original_files(tmp_path, family, layout, form):
    source = make(tmp_path / "hf", family, bf16=True, shards=True)
    state = trained(source, layout)
    tensors = [key for key, value in state.items() if isinstance(value, torch.Tensor)]
    assert keys.layout(key for key in tensors if keys.is_weight(key)).startswith(layout)
    directory = tmp_path / "run" / "iter_0000042"
    save_stock(directory, state, tp_boxes, form)
    (tmp_path / "run" / LATEST).write_text("42")
    stored = torch_dist.read(directory).tensors
    assert any(has_split_columns(tensor) for tensor in stored.values())
    for number, place in enumerate((tmp_path / "run", directory)):
        target = tmp_path / f"back{number}"
        assert to_huggingface(place, target, "--hf-checkpoint", source) == 0
        back = contents(target)
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
    old = load(source)
    new = load(tmp_path / "back")
    changed = [name for name in old if not same_bits(old[name], new[name])]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]


def test_many_chunks_lie_in_one_file(tmp_path):
    source = make(tmp_path / "hf", "qwen3_moe")
    assert to_megatron(source, tmp_path / "megatron") == 0
    files = [path.name for path in (tmp_path / "megatron/release").glob("*.distcp")]
    assert files == ["__0_0.distcp"]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_form_of_megatron_core_0_16_converts_to_the_same_files(tmp_path, family):
    source = make(tmp_path / "hf", family, shards=True)
    assert to_megatron(source, tmp_path / "megatron", "--no-checksums") == 0
    assert to_huggingface(tmp_path / "megatron", tmp_path / "new", "--no-checksums") == 0
    turn_into_old_form(tmp_path / "megatron/release")
    assert to_huggingface(tmp_path / "megatron", tmp_path / "old", "--no-checksums") == 0
    assert contents(tmp_path / "old") == contents(tmp_path / "new") == contents(source)
