"""Tensors that are missing, superfluous or wrong are named, and nothing is written."""

import random
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanoslime.models.rules import ModelPartition, pieces
from nanoslime.models.shape import ModelShape
from nanoslime.storage.safetensors_file import INDEX_FILE, read_headers
from tests.models.hf import FAMILIES
from tests.tools.checkpoints import (
    FORMS,
    Tensors,
    copy,
    edit,
    load_stock,
    make,
    save_stock,
    to_huggingface,
    to_megatron,
)
from tools.conversion import keys

NORM = "model.norm.weight"
FEW = 2  # names that are tried of every family: enough, as the families share their rules


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Path:
    """A directory with hf, a sharded checkpoint, and megatron, the same as torch writes it."""
    directory = tmp_path_factory.mktemp(request.param)
    source = make(directory / "hf", request.param, shards=True)
    assert to_megatron(source, directory / "ours") == 0
    weights = set()
    for piece in pieces(ModelShape.read(source), ModelPartition()):
        key, _ = keys.key_of(piece.megatron)
        weights.add(key)
    stored = load_stock(directory / "ours/release")
    save_stock(directory / "megatron/release", {key: stored[key] for key in weights})
    shutil.copytree(directory / "ours/hf", directory / "megatron/hf")
    assert to_huggingface(directory / "megatron", directory / "back") == 0
    return directory


def few(names: Iterable[str]) -> list[str]:
    """Some of the names, others for every family."""
    ordered = sorted(names)
    return random.Random(" ".join(ordered)).sample(ordered, FEW)


def test_a_wrong_tensor_of_hugging_face_is_named_with_its_file(family, tmp_path, refused):
    model_type = ModelShape.read(family / "hf").model_type
    files = {name: info.file.name for name, info in read_headers(family / "hf").items()}
    for name in few(files):

        def remove(tensors: Tensors, name: str = name) -> None:
            del tensors[name]

        def rename(tensors: Tensors, name: str = name) -> None:
            tensors[name + "_"] = tensors.pop(name)

        def add(tensors: Tensors, name: str = name) -> None:
            tensors[name + "_extra"] = torch.ones(2)

        def reshape(tensors: Tensors, name: str = name) -> None:
            tensors[name] = tensors[name][..., 1:].clone()

        missing = f"{INDEX_FILE} has no tensor {name} "
        extra = f"{files[name]}: 1 tensors do not belong to a {model_type}: .*{name}_extra"
        other_shape = rf"{files[name]}: {name} is \[.*\], config.json asks for \["
        cases = [(remove, missing), (rename, missing), (add, extra), (reshape, other_shape)]
        for change, message in cases:
            source = copy(family / "hf", tmp_path / "hf")
            edit(source, name, change)
            refused(to_megatron, source, message)


def test_a_wrong_dtype_of_hugging_face_is_named_with_its_file(family, tmp_path, refused):
    files = {name: info.file.name for name, info in read_headers(family / "hf").items()}
    sources = defaultdict(set)
    for piece in pieces(ModelShape.read(family / "hf")):
        key, _ = keys.key_of(piece.megatron)
        sources[key].add(piece.hf)
    # Tensors that become one: query, key and value; gate and up; the experts of a layer.
    fused = set()
    for names in sources.values():
        if len(names) > 1:
            fused |= names
    for name in (min(fused), max(fused)):

        def halve(tensors: Tensors, name: str = name) -> None:
            tensors[name] = tensors[name].half()

        def make_int(tensors: Tensors, name: str = name) -> None:
            tensors[name] = tensors[name].int()

        before_layers = name.rpartition("layers.")[0]
        source = copy(family / "hf", tmp_path / "hf")
        edit(source, name, halve)
        refused(to_megatron, source, f"safetensors: .*{before_layers}.* (F16|F32), but .*F(16|32)")
        edit(source, name, make_int)
        refused(to_megatron, source, f"{files[name]}: {name} is I32; dequantize")


def test_a_wrong_key_of_megatron_is_named_with_its_file(family, tmp_path, refused):
    stored = load_stock(family / "megatron/release")
    model = family / "megatron" / "hf"
    for key in few(stored):
        tensor = stored[key]
        others = {other: stored[other] for other in stored if other != key}
        name = re.escape(key)
        if ".experts.experts." in key:  # one name for each expert
            name = name.replace(r"experts\.experts", r"experts\.experts\.\d", 1)
        missing = rf"\.metadata has no {name} \["
        extra = r"__0_0\.distcp: .*_extra and \d others do not"
        other_shape = rf"__0_0\.distcp: {name} is \[.*config.json asks for"
        other_dtype = rf"__0_0\.distcp: {name} is I32; dequantize"
        cases = [
            (others, missing),
            (others | {key + "_": tensor}, missing),
            (stored | {key + "_extra": torch.ones(2, 2)}, extra),
            (stored | {key: tensor[..., 1:]}, other_shape),
            (stored | {key: tensor.int()}, other_dtype),
        ]
        for state, message in cases:
            source = save_stock(tmp_path / "megatron", state)
            refused(to_huggingface, source, message, "--hf-checkpoint", model)
            shutil.rmtree(source)


@pytest.mark.parametrize(
    "family_name, mtp, name, of",
    [
        ("qwen2", None, "lm_head.weight", "model.embed_tokens.weight"),
        ("glm4_moe", True, "model.layers.4.embed_tokens.weight", "model.embed_tokens.weight"),
        ("deepseek_v3", True, "model.layers.4.shared_head.head.weight", "lm_head.weight"),
    ],
)
def test_a_repeat_that_differs_is_refused(tmp_path, refused, family_name, mtp, name, of):
    source = make(tmp_path / "hf", family_name, mtp=mtp)

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[of].clone()
        tensors[name][-1, -1] += 1

    edit(source, of, change)
    refused(to_megatron, source, rf"model\.safetensors: {name} has to repeat {of}, but differs")


def test_the_two_names_of_a_norm_have_to_agree(llama, tmp_path, refused):
    stored = load_stock(llama / "megatron/release")
    name = "decoder.layers.2.mlp.linear_fc1.layer_norm_weight"
    other = "decoder.layers.2.pre_mlp_layernorm.weight"
    source = save_stock(tmp_path / "same", stored)
    assert to_huggingface(source, tmp_path / "fine", "--hf-checkpoint", llama / "hf") == 0
    source = save_stock(tmp_path / "other", stored | {other: stored[name] + 1})
    message = rf"__0_0\.distcp: {other} has to repeat {name}, but differs"
    refused(to_huggingface, source, message, "--hf-checkpoint", llama / "hf")


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_stored_in_two_ways_is_refused(llama, tmp_path, refused, form):
    stored = load_stock(llama / "megatron/release")
    name = "mlp.linear_fc2.weight"
    stacked = torch.stack([stored[f"decoder.layers.{layer}.{name}"] for layer in range(4)])
    state = stored | {f"decoder.layers.{name}": stacked}
    source = save_stock(tmp_path / "twice", state, form=form)
    message = r"layers\.0\.mlp\.linear_fc2\.weight is stored twice"
    refused(to_huggingface, source, message, "--hf-checkpoint", llama / "hf")


@pytest.mark.parametrize("half", [torch.zeros(48, 32).bfloat16(), torch.zeros(40, 32), None])
def test_halves_of_one_tensor_have_to_match(llama, tmp_path, refused, half):
    state = load_stock(llama / "megatron/release")
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    gate_and_up = state.pop(name)
    state[f"{name}_w"] = gate_and_up[:48]
    if half is not None:
        state[f"{name}_v"] = half
    source = save_stock(tmp_path / "halves", state)
    message = r"layers\.1\.mlp\.linear_fc1\.weight is stored as .*, not as two equal halves"
    refused(to_huggingface, source, message, "--hf-checkpoint", llama / "hf")


def test_a_dtype_that_cannot_be_cast_is_refused_before_anything_is_written(
    llama, tmp_path, refused
):
    source = copy(llama / "hf", tmp_path / "hf")
    edit(source, NORM, lambda tensors: tensors.update({NORM: tensors[NORM].double()}))
    assert to_megatron(source, tmp_path / "megatron") == 0
    message = f"distcp: {NORM} is F64; BF16 is made of"
    refused(to_huggingface, tmp_path / "megatron", message, "--dtype", "BF16")


def test_what_is_no_checkpoint_is_refused(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "empty" / "adapter_model.safetensors")
    for convert in (to_megatron, to_huggingface):
        refused(convert, tmp_path / "empty", "is no checkpoint")
        refused(convert, tmp_path / "nowhere", "is no directory")


def test_the_other_direction_is_named(llama, refused):
    refused(to_megatron, llama / "megatron", "is torch_dist already; give a Hugging Face directory")
    refused(to_huggingface, llama / "hf", "is Hugging Face already; give a Megatron directory")
