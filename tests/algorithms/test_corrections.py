"""Corrections of the gap between engine and trainer by hand: weights, rejections, and
what stays the same.
"""

import math

import pytest
import torch

from nanoslime.algorithms.corrections import correct, off_policy_sequences
from nanoslime.config.algorithm import CorrectionConfig, GRPOConfig
from tests.algorithms.made import algorithm, loss, pack

# two sequences of two tokens in the loss; the first has a masked token before them
BOUNDS = torch.tensor([0, 3, 5], dtype=torch.int32)
MASK = torch.tensor([False, True, True, True, True])
# Their products are 2 and 1.32, their geometric means 1.414 and 1.149.
W = torch.tensor([float("nan"), 4.0, 0.5, 1.1, 1.2])
SECOND_ROOT = 2**0.5, 1.32**0.5


def corrected(**knobs):
    """(weight of each token in the loss, which of them are kept, counts)"""
    config = CorrectionConfig(**knobs)
    correction = correct(config, W.log(), torch.zeros(5), MASK, BOUNDS)
    assert correction.weight.isfinite().all()
    counts = {name: int((flag & MASK).sum()) for name, flag in correction.flags.items()}
    return correction.weight[MASK].tolist(), correction.keep[MASK].tolist(), counts


def test_without_any_correction_weights_are_one_and_all_is_kept():
    assert corrected() == ([1.0] * 4, [True] * 4, {"rejected_ratio": 0})


@pytest.mark.parametrize(
    ("level", "expected", "clipped"),
    [
        ("token", [2.0, 0.6, 1.1, 1.2], 2),
        ("sequence", [2.0, 2.0, 1.32, 1.32], 0),
        ("geometric", [SECOND_ROOT[0]] * 2 + [SECOND_ROOT[1]] * 2, 0),
    ],
)
def test_truncated_importance_sampling_by_level(level, expected, clipped):
    weight, keep, counts = corrected(
        use_tis=True, tis_level=level, tis_clip=2.0 + 1e-5, tis_clip_low=0.6
    )
    assert weight == pytest.approx(expected, rel=1e-4) and all(keep)
    assert counts["tis_clip_ratio"] == clipped


def test_icepop_weighs_what_is_within_the_bounds_and_drops_the_rest():
    knobs = dict(use_tis=True, tis_clip=5.0, reject="token", reject_low=0.9, reject_high=1.15)
    weight, keep, counts = corrected(**knobs)
    assert keep == [False, False, True, False]
    assert weight[2] == pytest.approx(1.1)
    assert counts["rejected_ratio"] == 3


@pytest.mark.parametrize(
    ("level", "high", "kept"),
    [
        ("token", 2.5, [False, True, True, True]),
        ("sequence", 1.5, [False, False, True, True]),
        ("sequence", 2.5, [True, True, True, True]),
        ("geometric", 1.3, [False, False, True, True]),
        ("geometric", 1.45, [True, True, True, True]),
    ],
)
def test_masked_importance_sampling_by_level(level, high, kept):
    weight, keep, counts = corrected(reject=level, reject_low=0.1, reject_high=high)
    assert keep == kept and weight == [1.0] * 4
    assert counts["rejected_ratio"] == kept.count(False)


def test_low_weights_are_rejected_too():
    _, keep, _ = corrected(reject="token", reject_low=0.6, reject_high=9.0)
    assert keep == [True, False, True, True]


def test_one_impossible_token_vetoes_its_sequence():
    assert corrected(veto=0.6)[1] == [False, False, True, True]
    assert corrected(veto=0.4)[1] == [True] * 4
    _, keep, _ = corrected(veto=0.6, reject="token", reject_low=0.1, reject_high=1.15)
    assert keep == [False, False, True, False]


def test_a_weight_stays_finite_whatever_the_gap():
    far = torch.tensor([200.0, -200.0])
    correction = correct(
        CorrectionConfig(use_tis=True, tis_level="sequence", tis_clip=1e30),
        far,
        torch.zeros(2),
        torch.ones(2, dtype=torch.bool),
        torch.tensor([0, 1, 2], dtype=torch.int32),
    )
    assert correction.weight.tolist() == pytest.approx([math.exp(20), math.exp(-20)])


def test_drift_is_of_bad_sequences_by_the_mean_over_their_own_tokens():
    log_ratio = torch.tensor([0.0, -0.3, 0.1, -0.05, 0.0])  # means of engine - current: 0.1, 0.025
    bad = torch.full((5,), -1.0)
    good = torch.full((5,), 1.0)

    def gone(advantages, delta):
        return (off_policy_sequences(log_ratio, advantages, MASK, BOUNDS, delta) & MASK)[
            1:
        ].tolist()

    assert gone(bad, 0.05) == [True, True, False, False]
    assert gone(bad, 0.02) == [True] * 4
    assert gone(bad, 0.11) == [False] * 4
    assert gone(good, 0.02) == [False] * 4


@pytest.mark.parametrize("veto", [1e-6, 1e-12, 1e-30])
def test_a_veto_fires_however_small_it_is(veto):
    below = math.log(veto) - 1
    log_w = torch.tensor([0.0, below, 0.0, 0.0, below + 2])
    correction = correct(CorrectionConfig(veto=veto), log_w, torch.zeros(5), MASK, BOUNDS)
    assert correction.keep[MASK].tolist() == [False, False, True, True]


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_limits_beyond_any_clamp_reject_too(level):
    """ln of the weights, by sequence 60 and -60 in sum, 30 and -30 in the mean."""
    log_w = torch.tensor([0.0, 30.0, 30.0, -30.0, -30.0])
    bounds = {"token": 30, "sequence": 60, "geometric": 30}[level]

    def kept(low, high):
        config = CorrectionConfig(
            reject=level, reject_low=math.exp(low), reject_high=math.exp(high)
        )
        return correct(config, log_w, torch.zeros(5), MASK, BOUNDS).keep[MASK].tolist()

    assert kept(-bounds - 1, bounds + 1) == [True] * 4
    assert kept(-bounds + 1, bounds + 1) == [True, True, False, False]
    assert kept(-bounds - 1, bounds - 1) == [False, False, True, True]
    nothing_below = CorrectionConfig(reject=level, reject_low=0.0)
    assert correct(nothing_below, log_w, torch.zeros(5), MASK, BOUNDS).keep[3:].all()


# in the loss


def test_the_weight_is_on_the_policy_term_only():
    batch = pack([-1.0], [1.0], rollout=[-1.0 - math.log(1.5)], ref=[-1.5])
    knobs = dict(use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="k1", entropy_coef=0.01)
    correction = CorrectionConfig(use_tis=True)
    total, grad, _ = loss([-1.0], batch, entropy=[2.0], correction=correction, **knobs)
    assert total == pytest.approx(-1.5 + 0.1 * 0.5 - 0.01 * 2.0, rel=1e-5)
    assert grad == pytest.approx([-1.5 + 0.1], rel=1e-5)


def test_the_weight_has_no_gradient():
    """With old_logprobs current the weight is made of the very logprobs that have one."""
    batch = pack([0.0], [1.0], rollout=[-1.0 - math.log(1.5)])
    config = GRPOConfig(old_logprobs="current", correction=CorrectionConfig(use_tis=True))
    total, grad, _ = loss([-1.0], batch, algorithm(config))
    assert total == pytest.approx(-1.5, rel=1e-5)
    assert grad == pytest.approx([-1.5], rel=1e-5)


def test_rejection_changes_the_numerator_only():
    """A rejected token takes its terms along, all of them; weights and denominator are
    those of the masks.
    """
    batch = pack(
        [-1.0] * 3, [1.0, 2.0, 4.0], rollout=[-1.0, -2.0, -1.0], ref=[-1.5] * 3, weights=[0.25] * 3
    )
    correction = CorrectionConfig(reject="token", reject_high=2.0)  # e is above
    knobs = dict(use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="k1", entropy_coef=0.01)
    total, grad, metrics = loss(
        [-1.0] * 3, batch, entropy=[1.0] * 3, correction=correction, **knobs
    )
    # tokens 0 and 2: -(1 + 4) + 2 x 0.1 x 0.5 - 2 x 0.01, each weighted by a quarter as
    # before
    assert total == pytest.approx(0.25 * (-5 + 0.1 - 0.02))
    assert grad[1] == 0.0
    assert metrics["train/rejected_ratio"] == 1


def test_off_policy_sequence_masking_takes_the_policy_term_only():
    batch = pack([0.0, 0.0], [-1.0, 1.0], ref=[0.0, 0.0], rollout=[0.0, 0.0], bounds=[0, 1, 2])
    knobs = dict(use_kl_loss=True, kl_loss_coef=1.0, kl_loss_type="k1", eps_clip=0.9)
    correction = CorrectionConfig(use_opsm=True, opsm_delta=0.1)
    total, grad, metrics = loss([-0.2, -0.2], batch, correction=correction, **knobs)
    # the first sequence is bad and has drifted; the second is good
    assert total == pytest.approx(-0.2 - 0.2 - math.exp(-0.2))
    assert grad == pytest.approx([1.0, 1.0 - math.exp(-0.2)])
    assert metrics["train/opsm_ratio"] == 1


def test_the_limits_of_a_rejection_belong_to_what_is_kept():
    config = CorrectionConfig(reject="token", reject_low=1.0, reject_high=1.0)
    same = torch.zeros(5)
    assert correct(config, same, same, MASK, BOUNDS).keep.all()


@pytest.mark.parametrize("old_logprobs", ["recomputed", "rollout", "current"])
def test_off_policy_sequences_are_those_far_from_the_engine(old_logprobs):
    """arXiv 2512.02556, equation 9, by hand: A < 0, and means of engine - current of 0.3, 0.1
    and 0.3. The trainer has taken no step: old and current logprobs are the same.
    """
    current = [-0.5, -0.5, -0.5, -0.5, -0.5, -0.5]
    engine = [-0.1, -0.3, -0.4, -0.4, -0.2, -0.2]
    batch = pack(current, [-1.0] * 4 + [1.0] * 2, rollout=engine, bounds=[0, 2, 4, 6])
    knobs = dict(old_logprobs=old_logprobs, eps_clip=0.9)

    def masked(delta):
        correction = CorrectionConfig(use_opsm=True, opsm_delta=delta)
        _, grad, metrics = loss(current, batch, correction=correction, **knobs)
        assert [g == 0.0 for g in grad].count(True) == metrics["train/opsm_ratio"]
        return [g == 0.0 for g in grad]

    assert masked(0.2) == [True, True, False, False, False, False]
    assert masked(0.05) == [True, True, True, True, False, False]
    assert masked(0.35) == [False] * 6
