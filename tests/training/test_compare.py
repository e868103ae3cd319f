"""The comparison of the parity tests sees NaN wherever it is."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from nanoslime.batch import StepMetrics
from tests.training.parity import Outcome, assert_parity, compare


@pytest.fixture
def ref() -> Outcome:
    step = StepMetrics(
        loss=1.0,
        grad_norm=2.0,
        lr=0.1,
        skipped=False,
        means={"train/a": 1.0},
        maxima={"train/b": 2.0},
    )
    tensors = {"x": torch.ones(2), "y": torch.ones(3)}
    return Outcome(
        logprobs=[torch.ones(2), torch.ones(3)],
        steps=[step, step],
        grads=[tensors, tensors],
        params=tensors,
    )


def poisoned(ref: Outcome, where: str) -> Outcome:
    """NaN in the last entry of a quantity, after others that agree."""
    outcome = copy.deepcopy(ref)
    bad = torch.tensor([1.0, math.nan, 1.0])
    first, last = outcome.steps
    if where == "logprobs":
        outcome.logprobs[1] = bad
    elif where == "loss":
        outcome.steps = [first, replace(last, loss=math.nan)]
    elif where == "norm":
        outcome.steps = [first, replace(last, grad_norm=math.nan)]
    elif where == "metrics":
        outcome.steps = [first, replace(last, maxima={"train/b": math.nan})]
    elif where == "params":
        outcome.params = {**outcome.params, "y": bad}
    elif where == "grads":
        outcome.grads = [outcome.grads[0], {**outcome.grads[1], "y": bad}]
    return outcome


@pytest.mark.parametrize("where", ["logprobs", "loss", "norm", "metrics", "params", "grads"])
def test_nan_is_a_difference(ref, where):
    outcome = poisoned(ref, where)
    differences = compare(outcome, ref)
    assert [name for name, value in differences.items() if math.isnan(value)] == [where]
    with pytest.raises(AssertionError, match=rf"\['{where}'\] differ from plain PyTorch"):
        assert_parity(outcome, ref, "poisoned")
    if where != "grads":  # nor without gradients, which some layouts do not collect
        outcome.grads = []
        with pytest.raises(AssertionError, match=rf"\['{where}'\] differ from plain PyTorch"):
            assert_parity(outcome, ref, "poisoned")


def test_gradients_that_were_not_collected_are_no_difference(ref):
    outcome = copy.deepcopy(ref)
    outcome.grads = []
    assert_parity(outcome, ref, "without gradients")
