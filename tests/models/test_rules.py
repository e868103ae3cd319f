"""The weight map as arithmetic, for every architecture, against the files that
transformers writes.

Every element of every tensor exactly once, for a model and over its ranks; nothing
missing, extra, misshapen. What the rows mean is for test_mbridge.py and for the real
GPTModel (tests/training/megatron).
"""

import dataclasses
import math
from collections import defaultdict
from itertools import product

import numpy as np
import pytest

from nanoslime.models import ARCHITECTURES
from nanoslime.models.rules import (
    ModelPartition,
    check_tensors,
    check_tp_size,
    has_mtp,
    padded_vocab_size,
    pieces,
    repeats,
    tensors,
)
from nanoslime.models.shape import ModelShape
from nanoslime.storage.safetensors_file import read_headers
from nanoslime.types import RunError
from tests.models.hf import FAMILIES, add_mtp, save_model

COLUMN_PARALLEL = (  # in megatron-core 0.16.1, by the classes that its layer specs name; rows are dim 0
    "word_embeddings.weight",
    "output_layer.weight",
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_q_proj.weight",
    "linear_q_up_proj.weight",
    "linear_kv_up_proj.weight",
    "linear_fc1.weight",
    "eh_proj.weight",
)
ROW_PARALLEL = ("linear_proj.weight", "linear_fc2.weight")  # dim 1; all others are replicated
LAYOUTS = [  # tp, pp, ep, tensor parallelism within an expert
    (1, 1, 1, 1),
    (2, 1, 1, 2),
    (1, 2, 1, 1),
    (1, 4, 1, 1),
    (2, 2, 1, 2),
    (1, 1, 2, 1),
    (2, 1, 2, 1),
    (2, 2, 4, 2),
    (1, 2, 2, 2),
]


def shapes_in(directory) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in read_headers(directory).items()}


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), request.param, max_shard_size="20KB")


@pytest.fixture(scope="module")
def shape(directory):
    return ModelShape.read(directory)


def parts(
    shape: ModelShape, tp_size: int, pp_size: int, ep_size: int, expert_tp_size: int
) -> list[ModelPartition]:
    """The ranks of a layout, one data-parallel replica each, or as many as the experts
    are spread over."""
    layers = shape.num_layers // pp_size
    experts = shape.moe.num_experts // ep_size if shape.moe else 0

    def first(rank: int) -> int:
        return rank // expert_tp_size % ep_size * experts

    return [
        ModelPartition(
            rank % tp_size,
            tp_size,
            range(pp * layers, (pp + 1) * layers),
            pp == 0,
            pp == pp_size - 1,
            range(first(rank), first(rank) + experts),
            (rank % expert_tp_size, expert_tp_size),
            mtp=pp == pp_size - 1,
        )
        for pp, rank in product(range(pp_size), range(max(tp_size, ep_size * expert_tp_size)))
    ]


def extent(boxes) -> list[int]:
    return [max(box[d].stop for box in boxes) for d in range(len(boxes[0]))]


def test_every_architecture_has_a_family():
    assert {config_class.model_type for config_class, _ in FAMILIES.values()} == set(ARCHITECTURES)


def test_tensors_are_those_that_transformers_writes(directory, shape, request, tmp_path):
    assert len(list(directory.glob("*.safetensors"))) > 2
    written = shapes_in(directory)
    assert tensors(shape) == written
    assert shape.num_parameters == sum(math.prod(full) for full in written.values())
    family = request.node.callspec.params["directory"]
    assert shapes_in(save_model(tmp_path, family)) == written


def test_pieces_of_all_ranks_cover_every_element_once(shape):
    for layout in LAYOUTS:
        seen = {name: np.zeros(full, dtype=int) for name, full in tensors(shape, mtp=True).items()}
        known = set()
        for part in parts(shape, *layout):
            for piece in pieces(shape, part):
                key = (piece.hf, str(piece.box))
                if key not in known:  # replicas of a tensor and a tied output layer repeat a box
                    known.add(key)
                    seen[piece.hf][piece.box] += 1
        assert [name for name, count in seen.items() if not (count == 1).all()] == [], layout


def test_pieces_fill_each_local_tensor_once_from_its_first_row(shape):
    expected = tensors(shape, mtp=True)
    for layout in LAYOUTS:
        for part in parts(shape, *layout):
            local = defaultdict(list)
            for piece in pieces(shape, part):
                assert [s.stop - s.start for s in piece.box] == [
                    s.stop - s.start for s in piece.local
                ]
                assert expected[piece.hf] == piece.full_shape
                local[piece.megatron].append(piece.local)
            for name, boxes in local.items():
                filled = np.zeros(extent(boxes), dtype=int)
                for box in boxes:
                    filled[box] += 1
                assert (filled == 1).all(), (layout, name)


def test_tensor_parallelism_cuts_the_dimension_that_megatron_core_cuts(shape):
    even = dataclasses.replace(shape, vocab_size=256)
    sizes = []
    for part in (ModelPartition(mtp=True), ModelPartition(1, 2, mtp=True)):
        local = defaultdict(list)
        for piece in pieces(even, part):
            local[piece.megatron].append(piece.local)
        sizes.append({name: extent(boxes) for name, boxes in local.items()})
    for name, full in sizes[0].items():
        cut = 0 if name.endswith(COLUMN_PARALLEL) else 1 if name.endswith(ROW_PARALLEL) else None
        assert sizes[1][name] == [n // 2 if d == cut else n for d, n in enumerate(full)], name


def test_a_rank_holds_its_layers_experts_and_ends_only(shape):
    names = {
        p.megatron
        for p in pieces(shape, ModelPartition(layers=range(1, 3), first=False, last=False))
    }
    assert {name.split(".")[2] for name in names} == {"1", "2"}
    assert pieces(shape, ModelPartition(layers=range(0), first=False, last=False)) == []
    if shape.moe:
        held = {p.megatron for p in pieces(shape, ModelPartition(experts=range(2, 4)))}
        experts = {name.split(".")[6] for name in held if ".experts." in name}
        assert experts == {"2", "3"}
        assert not any(
            ".experts." in p.megatron for p in pieces(shape, ModelPartition(experts=range(0)))
        )


def test_qkv_rows_are_interleaved_by_query_group(shape):
    name = "decoder.layers.3.self_attention.linear_qkv.weight"
    rows = [(p.hf[-13], p.box[0].start, p.box[0].stop) for p in pieces(shape) if p.megatron == name]
    if shape.mla:
        assert rows == []  # queries, keys and values have matrices of their own
        return
    d, per_group = shape.head_dim, shape.num_attention_heads // shape.num_key_value_heads
    q = per_group * d
    assert rows == [
        ("q", 0, q),
        ("k", 0, d),
        ("v", 0, d),
        ("q", q, 2 * q),
        ("k", d, 2 * d),
        ("v", d, 2 * d),
    ]


def test_vocabulary_is_padded_and_a_rank_of_padding_only_holds_no_piece(shape):
    assert padded_vocab_size(shape, 2) == 256
    last = [
        p
        for p in pieces(shape, ModelPartition(1, 2))
        if p.megatron == "embedding.word_embeddings.weight"
    ]
    assert [p.box[0] for p in last] == [slice(128, 250)] and last[0].local[0] == slice(0, 122)
    tiny = dataclasses.replace(shape, vocab_size=5)
    assert padded_vocab_size(tiny, 2) == 16
    assert not [
        p for p in pieces(tiny, ModelPartition(1, 2)) if p.megatron.startswith("embedding.")
    ]


def test_a_tensor_parallel_size_that_does_not_divide_is_refused_with_the_choices(shape):
    size = "num_attention_heads=4" if shape.mla else "num_key_value_heads=2"
    fit = "1, 2 or 4" if shape.mla else "1 or 2"
    ways = 8 if shape.mla else 4
    with pytest.raises(RunError, match=f"tp_size={ways} does not divide {size}; choose {fit}$"):
        pieces(shape, ModelPartition(0, ways))
    if shape.moe and (shared := shape.moe.shared_intermediate_size):
        odd = dataclasses.replace(shape.moe, shared_intermediate_size=shared + 1)
        with pytest.raises(
            RunError, match=f"does not divide shared_intermediate_size={shared + 1}"
        ):
            check_tp_size(dataclasses.replace(shape, moe=odd), 2)


def test_missing_renamed_extra_and_misshapen_tensors_are_named(directory, shape):
    good = shapes_in(directory)
    check_tensors(shape, good, "here")
    for name, full in good.items():
        rest = {k: v for k, v in good.items() if k != name}
        for bad in (rest, rest | {name.replace("model", "modul") + "_": full}):
            with pytest.raises(ValueError, match=f"^here has no tensor {name} "):
                check_tensors(shape, bad, "here")
        wrong = (*full[:-1], full[-1] - 1)
        with pytest.raises(ValueError) as error:
            check_tensors(shape, {**good, name: wrong}, "here")
        assert (
            str(error.value) == f"here: {name} is {list(wrong)}, config.json asks for {list(full)}"
        )
    for extra in (
        "model.layers.4.mlp.up_proj.bias",
        "model.layers.0.self_attn.o_proj.bias",
        "score.weight",
    ):
        if extra.startswith("model.layers.4.") and shape.num_mtp_layers:
            continue  # there it is a part of multi-token prediction, see below
        with pytest.raises(ValueError, match=f"^here: 1 tensors do not belong .*{extra}"):
            check_tensors(shape, {**good, extra: (1,)}, "here")


def test_repeats_are_allowed_in_the_shape_of_what_they_repeat(directory, shape):
    good = shapes_in(directory)
    full = good["model.embed_tokens.weight"]
    if shape.tie_word_embeddings:
        assert repeats(shape)["lm_head.weight"] == "model.embed_tokens.weight"
        check_tensors(shape, good | {"lm_head.weight": full}, "here")
        with pytest.raises(
            ValueError, match=r"lm_head.weight is \[1, 32\], config.json asks for \[250, 32\]"
        ):
            check_tensors(shape, good | {"lm_head.weight": (1, 32)}, "here")
    elif not shape.num_mtp_layers:
        assert repeats(shape) == {}


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("family", ["glm4_moe", "glm4_moe_no_dense", "deepseek_v3"])
def test_multi_token_prediction_is_all_there_or_not_at_all(tmp_path, family, shard_size):
    directory = save_model(tmp_path, family, max_shard_size=shard_size)
    shape, without = ModelShape.read(directory), shapes_in(directory)
    assert not has_mtp(shape, without)
    every = shapes_in(add_mtp(directory))
    assert has_mtp(shape, every)
    check_tensors(shape, every, "here")
    expected = tensors(shape, mtp=True)
    assert every == expected | {name: expected[of] for name, of in repeats(shape).items()}
    check_tensors(shape, {k: v for k, v in every.items() if k not in repeats(shape)}, "here")
    for name in expected.keys() - without.keys():
        with pytest.raises(ValueError, match=f"^here has no tensor {name} "):
            check_tensors(shape, {k: v for k, v in every.items() if k != name}, "here")
    with pytest.raises(ValueError, match=r"^here: 1 tensors do not belong .*layers.5.enorm"):
        check_tensors(shape, every | {"model.layers.5.enorm.weight": (32,)}, "here")
    names = {piece.megatron for piece in pieces(shape, ModelPartition(mtp=True))}
    assert {
        "mtp.layers.0.eh_proj.weight",
        "mtp.layers.0.transformer_layer.mlp.router.weight",
    } <= names
    assert not any("layers.4." in name for name in names)


def test_the_local_layer_spec_has_names_of_its_own(shape):
    other = {
        p.megatron: p.other
        for p in pieces(shape, ModelPartition(mtp=True))
        if p.megatron != p.other
    }
    layer, fused = "decoder.layers.3.", "mlp.linear_fc1.layer_norm_weight"
    sparse = shape.moe is not None and 3 in shape.moe.layers
    assert other[layer + fused if not sparse else layer + "pre_mlp_layernorm.weight"] == (
        layer + "pre_mlp_layernorm.weight" if not sparse else layer + fused
    )
    if shape.mla:
        up = layer + "self_attention.linear_kv_up_proj.layer_norm_weight"
        assert other[up] == layer + "self_attention.kv_layernorm.weight"
        q = layer + "self_attention.linear_q_up_proj.layer_norm_weight"
        assert (other.get(q) == layer + "self_attention.q_layernorm.weight") == bool(
            shape.mla.q_lora_rank
        )
    else:
        qkv = layer + "self_attention.linear_qkv.layer_norm_weight"
        assert other[qkv] == layer + "input_layernorm.weight"
    if shape.num_mtp_layers:
        layer = "mtp.layers.0.transformer_layer."
        assert other[layer + "pre_mlp_layernorm.weight"] == layer + fused


def test_a_model_whose_layers_are_all_dense_has_no_experts_anywhere(tmp_path):
    directory = save_model(tmp_path, "qwen3_moe", mlp_only_layers=[0, 1, 2, 3])
    assert tensors(ModelShape.read(directory)) == shapes_in(directory)
