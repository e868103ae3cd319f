"""The shape that config.json describes is that of the model transformers builds from it."""

import json

import pytest

from nanoslime.models import ARCHITECTURES
from nanoslime.models.shape import ModelShape
from tests.models.hf import FAMILIES, make_model


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_is_read_from_the_config_that_transformers_writes(tmp_path, family):
    model = make_model(family)
    model.config.save_pretrained(tmp_path)
    shape = ModelShape.read(tmp_path)
    assert shape.num_parameters == model.num_parameters()
    assert (shape.num_layers, shape.vocab_size, shape.rope_theta) == (4, 250, 10000.0)
    assert shape.rope_scaling_factor == (8.0 if family == "llama3" else None)
    assert shape.model_type == model.config.model_type


def test_flat_rope_keys_of_older_configs_are_read(tmp_path):
    config = json.loads(make_model("llama3").config.to_json_string())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta") * 2, "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = ModelShape.read(tmp_path)
    assert (shape.rope_theta, shape.rope_scaling_factor) == (20000.0, 8.0)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "mixtral"}, "model_type='mixtral' is not .* llama, qwen2, qwen3"),
        ("llama", {"model_type": "os:system"}, "is not supported; known are"),
        ("llama", {"hidden_size": None}, "has no hidden_size"),
        ("llama", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope scaling .*yarn"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, family, changes, message):
    config = json.loads(make_model(family).config.to_json_string()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        ModelShape.read(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "does not exist"), ("{", "cannot be read"), ("[]", "not list")]
)
def test_a_missing_or_broken_config_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        ModelShape.read(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_memory_estimate_counts_the_fullest_rank(tmp_path):
    make_model("qwen3_untied").config.save_pretrained(tmp_path)
    shape = ModelShape.read(tmp_path)
    assert shape.rank_parameters(1, 1) == pytest.approx(shape.num_parameters, abs=shape.hidden_size)
    end_of_pipeline = 2 * shape.num_layer_parameters + shape.num_embedding_parameters
    assert shape.rank_parameters(2, 2) == end_of_pipeline // 2
    alone = shape.training_bytes(2, 2, 1, distributed_optimizer=True)
    assert alone == 18 * shape.rank_parameters(2, 2)
    assert shape.training_bytes(2, 2, 4, distributed_optimizer=True) == alone // 2
    assert shape.training_bytes(2, 2, 4, distributed_optimizer=False) == alone


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_line_of_the_table_resolves(tmp_path, model_type):
    family = next(f for f in FAMILIES if f.startswith(model_type))
    make_model(family).config.save_pretrained(tmp_path)
    shape = ModelShape.read(tmp_path)
    assert shape.architecture.read is not None and shape.architecture.rules(shape)
