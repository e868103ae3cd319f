"""Parameters that no update fills, or that one changes, are found by name; and so is what keeps a
trainer from sending to an engine.
"""

import re

import pytest
import torch
from transformers import PreTrainedModel

from nanoslime.models.rules import FLOAT32, Shapes, optional_tensors, tensors
from nanoslime.models.shape import ModelShape
from nanoslime.rollout import weight_check
from nanoslime.rollout.weight_check import ExpectedTensors
from nanoslime.types import TensorKind
from tests.models.hf import FAMILIES, make_model


def test_a_parameter_that_stays_empty_anywhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are looked at in parts, as an engine has little memory left."""
    monkeypatch.setattr(weight_check, "_NUM_AT_A_TIME", 4)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in ("one", "two")})
    model["one"].register_parameter(
        "scale", torch.nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    )
    weight_check.empty(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert weight_check.left_empty(model) is None
    with torch.no_grad():
        model["two"].weight[2, 2] = torch.nan
    found = weight_check.left_empty(model)
    assert found == "1 parameters of the engine are NaN after the update: two.weight"


def test_a_parameter_that_a_loader_takes_away_has_changed() -> None:
    model = torch.nn.Linear(2, 2)
    before = weight_check.fingerprints(model)
    assert weight_check.changed(model, before) is None
    del model.bias
    found = weight_check.changed(model, before)
    assert found == "1 parameters of the engine were not what the trainer has: bias"


def kinds_of(shapes: Shapes, dtype: str) -> list[TensorKind]:
    """The router's bias is of float32, whatever the model is."""
    return [
        (name, "torch.float32" if name.endswith(FLOAT32) else dtype, shape)
        for name, shape in shapes.items()
    ]


def expected_by(model: PreTrainedModel) -> ExpectedTensors:
    shape = ModelShape.from_config(model.config.to_dict())
    return ExpectedTensors(tensors(shape), optional_tensors(shape))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_need_not_be_sent_may_be_sent_or_not(family: str) -> None:
    """A tied output layer, and the layers of multi-token prediction, which no engine loads."""
    model = make_model(family).bfloat16()
    expected = expected_by(model)
    kinds = kinds_of(expected.required, "torch.bfloat16")
    optional = kinds_of(expected.optional, "torch.bfloat16")
    assert expected.disagreement(kinds, model) is None
    assert expected.disagreement([*optional, *kinds], model) is None


def test_an_engine_that_keeps_a_router_in_float32_is_one_of_bfloat16() -> None:
    model = make_model("glm4_moe").bfloat16()
    expected = expected_by(model)
    model.get_submodule("model.layers.1.mlp.gate").float()
    assert expected.disagreement(kinds_of(expected.required, "torch.bfloat16"), model) is None
    problem = expected.disagreement(kinds_of(expected.required, "torch.float32"), model)
    assert problem is not None and problem.endswith("the engine was loaded as torch.bfloat16")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_hidden_layers": 3}, "'model.layers.3.input_layernorm.weight' .* no such tensor"),
        ({"head_dim": 8}, r"'model.layers.0.self_attn.[qk]_norm.weight' .* \[16\], .* \[8\]"),
    ],
)
def test_a_model_that_was_loaded_otherwise_than_its_config_says_is_named(
    change: dict[str, int], problem: str
) -> None:
    expected = expected_by(make_model("qwen3"))
    kinds = kinds_of(expected.required, "torch.float32")
    found = expected.disagreement(kinds, make_model("qwen3", **change))
    assert found is not None and re.search(problem, found)
