"""The comparison of the parity tests sees NaN wherever it is."""

import copy
import math

import pytest
import torch

from nanoslime.batch import StepMetrics
from tests.training.parity import Outcome, assert_parity, compare


@pytest.fixture
def ref() -> Outcome:
    steps = [
        StepMetrics(1.0, 2.0, 0.1, False, {"train/a": 1.0}, {"train/b": 2.0}) for _ in range(2)
    ]
    tensors = {"x": torch.ones(2), "y": torch.ones(3)}
    return Outcome([torch.ones(2), torch.ones(3)], steps, [tensors, tensors], tensors)


def poisoned(ref: Outcome, where: str) -> Outcome:
    """NaN in the last entry of a quantity, after others that agree."""
    outcome, bad = copy.deepcopy(ref), torch.tensor([1.0, math.nan, 1.0])
    first, last = outcome.steps
    values = {"loss": last.loss, "norm": last.grad_norm} | {where: math.nan}
    maxima = {"train/b": math.nan} if where == "metrics" else last.maxima
    metrics = StepMetrics(values["loss"], values["norm"], 0.1, False, last.means, maxima)
    outcome.steps = [first, metrics]
    if where == "logprobs":
        outcome.logprobs[1] = bad
    if where == "params":
        outcome.params = outcome.params | {"y": bad}
    if where == "grads":
        outcome.grads = [outcome.grads[0], outcome.grads[1] | {"y": bad}]
    return outcome


@pytest.mark.parametrize("where", ["logprobs", "loss", "norm", "metrics", "params", "grads"])
def test_nan_is_a_difference(ref, where):
    outcome = poisoned(ref, where)
    assert [name for name, value in compare(outcome, ref).items() if math.isnan(value)] == [where]
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
