"""What holds for every entry of the table of algorithms, with all corrections and extra
terms off and on.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nanoslime import algorithms
from nanoslime.batch import Maximum, Metric, MicroBatch, TokenMean, WeightedMean
from nanoslime.config.algorithm import ALGORITHM_CONFIGS, CUSTOM, CorrectionConfig
from tests.algorithms.made import advantages, algorithm, group, number, pack, shard

CONFIGS = {name: c for name, c in ALGORITHM_CONFIGS.items() if name != CUSTOM}
EXTRAS = {
    "plain": {},
    "all": dict(
        use_kl_loss=True,
        kl_loss_coef=0.3,
        kl_loss_type="low_var_kl",
        use_unbiased_kl=True,
        entropy_coef=0.02,
        eps_clip=0.1,
        eps_clip_high=0.15,
        correction=CorrectionConfig(
            use_tis=True,
            tis_clip=1.2,
            tis_clip_low=0.7,
            reject="geometric",
            reject_low=0.85,
            reject_high=1.2,
            veto=0.5,
            use_opsm=True,
            opsm_delta=0.02,
        ),
    ),
    "other levels": dict(
        use_kl_loss=True,
        kl_loss_coef=0.3,
        kl_loss_type="k2",
        old_logprobs="current",
        correction=CorrectionConfig(
            use_tis=True,
            tis_level="sequence",
            tis_clip=1.5,
            reject="token",
            reject_low=0.6,
            reject_high=1.6,
        ),
    ),
}
every = pytest.mark.parametrize(
    "made",
    [
        pytest.param(algorithm(config(**knobs)), id=f"{name}-{extras}")
        for name, config in CONFIGS.items()
        for extras, knobs in EXTRAS.items()
    ],
)
LENGTHS = [4, 1, 7, 3, 5, 6]
PER_TOKEN = ["token_weights", "advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs"]


def batch(seed: int = 0) -> tuple[MicroBatch, Tensor, Tensor]:
    """Sequences of LENGTHS, a third of the tokens masked; the current logprobs and the
    entropy [T].
    """
    rng = torch.Generator().manual_seed(seed)
    size = sum(LENGTHS)

    def near(logprobs, spread):
        return logprobs + spread * torch.randn(size, generator=rng)

    old = -2 * torch.rand(size, generator=rng)
    of_sequence = torch.randn(len(LENGTHS), generator=rng)
    micro = pack(
        old.tolist(),
        of_sequence.repeat_interleave(torch.tensor(LENGTHS)).tolist(),
        mask=(torch.rand(size, generator=rng) < 0.7).tolist(),
        weights=(0.5 + torch.rand(size, generator=rng)).tolist(),
        ref=near(old, 0.5).tolist(),
        rollout=near(old, 0.3).tolist(),
        bounds=[0, *torch.tensor(LENGTHS).cumsum(0).tolist()],
    )
    return micro, near(old, 0.2), torch.rand(size, generator=rng)


def cut(micro: MicroBatch, tokens: Tensor, lengths: list[int]) -> MicroBatch:
    """The given tokens, as sequences of `lengths`."""
    names = ["token_ids", "positions", "loss_mask", *PER_TOKEN]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return replace(
        micro, cu_seqlens=bounds, **{name: getattr(micro, name)[tokens] for name in names}
    )


def outcome(made, micro, logprobs, entropy):
    """Loss, gradients to logprobs and entropy, metrics."""
    logprobs, entropy = (x.clone().requires_grad_() for x in (logprobs, entropy))
    total, metrics = made.loss(logprobs, entropy, micro)
    total.backward()
    zero = torch.zeros_like(entropy)
    return total.detach(), logprobs.grad, zero if entropy.grad is None else entropy.grad, metrics


def assert_same(got, expected, **tolerance):
    for one, other in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    assert got[3].keys() == expected[3].keys()
    for name in got[3]:
        one = got[3][name]
        other = expected[3][name]
        assert type(one) is type(other)
        torch.testing.assert_close(number(one), number(other), **tolerance)
        if isinstance(one, TokenMean):
            assert one.count == other.count


def combined(one: Metric, other: Metric) -> Metric:
    """The metric of two micro-batches together."""
    match one:
        case Maximum():
            return Maximum(torch.maximum(one.value, other.value))
        case TokenMean():
            return TokenMean(one.total + other.total, one.count + other.count)
        case WeightedMean():
            assert one.denominator == other.denominator
            return WeightedMean(one.total + other.total, one.denominator)


def spans():
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    return [torch.arange(end - length, end) for end, length in zip(ends, LENGTHS, strict=True)]


def test_the_table_has_what_the_configuration_can_name():
    assert set(algorithms.ALGORITHMS) == set(CONFIGS)
    for name, config in CONFIGS.items():
        made = algorithms.make(config())
        assert made.config.name == name
        assert made.config.denominator == config().denominator


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e4])
def test_masked_tokens_contribute_exactly_nothing(made, bad):
    micro, logprobs, entropy = batch()
    out = ~micro.loss_mask
    assert out.any()

    def holding(value):
        filled = {name: getattr(micro, name).masked_fill(out, value) for name in PER_TOKEN}
        return outcome(
            made,
            replace(micro, **filled),
            logprobs.masked_fill(out, value),
            entropy.masked_fill(out, value),
        )

    got = holding(bad)
    assert got[0].isfinite()
    assert not got[1][out].any()
    assert not got[2][out].any()
    assert_same(got, holding(0.0), rtol=0, atol=0)


@every
def test_masked_tokens_might_as_well_not_be_there(made):
    micro, logprobs, entropy = batch()
    tokens = micro.loss_mask.nonzero()[:, 0]
    lengths = [int(micro.loss_mask[span].sum()) for span in spans()]
    got = outcome(made, cut(micro, tokens, lengths), logprobs[tokens], entropy[tokens])
    whole = outcome(made, micro, logprobs, entropy)
    assert_same(got, (whole[0], whole[1][tokens], whole[2][tokens], whole[3]))


@every
def test_cutting_into_microbatches_changes_nothing(made):
    micro, logprobs, entropy = batch()
    whole = outcome(made, micro, logprobs, entropy)
    for cuts in ([[0], [1], [2], [3], [4], [5]], [[0, 1, 2], [3, 4, 5]], [[5, 0], [3], [1, 2, 4]]):
        total = torch.zeros(())
        metrics = {}
        gradients = torch.zeros_like(logprobs), torch.zeros_like(entropy)
        for part in cuts:
            tokens = torch.cat([spans()[i] for i in part])
            lengths = [LENGTHS[i] for i in part]
            one = outcome(made, cut(micro, tokens, lengths), logprobs[tokens], entropy[tokens])
            total = total + one[0]
            for of_all, of_part in zip(gradients, one[1:3], strict=True):
                of_all[tokens] = of_part
            for name, value in one[3].items():
                metrics[name] = combined(metrics[name], value) if name in metrics else value
        assert_same((total, *gradients, metrics), whole)


@every
def test_the_order_of_sequences_changes_nothing(made):
    micro, logprobs, entropy = batch()
    order = [3, 5, 0, 2, 4, 1]
    tokens = torch.cat([spans()[i] for i in order])
    got = outcome(
        made, cut(micro, tokens, [LENGTHS[i] for i in order]), logprobs[tokens], entropy[tokens]
    )
    whole = outcome(made, micro, logprobs, entropy)
    assert_same(got, (whole[0], whole[1][tokens], whole[2][tokens], whole[3]))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_zero_variance_group_has_exactly_no_gradient(name):
    made = algorithm(CONFIGS[name]())
    scalars = advantages([group(0, [0.7] * 8)], made)
    step = shard([[False, True, True]] * 8, scalars, old=[[0.0, -1.0, -1.0]] * 8)
    step.token_advantages = made.token_advantages(step, lambda value: value)
    micro = step.microbatch(range(8))
    logprobs = -torch.rand(24, generator=torch.Generator().manual_seed(0))
    assert not outcome(made, micro, logprobs, torch.zeros(24))[1].any()


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "rloo"])
def test_nor_has_it_beside_other_groups(name):
    made = algorithm(CONFIGS[name]())
    scalars = advantages([group(0, [0.7] * 8), group(1, [0.0, 1.0])], made)
    micro = pack([-1.0] * 10, scalars, bounds=list(range(11)))
    gradient = outcome(made, micro, torch.full((10,), -1.0), torch.zeros(10))[1]
    assert not gradient[:8].any() and gradient[8:].all()


# an independent way to write the same: float64, one sequence after another, one token
# after another


def plain_loss(config, micro: MicroBatch, logprobs: Tensor, entropy: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    current = config.old_logprobs == "current"
    c = config.correction
    for span in spans():
        t = [i for i in span.tolist() if micro.loss_mask[i]]
        if not t:
            continue
        new, old, engine, ref = (
            x[t].double()
            for x in (logprobs, micro.old_logprobs, micro.rollout_logprobs, micro.ref_logprobs)
        )
        old = new.detach() if current else old
        advantages = micro.advantages[t].double()
        ratio = (new - old).exp()
        terms = plain_terms(config, new, ratio, advantages)
        gaps = {
            "token": old - engine,
            "sequence": (old - engine).sum(),
            "geometric": (old - engine).mean(),
        }
        if c.use_tis:
            terms = terms * gaps[c.tis_level].exp().clamp(c.tis_clip_low, c.tis_clip)
        if c.use_opsm and float((engine - new).mean()) > c.opsm_delta:
            terms = terms * (advantages >= 0)
        d = ref - new
        kl = d * d / 2 if config.kl_loss_type == "k2" else d.exp() - 1 - d
        if config.use_unbiased_kl:
            kl = kl * ratio
        if config.kl_loss_type == "low_var_kl":
            kl = kl.clamp(-10, 10)
        terms = (
            terms + config.kl_loss_coef * config.use_kl_loss * kl - config.entropy_coef * entropy[t]
        )
        if c.reject != "none":
            w = gaps[c.reject].exp()
            terms = terms * ((c.reject_low <= w) & (w <= c.reject_high))
        if c.veto and (gaps["token"].exp() < c.veto).any():
            continue
        total = total + (terms * micro.token_weights[t]).sum()
    return total


def plain_terms(config, new: Tensor, ratio: Tensor, advantages: Tensor) -> Tensor:
    low = 1 - config.eps_clip
    high = 1 + (config.eps_clip if config.eps_clip_high is None else config.eps_clip_high)
    if config.name == "cispo":
        return -ratio.detach().clamp(low, high) * advantages * new
    if config.name == "gspo":
        ratio = torch.prod(ratio) ** (1 / len(ratio)) * torch.ones_like(ratio)
    return -torch.stack(
        [min(r * a, max(min(r, high), low) * a) for r, a in zip(ratio, advantages, strict=True)]
    )


@every
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_the_formula_written_out(made, seed):
    micro, logprobs, entropy = batch(seed)
    got = outcome(made, micro, logprobs, entropy)
    variables = [x.clone().requires_grad_() for x in (logprobs, entropy)]
    expected = plain_loss(made.config, micro, *variables)
    gradients = torch.autograd.grad(expected, variables, allow_unused=True, materialize_grads=True)
    assert got[1].any()
    torch.testing.assert_close(got[0].double(), expected.detach(), rtol=1e-5, atol=1e-5)
    for one, other in zip(got[1:3], gradients, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5)


def test_the_cases_above_meet_every_switch():
    """Each correction changes something in the batch of the tests, and clips leave tokens
    on either side.
    """
    for name in CONFIGS:
        sizes = [outcome(algorithm(CONFIGS[name](**EXTRAS["all"])), *batch(s))[3] for s in range(3)]
        for share in ("clip_ratio", "tis_clip_ratio", "rejected_ratio", "opsm_ratio"):
            counts = [int(metrics[f"train/{share}"].total) for metrics in sizes]
            assert any(0 < n < sum(LENGTHS) / 2 for n in counts), f"{name}: {share} {counts}"
