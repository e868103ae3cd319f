"""The KL estimators: exact values, sign, zero at equality, and the importance ratio in
the gradient.
"""

import math

import pytest
import torch

from nanoslime.algorithms.kl import approx_kl, k1, k2, k3

LOGP = torch.tensor([-1.0, -2.0, -0.5])
REF = torch.tensor([-1.5, -1.0, -0.5])  # d = -0.5, 1, 0


def test_values_by_hand():
    torch.testing.assert_close(k1(LOGP, REF), torch.tensor([0.5, -1.0, 0.0]))
    torch.testing.assert_close(k2(LOGP, REF), torch.tensor([0.125, 0.5, 0.0]))
    expected = [math.exp(-0.5) - 1 + 0.5, math.e - 2, 0.0]
    torch.testing.assert_close(k3(LOGP, REF), torch.tensor(expected))


@pytest.mark.parametrize("kind", ["k2", "k3", "low_var_kl"])
def test_estimator_is_never_negative_and_zero_at_equality(kind):
    logp = -torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 5
    near = logp + torch.randn(10_000, generator=torch.Generator().manual_seed(1)) * 1e-4
    far = logp + torch.randn(10_000, generator=torch.Generator().manual_seed(2)) * 3
    assert approx_kl(logp, near, kind).min() >= 0
    assert approx_kl(logp, far, kind).min() >= 0
    assert torch.equal(approx_kl(logp, logp, kind), torch.zeros_like(logp))


def test_k3_estimates_the_kl_without_bias():
    policy = torch.tensor([0.7, 0.2, 0.1])
    reference = torch.tensor([0.3, 0.3, 0.4])
    exact = (policy * (policy / reference).log()).sum()
    for estimator in (k1, k3):
        estimate = (policy * estimator(policy.log(), reference.log())).sum()
        assert estimate.item() == pytest.approx(exact.item(), rel=1e-5)


def test_low_var_kl_is_held_within_ten_with_a_finite_gradient():
    logp = torch.tensor([-100.0, -1.0], requires_grad=True)
    kl = approx_kl(logp, torch.tensor([0.0, -1.5]), "low_var_kl")
    assert kl.tolist() == pytest.approx([10.0, math.exp(-0.5) - 0.5])
    kl.sum().backward()
    assert logp.grad.tolist() == pytest.approx([0.0, 1 - math.exp(-0.5)])
    assert approx_kl(logp.detach()[:1], torch.tensor([-97.0]), "k3") > 10  # k3 itself is not held


def test_importance_ratio_makes_the_expected_gradient_that_of_the_kl():
    logits = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    reference = torch.tensor([0.5, 0.25, 0.25]).log()
    sampler = torch.tensor([0.2, 0.5, 0.3])  # the old policy, from which tokens come

    def gradient(expectation):
        return torch.autograd.grad(expectation, logits, retain_graph=True)[0]

    logp = logits.log_softmax(0)
    ratio = (logp - sampler.log()).exp()
    exact = gradient((logp.exp() * (logp - reference)).sum())
    unbiased = gradient((sampler * approx_kl(logp, reference, "k3", ratio)).sum())
    torch.testing.assert_close(unbiased, exact)
    detached = gradient((sampler * approx_kl(logp, reference, "k3", ratio.detach())).sum())
    assert (detached - exact).abs().max() > 0.01


def test_unknown_estimator_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="k4.*k1, k2, k3, low_var_kl"):
        approx_kl(LOGP, REF, "k4")
