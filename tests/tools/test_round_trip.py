"""From Hugging Face to Megatron and back, by the real commands: the same files come back."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nanoslime.models.rules import repeats
from nanoslime.models.shape import ModelShape
from tests.models.hf import FAMILIES
from tests.tools.checkpoints import (
    contents,
    edit,
    load,
    make,
    same,
    same_bits,
    to_huggingface,
    to_megatron,
)
from tools.conversion.checkpoint import HEADERS

NORM = "model.norm.weight"

# Every second family is sharded; then the options of `make` that a family alone does not
# cover.
CASES = [(family, {"shards": number % 2 == 1}) for number, family in enumerate(FAMILIES)]
CASES += [
    ("qwen2", {"shards": True}),
    ("glm4_moe", {"bf16": True}),
    ("glm4_moe", {"mtp": True, "bf16": True, "shards": True}),
    ("glm4_moe_no_dense", {"mtp": False}),
    ("deepseek_v3", {"mtp": True}),
    ("deepseek_v3", {"bf16": True, "shards": True}),
]


def case_id(value: str | dict[str, bool]) -> str:
    return value if isinstance(value, str) else "-".join(value)


@pytest.mark.parametrize("family, options", CASES, ids=case_id)
def test_the_same_files_come_back(tmp_path, family, options):
    source = make(tmp_path / "hf", family, **options)
    if options.get("shards"):
        assert len(list(source.glob("*.safetensors"))) > 3
    assert to_megatron(source, tmp_path / "megatron") == 0
    assert to_huggingface(tmp_path / "megatron", tmp_path / "back") == 0
    back = contents(tmp_path / "back")
    assert back.pop("manifest.json")
    assert back == contents(source)
    assert to_huggingface(tmp_path / "megatron" / "release", tmp_path / "again") == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "back")


@pytest.mark.parametrize(
    "family, options", [("glm4_moe", {"mtp": True, "bf16": True}), ("qwen2", {})]
)
def test_without_the_original_headers_the_tensors_come_back(tmp_path, family, options):
    source = make(tmp_path / "hf", family, shards=True, **options)
    assert to_megatron(source, tmp_path / "megatron", "--no-checksums") == 0
    (tmp_path / "megatron/hf" / HEADERS).unlink()
    assert to_huggingface(tmp_path / "megatron", tmp_path / "back", "--no-checksums") == 0
    assert not (tmp_path / "back" / "manifest.json").exists()
    expected = load(source)
    for name in repeats(ModelShape.read(source)):
        expected.pop(name, None)
    assert same(load(tmp_path / "back"), expected)
    assert to_megatron(tmp_path / "back", tmp_path / "second") == 0


def test_the_original_beside_gives_names_order_and_dtypes(tmp_path):
    """As after training in another dtype: the files of the original, numbers rounded to theirs."""
    source = make(tmp_path / "hf", "qwen3", bf16=True, shards=True)
    wide = tmp_path / "wide"
    assert to_megatron(source, tmp_path / "megatron") == 0
    assert to_huggingface(tmp_path / "megatron", wide, "--dtype", "F32") == 0
    assert to_megatron(wide, tmp_path / "trained") == 0
    assert to_huggingface(tmp_path / "trained", tmp_path / "back", "--hf-checkpoint", source) == 0
    back = contents(tmp_path / "back")
    del back["manifest.json"]
    assert back == contents(source)


def test_a_tied_head_that_the_file_repeats_comes_back(tmp_path):
    source = make(tmp_path / "hf", "qwen2")
    file = source / "model.safetensors"
    content = load_file(file)
    content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
    save_file(content, file)
    assert to_megatron(source, tmp_path / "megatron") == 0
    assert to_huggingface(tmp_path / "megatron", tmp_path / "back") == 0
    assert (tmp_path / "back/model.safetensors").read_bytes() == file.read_bytes()


SPECIAL = [
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
    1e-40,
    -1e-45,
    3.4e38,
    65504.0,
    6e-8,
    1.00390625,
    1.01171875,
]


@pytest.mark.parametrize("dtype, torch_dtype", [("BF16", torch.bfloat16), ("F32", torch.float32)])
def test_another_dtype_is_as_torch_rounds(tmp_path, dtype, torch_dtype):
    source = make(tmp_path / "hf", "glm4_moe", bf16=dtype == "F32")
    content = load_file(source / "model.safetensors")
    special = torch.tensor(SPECIAL).to(content["model.norm.weight"].dtype)
    for name in ("model.norm.weight", "model.layers.1.self_attn.q_proj.weight"):
        content[name].flatten()[: len(special)] = special
    save_file(content, source / "model.safetensors", {"format": "pt"})
    assert to_megatron(source, tmp_path / "megatron") == 0
    assert to_huggingface(tmp_path / "megatron", tmp_path / "back", "--dtype", dtype) == 0
    back = load(tmp_path / "back")
    assert back.keys() == content.keys()
    for name, tensor in content.items():
        expected = tensor.to(torch_dtype)
        nan = expected.isnan()
        assert torch.equal(back[name].isnan(), nan), name
        assert same_bits(back[name].masked_fill(nan, 0), expected.masked_fill(nan, 0)), name
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = str(torch_dtype).removeprefix("torch.")
    assert json.loads((tmp_path / "back/config.json").read_text()) == config


def test_a_number_beyond_a_dtype_ends_the_conversion(tmp_path, capsys):
    source = make(tmp_path / "hf", "llama")
    content = load_file(source / "model.safetensors")
    content["model.norm.weight"][3] = 1e5
    save_file(content, source / "model.safetensors", {"format": "pt"})
    assert to_megatron(source, tmp_path / "megatron") == 0
    assert to_huggingface(tmp_path / "megatron", tmp_path / "half", "--dtype", "F16") == 2
    assert "a F32 number is beyond the range of F16" in capsys.readouterr().err
    assert not (tmp_path / "half").exists()


def test_rotary_frequencies_of_the_original_are_left_out_and_said_to_be(tmp_path, capsys):
    """Llama 2 and Moonlight store them in each layer."""
    source = make(tmp_path / "hf", "llama", bf16=True)
    expected = load(source)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(source, NORM, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert to_megatron(source, tmp_path / "megatron") == 0
    note = f"note: 1 tensors of the original are left out, for example {name}"
    assert note in capsys.readouterr().err
    assert to_huggingface(tmp_path / "megatron", tmp_path / "back") == 0
    assert note in capsys.readouterr().err
    assert same(load(tmp_path / "back"), expected)


def test_an_original_with_multi_token_prediction_gives_names_and_dtypes_of_what_was_trained(
    tmp_path, capsys
):
    """A run does not train it, so its checkpoints do not hold it."""
    trained = make(tmp_path / "trained", "deepseek_v3")
    expected = {}
    for name, tensor in load(trained).items():
        is_bias = name.endswith("e_score_correction_bias")
        expected[name] = tensor if is_bias else tensor.bfloat16()
    source = make(tmp_path / "hf", "deepseek_v3", bf16=True, mtp=True, shards=True)
    assert to_megatron(trained, tmp_path / "megatron") == 0
    assert to_huggingface(tmp_path / "megatron", tmp_path / "back", "--hf-checkpoint", source) == 0
    assert "tensors of the original are left out, for example model.layers.4." in (
        capsys.readouterr().err
    )
    assert same(load(tmp_path / "back"), expected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.dtype == torch.bfloat16
