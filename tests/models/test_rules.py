"""The weight map as arithmetic: every element of every tensor exactly once, for a model and over its
ranks.
"""

import dataclasses
from collections import defaultdict

import numpy as np
import pytest

from nanoslime.models.rules import (
    Part,
    check_tensors,
    local_spec_name,
    padded_vocab_size,
    pieces,
    tensors,
)
from nanoslime.models.shape import ModelShape
from tests.models.hf import FAMILIES, make_model

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    hf = make_model(request.param)
    hf.config.save_pretrained(directory)
    return hf, ModelShape.read(directory)


def parts(shape: ModelShape, tp_size: int, pp_size: int) -> list[Part]:
    layers = shape.num_layers // pp_size
    return [
        Part(tp, tp_size, range(pp * layers, (pp + 1) * layers), pp == 0, pp == pp_size - 1)
        for pp in range(pp_size)
        for tp in range(tp_size)
    ]


def test_tensors_are_those_that_transformers_saves(model):
    hf, shape = model
    saved = {name: tuple(value.shape) for name, value in hf.state_dict().items()}
    if shape.tie_word_embeddings:
        del saved["lm_head.weight"]
    assert tensors(shape) == saved


@pytest.mark.parametrize(("tp_size", "pp_size"), LAYOUTS)
def test_pieces_of_all_ranks_cover_every_element_once(model, tp_size, pp_size):
    _, shape = model
    seen = {name: np.zeros(full, dtype=int) for name, full in tensors(shape).items()}
    boxes = defaultdict(set)
    for part in parts(shape, tp_size, pp_size):
        for piece in pieces(shape, part):
            key = str(piece.box)
            if key not in boxes[piece.hf]:  # norms under TP and a tied output layer repeat a box
                boxes[piece.hf].add(key)
                seen[piece.hf][piece.box] += 1
    assert all((count == 1).all() for count in seen.values())


@pytest.mark.parametrize(("tp_size", "pp_size"), LAYOUTS)
def test_pieces_fill_each_local_tensor_once_from_its_first_row(model, tp_size, pp_size):
    _, shape = model
    for part in parts(shape, tp_size, pp_size):
        local = defaultdict(list)
        for piece in pieces(shape, part):
            assert [s.stop - s.start for s in piece.box] == [s.stop - s.start for s in piece.local]
            local[piece.megatron].append(piece.local)
        for boxes in local.values():
            extent = [max(box[d].stop for box in boxes) for d in range(len(boxes[0]))]
            filled = np.zeros(extent, dtype=int)
            for box in boxes:
                filled[box] += 1
            assert (filled == 1).all()


def test_qkv_rows_are_interleaved_by_query_group(model):
    _, shape = model
    d, per_group = shape.head_dim, shape.num_attention_heads // shape.num_key_value_heads
    name = "decoder.layers.3.self_attention.linear_qkv.weight"
    rows = [(p.hf[-13], p.box[0].start, p.box[0].stop) for p in pieces(shape) if p.megatron == name]
    q = per_group * d
    assert rows == [("q", 0, q), ("k", 0, d), ("v", 0, d), ("q", q, 2 * q), ("k", d, 2 * d), ("v", d, 2 * d)]


def test_vocabulary_is_padded_and_a_rank_of_padding_only_holds_no_piece(model):
    _, shape = model
    assert padded_vocab_size(shape, 2) == 256
    last = [p for p in pieces(shape, Part(1, 2)) if p.megatron == "embedding.word_embeddings.weight"]
    assert [p.box[0] for p in last] == [slice(128, 250)] and last[0].local[0] == slice(0, 122)
    tiny = dataclasses.replace(shape, vocab_size=5)
    assert padded_vocab_size(tiny, 2) == 16
    assert not [p for p in pieces(tiny, Part(1, 2)) if p.megatron.startswith("embedding.")]


def test_a_tensor_parallel_size_that_does_not_divide_is_refused_with_the_choices(model):
    _, shape = model
    with pytest.raises(ValueError, match=r"tp_size=4 does not divide num_key_value_heads=2; .* \[1, 2\]"):
        pieces(shape, Part(0, 4))


def test_missing_extra_and_misshapen_tensors_are_named(model):
    _, shape = model
    good = tensors(shape)
    check_tensors(shape, good, "here")
    name = "model.layers.2.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=f"here has no tensor {name}"):
        check_tensors(shape, {k: v for k, v in good.items() if k != name}, "here")
    with pytest.raises(ValueError, match=rf"{name} is \[48, 31\], config.json asks for \[48, 32\]"):
        check_tensors(shape, {**good, name: (48, 31)}, "here")
    with pytest.raises(ValueError, match="here: 1 tensors do not belong .*extra.weight"):
        check_tensors(shape, {**good, "extra.weight": (1,)}, "here")


def test_a_tied_checkpoint_may_repeat_the_embedding(model):
    _, shape = model
    with_head = {**tensors(shape), "lm_head.weight": (shape.vocab_size, shape.hidden_size)}
    check_tensors(shape, with_head, "here")


def test_norms_have_names_of_their_own_in_the_local_spec():
    assert local_spec_name("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight") == (
        "decoder.layers.1.input_layernorm.weight"
    )
    assert local_spec_name("decoder.layers.1.mlp.linear_fc1.layer_norm_weight") == (
        "decoder.layers.1.pre_mlp_layernorm.weight"
    )
    unchanged = "decoder.layers.1.mlp.linear_fc1.weight"
    assert local_spec_name(unchanged) == unchanged
