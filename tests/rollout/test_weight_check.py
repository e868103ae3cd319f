"""Parameters that no update fills, or that one changes, are found by name."""

import pytest
import torch

from nanoslime.rollout import weight_check


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
