"""Sums and means over the sequences of a pack."""

import torch

from nanoslime.algorithms.sequences import sequence_mean, sequence_sum

BOUNDS = torch.tensor([0, 3, 4, 6], dtype=torch.int32)


def test_sums_and_means_by_hand():
    values = torch.tensor([1.0, 2.0, 0.0, 5.0, 0.0, 0.0])
    mask = torch.tensor([True, True, False, True, False, False])
    assert sequence_sum(values, BOUNDS).tolist() == [3, 3, 3, 5, 0, 0]
    assert sequence_mean(values, mask, BOUNDS).tolist() == [1.5, 1.5, 1.5, 5, 0, 0]


def test_the_gradient_of_a_token_comes_from_all_tokens_of_its_sequence():
    values = torch.zeros(6, requires_grad=True)
    (sequence_sum(values, BOUNDS) * torch.tensor([1.0, 10, 100, 1, 1, 10])).sum().backward()
    assert values.grad.tolist() == [111, 111, 111, 1, 11, 11]
