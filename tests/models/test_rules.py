"""The weight map as arithmetic, for every architecture, against the files that
transformers writes.

Every element of every tensor exactly once, for a model and over its ranks; nothing
missing, extra, misshapen. What the rows mean is for test_mbridge.py and for the real
GPTModel (tests/training/megatron).
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pytest

from nanoslime.models import ARCHITECTURES
from nanoslime.models.parallel_sizes import check_tp_size
from nanoslime.models.rules import (
    Box,
    ModelPartition,
    Piece,
    check_tensors,
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

# The dimension that megatron-core 0.19.2 cuts, by the classes that its layer specs name.
# All other tensors are replicated.
COLUMN_PARALLEL = (
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
ROW_PARALLEL = ("linear_proj.weight", "linear_fc2.weight")


@dataclass(frozen=True)
class Sizes:
    tp: int = 1
    pp: int = 1
    ep: int = 1
    # Tensor parallelism within an expert.
    expert_tp: int = 1


LAYOUTS = [
    Sizes(),
    Sizes(tp=2, expert_tp=2),
    Sizes(pp=2),
    Sizes(pp=4),
    Sizes(tp=2, pp=2, expert_tp=2),
    Sizes(ep=2),
    Sizes(tp=2, ep=2),
    Sizes(tp=2, pp=2, ep=4, expert_tp=2),
    Sizes(pp=2, ep=2, expert_tp=2),
]


def partitions(shape: ModelShape, sizes: Sizes) -> list[ModelPartition]:
    """The ranks of a layout: one data-parallel replica, or as many as share the experts."""
    num_layers = shape.num_layers // sizes.pp
    num_experts = shape.moe.num_experts // sizes.ep if shape.moe else 0
    found = []
    for pp_rank in range(sizes.pp):
        first_layer = pp_rank * num_layers
        is_last = pp_rank == sizes.pp - 1
        for rank in range(max(sizes.tp, sizes.ep * sizes.expert_tp)):
            first_expert = rank // sizes.expert_tp % sizes.ep * num_experts
            partition = ModelPartition(
                tp_rank=rank % sizes.tp,
                tp_size=sizes.tp,
                layers=range(first_layer, first_layer + num_layers),
                first=pp_rank == 0,
                last=is_last,
                experts=range(first_expert, first_expert + num_experts),
                expert_tp=(rank % sizes.expert_tp, sizes.expert_tp),
                mtp=is_last,
            )
            found.append(partition)
    return found


def shapes_in(directory) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in read_headers(directory).items()}


def lengths(box: Box) -> list[int]:
    return [along.stop - along.start for along in box]


def extent(boxes: list[Box]) -> list[int]:
    num_dims = len(boxes[0])
    return [max(box[dim].stop for box in boxes) for dim in range(num_dims)]


def local_boxes(found: list[Piece]) -> dict[str, list[Box]]:
    """The boxes that the pieces fill, by Megatron tensor."""
    boxes = defaultdict(list)
    for piece in found:
        boxes[piece.megatron].append(piece.local)
    return boxes


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), request.param, max_shard_size="20KB")


@pytest.fixture(scope="module")
def shape(directory):
    return ModelShape.read(directory)


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
        count = {name: np.zeros(full, dtype=int) for name, full in tensors(shape, mtp=True).items()}
        # Replicas of a tensor and a tied output layer repeat a box.
        known = set()
        for partition in partitions(shape, layout):
            for piece in pieces(shape, partition):
                if (piece.hf, piece.box) not in known:
                    known.add((piece.hf, piece.box))
                    count[piece.hf][piece.box] += 1
        for name, times in count.items():
            assert (times == 1).all(), (layout, name)


def test_pieces_fill_each_local_tensor_once_from_its_first_row(shape):
    expected = tensors(shape, mtp=True)
    for layout in LAYOUTS:
        for partition in partitions(shape, layout):
            found = pieces(shape, partition)
            for piece in found:
                assert lengths(piece.box) == lengths(piece.local)
                assert expected[piece.hf] == piece.full_shape
            for name, boxes in local_boxes(found).items():
                filled = np.zeros(extent(boxes), dtype=int)
                for box in boxes:
                    filled[box] += 1
                assert (filled == 1).all(), (layout, name)


def test_tensor_parallelism_cuts_the_dimension_that_megatron_core_cuts(shape):
    even = replace(shape, vocab_size=256)
    whole = local_boxes(pieces(even, ModelPartition(mtp=True)))
    half = local_boxes(pieces(even, ModelPartition(tp_rank=1, tp_size=2, mtp=True)))
    for name, boxes in whole.items():
        expected = extent(boxes)
        if name.endswith(COLUMN_PARALLEL):
            expected[0] //= 2
        elif name.endswith(ROW_PARALLEL):
            expected[1] //= 2
        assert extent(half[name]) == expected, name


def names_here(shape: ModelShape, partition: ModelPartition) -> set[str]:
    return {piece.megatron for piece in pieces(shape, partition)}


def test_a_rank_holds_its_layers_experts_and_ends_only(shape):
    middle = ModelPartition(layers=range(1, 3), first=False, last=False)
    layers = {name.split(".")[2] for name in names_here(shape, middle)}
    assert layers == {"1", "2"}
    nothing = ModelPartition(layers=range(0), first=False, last=False)
    assert pieces(shape, nothing) == []
    if shape.moe:
        held = names_here(shape, ModelPartition(experts=range(2, 4)))
        experts = {name.split(".")[6] for name in held if ".experts." in name}
        assert experts == {"2", "3"}
        without_experts = names_here(shape, ModelPartition(experts=range(0)))
        assert not [name for name in without_experts if ".experts." in name]


def test_qkv_rows_are_interleaved_by_query_group(shape):
    name = "decoder.layers.3.self_attention.linear_qkv.weight"
    found = [piece for piece in pieces(shape) if piece.megatron == name]
    if shape.mla:
        # Queries, keys and values have matrices of their own.
        assert found == []
        return
    prefix = "model.layers.3.self_attn."
    rows = [(piece.hf.removeprefix(prefix), piece.box[0]) for piece in found]
    d = shape.head_dim
    q = d * shape.num_attention_heads // shape.num_key_value_heads
    assert rows == [
        ("q_proj.weight", slice(0, q)),
        ("k_proj.weight", slice(0, d)),
        ("v_proj.weight", slice(0, d)),
        ("q_proj.weight", slice(q, 2 * q)),
        ("k_proj.weight", slice(d, 2 * d)),
        ("v_proj.weight", slice(d, 2 * d)),
    ]


def test_vocabulary_is_padded_and_a_rank_of_padding_only_holds_no_piece(shape):
    name = "embedding.word_embeddings.weight"
    second = ModelPartition(tp_rank=1, tp_size=2)
    assert padded_vocab_size(shape, 2) == 256
    (last,) = [piece for piece in pieces(shape, second) if piece.megatron == name]
    assert last.box[0] == slice(128, 250)
    assert last.local[0] == slice(0, 122)
    tiny = replace(shape, vocab_size=5)
    assert padded_vocab_size(tiny, 2) == 16
    assert name not in names_here(tiny, second)


def test_a_tensor_parallel_size_that_does_not_divide_is_refused_with_the_choices(shape):
    if shape.mla:
        tp_size = 8
        says = "tp_size=8 does not divide num_attention_heads=4; choose 1, 2 or 4$"
    else:
        tp_size = 4
        says = "tp_size=4 does not divide num_key_value_heads=2; choose 1 or 2$"
    with pytest.raises(RunError, match=says):
        pieces(shape, ModelPartition(0, tp_size))
    if shape.moe and shape.moe.shared_intermediate_size:
        odd = shape.moe.shared_intermediate_size + 1
        odd_shape = replace(shape, moe=replace(shape.moe, shared_intermediate_size=odd))
        with pytest.raises(RunError, match=f"does not divide shared_intermediate_size={odd}"):
            check_tp_size(odd_shape, 2)


def without(content: dict, name: str) -> dict:
    return {key: value for key, value in content.items() if key != name}


def test_missing_renamed_and_misshapen_tensors_are_named(directory, shape):
    good = shapes_in(directory)
    check_tensors(shape, good, "here")
    for name, full_shape in good.items():
        missing = without(good, name)
        renamed = {**missing, name.replace("model", "modul") + "_": full_shape}
        for bad in (missing, renamed):
            with pytest.raises(RunError, match=f"^here has no tensor {name} "):
                check_tensors(shape, bad, "here")
        wrong = (*full_shape[:-1], full_shape[-1] - 1)
        with pytest.raises(RunError) as error:
            check_tensors(shape, {**good, name: wrong}, "here")
        says = f"here: {name} is {list(wrong)}, config.json asks for {list(full_shape)}"
        assert str(error.value) == says


def test_tensors_that_do_not_belong_to_the_model_are_named(directory, shape):
    good = shapes_in(directory)
    extra = ["model.layers.0.self_attn.o_proj.bias", "score.weight"]
    if not shape.num_mtp_layers:
        # Layer 4 is the multi-token prediction layer of the others.
        extra.append("model.layers.4.mlp.up_proj.bias")
    for name in extra:
        with pytest.raises(RunError, match=f"^here: 1 tensors do not belong .*{name}"):
            check_tensors(shape, {**good, name: (1,)}, "here")


def test_repeats_are_allowed_in_the_shape_of_what_they_repeat(directory, shape):
    good = shapes_in(directory)
    full_shape = good["model.embed_tokens.weight"]
    if shape.tie_word_embeddings:
        assert repeats(shape)["lm_head.weight"] == "model.embed_tokens.weight"
        check_tensors(shape, {**good, "lm_head.weight": full_shape}, "here")
        says = r"lm_head.weight is \[1, 32\], config.json asks for \[250, 32\]"
        with pytest.raises(RunError, match=says):
            check_tensors(shape, {**good, "lm_head.weight": (1, 32)}, "here")
    elif not shape.num_mtp_layers:
        assert repeats(shape) == {}


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("family", ["glm4_moe", "glm4_moe_no_dense", "deepseek_v3"])
def test_multi_token_prediction_is_all_there_or_not_at_all(tmp_path, family, shard_size):
    directory = save_model(tmp_path, family, max_shard_size=shard_size)
    shape = ModelShape.read(directory)
    without_mtp = shapes_in(directory)
    assert not has_mtp(shape, without_mtp)
    every = shapes_in(add_mtp(directory))
    assert has_mtp(shape, every)
    check_tensors(shape, every, "here")

    expected = tensors(shape, mtp=True)
    repeated = {name: expected[source] for name, source in repeats(shape).items()}
    assert every == {**expected, **repeated}
    check_tensors(shape, expected, "here")
    for name in expected.keys() - without_mtp.keys():
        with pytest.raises(RunError, match=f"^here has no tensor {name} "):
            check_tensors(shape, without(every, name), "here")
    one_more = {**every, "model.layers.5.enorm.weight": (32,)}
    with pytest.raises(RunError, match=r"^here: 1 tensors do not belong .*layers.5.enorm"):
        check_tensors(shape, one_more, "here")

    names = names_here(shape, ModelPartition(mtp=True))
    assert "mtp.layers.0.eh_proj.weight" in names
    assert "mtp.layers.0.transformer_layer.mlp.router.weight" in names
    assert not [name for name in names if "layers.4." in name]


def test_the_local_layer_spec_has_names_of_its_own(shape):
    other = {
        piece.megatron: piece.local_spec_name for piece in pieces(shape, ModelPartition(mtp=True))
    }
    layer = "decoder.layers.3."
    norm = "pre_mlp_layernorm.weight"
    fused_norm = "mlp.linear_fc1.layer_norm_weight"
    if shape.moe and 3 in shape.moe.layers:
        assert other[layer + norm] == layer + fused_norm
    else:
        assert other[layer + fused_norm] == layer + norm
    if shape.mla:
        kv_norm = layer + "self_attention.linear_kv_up_proj.layer_norm_weight"
        assert other[kv_norm] == layer + "self_attention.kv_layernorm.weight"
        q_norm = layer + "self_attention.linear_q_up_proj.layer_norm_weight"
        if shape.mla.q_lora_rank:
            assert other[q_norm] == layer + "self_attention.q_layernorm.weight"
        else:
            assert q_norm not in other
    else:
        qkv_norm = layer + "self_attention.linear_qkv.layer_norm_weight"
        assert other[qkv_norm] == layer + "input_layernorm.weight"
    if shape.num_mtp_layers:
        layer = "mtp.layers.0.transformer_layer."
        assert other[layer + norm] == layer + fused_norm


def test_a_model_whose_layers_are_all_dense_has_no_experts_anywhere(tmp_path):
    directory = save_model(tmp_path, "qwen3_moe", mlp_only_layers=[0, 1, 2, 3])
    assert tensors(ModelShape.read(directory)) == shapes_in(directory)
