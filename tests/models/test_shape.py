"""The shape that config.json describes is that of the model transformers builds from it."""

import json

import pytest
import torch
import transformers

from nanoslime.models import ARCHITECTURES
from nanoslime.models.shape import MLA, ModelShape, MoE
from nanoslime.types import RunError
from tests.models.hf import FAMILIES, LLAMA3_ROPE, make_model, score_biases
from tests.models.published import CONFIGS


def read(tmp_path, config: dict) -> ModelShape:
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = ModelShape.read(tmp_path)
    assert ModelShape.from_config(config) == shape
    return shape


def num_elements(model: torch.nn.Module) -> int:
    """Elements in its files: parameters, tied ones once, and the biases of experts' scores."""
    held = [*model.parameters(), *score_biases(model).values()]
    return sum(tensor.numel() for tensor in held)


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_is_read_from_the_config_that_transformers_writes(tmp_path, family):
    model = make_model(family)
    model.config.save_pretrained(tmp_path)
    shape = ModelShape.read(tmp_path)
    assert shape.num_parameters == num_elements(model)
    assert (shape.num_layers, shape.vocab_size) == (4, 250)
    assert shape.tie_word_embeddings == model.config.tie_word_embeddings
    scaling_factor = 8.0 if family == "llama3" else None
    assert shape.rope_scaling_factor == scaling_factor
    assert shape.model_type == model.config.model_type
    lacks = ("norms after attention and MLP",) if shape.model_type == "glm4" else ()
    assert shape.megatron_lacks == lacks


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_are_read_as_transformers_reads_them(tmp_path, name):
    shape = read(tmp_path, CONFIGS[name])
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert shape.num_parameters == num_elements(model)
    assert shape.rope_theta == config.rope_parameters["rope_theta"]
    assert shape.rotary_fraction == config.rope_parameters.get("partial_rotary_factor", 1.0)


def test_experts_and_latent_attention_are_read():
    deepseek = ModelShape.from_config(CONFIGS["DeepSeek-V3"])
    assert deepseek.moe == MoE(
        layers=tuple(range(3, 62)),
        num_experts=256,
        num_experts_per_token=8,
        intermediate_size=2048,
        shared_intermediate_size=2048,
        score="sigmoid",
        score_bias=True,
        scaling_factor=2.5,
        num_groups=8,
        num_groups_per_token=4,
    )
    assert deepseek.mla == MLA(
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    assert ModelShape.from_config(CONFIGS["Qwen1.5-MoE-A2.7B"]).moe == MoE(
        layers=tuple(range(24)),
        num_experts=60,
        num_experts_per_token=4,
        intermediate_size=1408,
        shared_intermediate_size=5632,
        shared_gate=True,
        normalized=False,
    )
    moonlight = ModelShape.from_config(CONFIGS["Moonlight-16B-A3B"])
    assert moonlight.mla is not None and moonlight.mla.q_lora_rank is None
    assert moonlight.moe is not None and moonlight.moe.shared_intermediate_size == 2 * 1408
    assert (moonlight.head_dim, moonlight.num_mtp_layers) == (192, 0)
    air = ModelShape.from_config(CONFIGS["GLM-4.5-Air"])
    assert (air.qkv_bias, air.qk_norm, air.num_mtp_layers) == (True, False, 1)
    assert air.moe is not None and air.moe.layers == tuple(range(1, 47))


def test_a_moe_layer_is_every_nth_but_those_listed_as_dense():
    config = CONFIGS["Qwen1.5-MoE-A2.7B"] | {"num_hidden_layers": 8, "decoder_sparse_step": 2}
    moe = ModelShape.from_config(config | {"mlp_only_layers": [0, 3]}).moe
    assert moe is not None and moe.layers == (1, 5, 7)


def test_both_names_of_the_number_of_experts_are_read():
    config = CONFIGS["Qwen3-30B-A3B"]
    renamed = dict(config)
    renamed["num_local_experts"] = renamed.pop("num_experts")
    assert ModelShape.from_config(renamed) == ModelShape.from_config(config)


@pytest.mark.parametrize("model_type", ["glm4", "glm4_moe"])
def test_what_glm_leaves_out_means_what_transformers_takes_it_for(tmp_path, model_type):
    name = {"glm4": "GLM-4-9B-0414", "glm4_moe": "GLM-4.5-Air"}[model_type]
    left_out = {"attention_bias", "partial_rotary_factor", "use_qk_norm"}
    rest = {key: value for key, value in CONFIGS[name].items() if key not in left_out}
    shape = read(tmp_path, rest)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert shape.rotary_fraction == config.rope_parameters["partial_rotary_factor"] == 0.5
    assert shape.qkv_bias == config.attention_bias


def test_a_head_dim_of_null_is_the_share_of_the_hidden_size(tmp_path):
    assert read(tmp_path, CONFIGS["Mistral-7B-v0.3"]).head_dim == 128
    # The hidden size is 5120, and there are 32 heads.
    nemo = CONFIGS["Mistral-Nemo-2407"]
    assert read(tmp_path, nemo).head_dim == 128
    assert read(tmp_path, nemo | {"head_dim": None}).head_dim == 160


def test_flat_rope_keys_of_older_configs_are_read(tmp_path):
    config = json.loads(make_model("llama3").config.to_json_string())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = 2 * rope.pop("rope_theta")
    config["rope_scaling"] = rope
    shape = read(tmp_path, config)
    assert (shape.rope_theta, shape.rope_scaling_factor) == (20000.0, 8.0)


@pytest.mark.parametrize(
    ("name", "changes", "lacks"),
    [
        ("Mistral-7B-v0.1", {}, "sliding_window=4096"),
        ("Mistral-7B-v0.1", {"sliding_window": None}, ""),
        ("Mixtral-8x7B-v0.1", {"sliding_window": 4096}, "sliding_window=4096"),
        ("Qwen2.5-7B", {"use_sliding_window": True}, "sliding_window=131072"),
        ("Qwen3-4B", {"use_sliding_window": True, "sliding_window": 512}, "sliding_window=512"),
        ("DeepSeek-V3", {}, "rope scaling {'type': 'yarn'"),
        (
            "Qwen3-4B",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope scaling {'rope_ty",
        ),
        (
            "Qwen3-4B",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope scaling {'rope_ty",
        ),
        (
            "Llama-3.2-1B",
            {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 8.0}},
            "rope scaling {'rope_",
        ),
        (
            "Llama-2-7b",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope scaling {'type': 'linear'",
        ),
        ("GLM-4-9B-0414", {}, "norms after attention and MLP"),
    ],
)
def test_what_megatron_cannot_compute_is_listed_and_converts_all_the_same(
    tmp_path, name, changes, lacks
):
    shape = read(tmp_path, CONFIGS[name] | changes)
    if lacks:
        (listed,) = shape.megatron_lacks
        assert listed.startswith(lacks)
    else:
        assert shape.megatron_lacks == ()
    assert shape.architecture.rules(shape)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "Llama-2-7b",
            {"model_type": "gpt2"},
            "'gpt2' is not supported; known are deepseek_v3, glm4, gl",
        ),
        ("Llama-2-7b", {"model_type": "os:system"}, "is not supported; known are"),
        ("Llama-2-7b", {"hidden_size": None}, "has no hidden_size"),
        (
            "Llama-2-7b",
            {"attention_bias": True},
            "attention_bias=True is not supported, only False",
        ),
        ("Llama-2-7b", {"mlp_bias": True}, "mlp_bias=True is not supported, only False"),
        ("Llama-2-7b", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ("Qwen3-4B", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ("Qwen3-30B-A3B", {"num_experts": None}, "has no num_local_experts"),
        (
            "DeepSeek-V3",
            {"quantization_config": {"quant_method": "fp8"}},
            "fp8 weights .* dequantize them",
        ),
        (
            "DeepSeek-V3",
            {"attention_bias": True},
            "attention_bias=True is not supported, only False",
        ),
        ("DeepSeek-V3", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        ("DeepSeek-V3", {"topk_method": "greedy"}, "topk_method='greedy' is not supported"),
        ("DeepSeek-V3", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported, only 1"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, name, changes, message):
    with pytest.raises(RunError, match=message) as error:
        read(tmp_path, CONFIGS[name] | changes)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "does not exist"), ("{", "is not JSON"), ("[]", "not list")]
)
def test_a_missing_or_broken_config_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match=message) as error:
        ModelShape.read(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_untied", "mixtral", "deepseek_v3_no_q_lora"])
def test_a_layers_parameters_are_those_of_the_model_without_its_ends(tmp_path, family):
    model = make_model(family)
    model.config.save_pretrained(tmp_path)
    assert ModelShape.read(tmp_path).num_layer_parameters * 4 == num_elements(model.model.layers)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_line_of_the_table_resolves(model_type):
    config = next(c for c in CONFIGS.values() if c["model_type"] == model_type)
    shape = ModelShape.from_config(config)
    assert shape.model_type == model_type and shape.architecture.rules(shape)
