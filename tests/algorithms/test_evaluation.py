"""mean@k, pass@k and their standard errors, by hand."""

import math
from itertools import combinations

import pytest

from nanoslime.algorithms.evaluation import evaluation_metrics, pass_at_k, standard_error
from nanoslime.types import Status
from tests.algorithms.made import group


@pytest.mark.parametrize(
    ("num_samples", "num_passed", "k", "expected"),
    [
        (4, 1, 2, 0.5),  # 1 - 3/6
        (5, 2, 3, 0.9),  # 1 - 1/10
        (5, 2, 1, 0.4),
        (5, 0, 5, 0.0),
        (5, 1, 5, 1.0),
        (1, 1, 1, 1.0),
        (10_000, 1, 5_000, 0.5),  # neither a factorial nor a binomial overflows
    ],
)
def test_pass_at_k_by_hand(num_samples, num_passed, k, expected):
    assert pass_at_k(num_samples, num_passed, k) == pytest.approx(expected, rel=1e-12)


def test_pass_at_k_is_the_share_of_choices_of_k_samples_with_one_that_passes():
    for num_samples in range(1, 7):
        for num_passed in range(num_samples + 1):
            for k in range(1, num_samples + 1):
                choices = list(combinations(range(num_samples), k))
                share = sum(min(choice) < num_passed for choice in choices) / len(choices)
                assert pass_at_k(num_samples, num_passed, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("k", [0, -1, 5])
def test_pass_at_k_needs_k_samples(k):
    with pytest.raises(ValueError, match=f"pass@{k} cannot be estimated from 4 samples"):
        pass_at_k(4, 1, k)


def test_standard_error_by_hand():
    assert standard_error([1.0, 0.0, 1.0, 0.0]) == pytest.approx(math.sqrt(1 / 3 / 4))
    assert standard_error([0.25, 0.25]) == 0.0
    assert standard_error([0.25]) is None


def test_the_metrics_of_two_prompts_by_hand():
    found = evaluation_metrics(
        [group(0, [1, 0, 0, 0], lengths=[1, 2, 3, 4]), group(1, [1, 1, 1, 0])]
    )
    assert found == pytest.approx(
        {
            "reward_mean": 0.5,
            "mean@4": 0.5,  # of 1/4 and 3/4
            "mean@4_se": 0.25,
            "pass@1": 0.5,
            "pass@1_se": 0.25,
            "pass@2": 0.75,  # of 1/2 and 1
            "pass@2_se": 0.25,
            "pass@4": 1.0,
            "pass@4_se": 0.0,
            "truncated_ratio": 0.0,
            "error_ratio": 0.0,
            "response_tokens_mean": 18 / 8,
        }
    )


def test_the_number_of_samples_and_the_powers_of_two_below_it_are_told():
    found = evaluation_metrics([group(0, [1, 0, 0]), group(1, [1, 1, 0])])
    estimates = {name for name in found if "@" in name and not name.endswith("_se")}
    assert estimates == {"mean@3", "pass@1", "pass@2", "pass@3"}


def test_more_samples_of_the_same_prompts_are_no_further_evidence_of_other_prompts():
    once = evaluation_metrics([group(0, [1]), group(1, [0]), group(2, [0])])
    often = evaluation_metrics([group(0, [1] * 8), group(1, [0] * 8), group(2, [0] * 8)])
    assert once["mean@1_se"] == often["mean@8_se"] == pytest.approx(1 / 3)


def test_each_prompt_weighs_the_same_however_many_samples_it_has():
    found = evaluation_metrics([group(0, [1, 1, 1]), group(1, [0])])
    assert found["mean@1"] == 0.5 and found["pass@1"] == 0.5
    assert "pass@2" not in found  # prompt 1 has one sample


def test_one_prompt_has_no_standard_error():
    found = evaluation_metrics([group(0, [1, 0])])
    assert found["mean@2"] == 0.5 and not [name for name in found if name.endswith("_se")]


def test_a_sample_passes_with_the_reward_that_the_set_asks_for():
    groups = [group(0, [0.5, 0.4])]
    assert evaluation_metrics(groups)["pass@2"] == 0.0
    assert evaluation_metrics(groups, pass_reward=0.5)["pass@2"] == 1.0
    assert 0.7 + 0.2 + 0.1 < 1
    assert evaluation_metrics([group(0, [0.7 + 0.2 + 0.1])])["pass@1"] == 1.0


def test_siblings_are_one_rollout():
    found = evaluation_metrics([group(0, [1, 1, 0], rollout_ids=[7, 7, 8])])
    assert found["mean@2"] == 0.5 and found["pass@1"] == 0.5


def test_a_sample_without_a_reward_counts_as_reward_0():
    failing = group(0, [1.0, None, 1.0, 1.0])
    failing.samples[1].status = Status.ERROR
    failing.samples[2].status = Status.TRUNCATED
    found = evaluation_metrics([failing])
    assert (found["mean@4"], found["pass@1"]) == (0.75, 0.75)
    assert (found["error_ratio"], found["truncated_ratio"]) == (0.25, 0.25)


@pytest.mark.parametrize("groups", [[], [group(0, [])]])
def test_an_evaluation_without_samples_is_refused(groups):
    with pytest.raises(ValueError, match="needs a sample of each of its prompts"):
        evaluation_metrics(groups)
