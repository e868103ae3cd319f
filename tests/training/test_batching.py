"""The plan of steps, ranks and micro-batches: nothing lost, nothing twice, and no
influence on the loss.
"""

import itertools
import pickle
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from nanoslime.batch import TrainBatch
from nanoslime.training.batching import (
    BatchingOptions,
    fill,
    kept_arrays,
    plan_train_batches,
)
from nanoslime.types import GroupReport, KeptArrays, Sample, SampleGroup, Status
from tests.training.batches import make_train_batches


def sample(group_id, rollout_id, length, response, advantage=1.0):
    mask = np.arange(length) >= length - response
    return Sample(
        group_id=group_id,
        rollout_id=rollout_id,
        token_ids=np.full(length, rollout_id, dtype=np.int32),
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -1.0, 0.0).astype(np.float32),
        policy_versions=[(0, 0)],
        status=Status.COMPLETED,
        advantage=advantage,
    )


def random_groups(seed, num_groups=7):
    rng = np.random.default_rng(seed)
    ids = itertools.count(1)
    groups = []
    for group_id in range(num_groups):
        samples = []
        for _ in range(rng.integers(1, 6)):
            rollout_id = next(ids)
            for _ in range(rng.choice([1, 1, 3])):  # siblings
                length = int(rng.integers(2, 40))
                response = rng.integers(0, length)
                advantage = rng.normal()
                samples.append(sample(group_id, rollout_id, length, response, advantage))
        groups.append(SampleGroup(group_id, samples))
    return groups


def batches(groups, **changes):
    options = BatchingOptions(
        num_steps=1, dp_size=2, max_tokens=50, denominator="tokens", temperature=1.0
    )
    return make_train_batches(groups, replace(options, **changes))


def real_sequences(shard):
    """(token id, length) of what is in the micro-batches, dummies left out (they have
    token 0).
    """
    used = [i for m in shard.microbatches for i in m]
    assert sorted(used) == list(range(len(shard.token_ids)))  # each once
    found = []
    for i in used:
        token_ids = shard.token_ids[i]
        first = int(token_ids[0])
        if first != 0:
            found.append((first, len(token_ids)))
    return found


def summed_loss(steps):
    """Per step: sum over ranks and micro-batches of an arbitrary function of each token,
    divided as a backend does.
    """
    losses = []
    for step in steps:
        total = 0.0
        for shard in step:
            for indices in shard.microbatches:
                m = shard.microbatch(indices)
                terms = torch.sin(m.token_ids.double() + m.positions) * m.advantages
                weighted = terms * m.loss_mask * m.token_weights
                total += weighted.sum().item() / m.denominator
        losses.append(total)
    return losses


LAYOUTS = [(1, 10**6), (1, 1), (2, 50), (3, 64), (4, 40), (16, 200)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("dp_size", "max_tokens"), LAYOUTS)
@pytest.mark.parametrize("num_steps", [1, 3])
def test_every_sequence_once_within_the_budget_and_equally_many_microbatches(
    seed, dp_size, max_tokens, num_steps
):
    groups = random_groups(seed)
    steps = batches(groups, dp_size=dp_size, max_tokens=max_tokens, num_steps=num_steps)
    assert len(steps) == num_steps
    assert all(len(step) == dp_size for step in steps)
    got = Counter(s for step in steps for shard in step for s in real_sequences(shard))
    assert got == Counter((s.rollout_id, s.num_tokens) for g in groups for s in g.samples)
    for step in steps:
        assert len({len(shard.microbatches) for shard in step}) == 1
        assert {(s.denominator, s.num_tokens, s.num_sequences) for s in step} == {
            (step[0].denominator, step[0].num_tokens, step[0].num_sequences)
        }
        for shard in step:
            for indices in shard.microbatches:
                assert indices
                num_tokens = sum(len(shard.token_ids[i]) for i in indices)
                assert len(indices) == 1 or num_tokens <= max_tokens


def test_micro_batches_come_in_multiples_with_dummies_where_sequences_do_not_suffice():
    groups = random_groups(0)
    [step] = batches(groups, max_tokens=10**6, microbatch_multiple=4)
    assert [len(shard.microbatches) for shard in step] == [4, 4]
    assert summed_loss([step]) == pytest.approx(summed_loss(batches(groups)), rel=1e-6)
    one = SampleGroup(0, [sample(0, 1, 5, 4)])
    [[shard]] = batches([one], dp_size=1, microbatch_multiple=2)
    assert shard.microbatches == [[0], [1]]
    assert not shard.loss_mask[1].any()


@pytest.mark.parametrize("denominator", ["tokens", "sequences", "fixed"])
@pytest.mark.parametrize("seed", range(5))
def test_layout_does_not_change_the_loss(denominator, seed):
    groups = random_groups(seed)

    def losses(dp_size, max_tokens):
        steps = batches(
            groups,
            dp_size=dp_size,
            max_tokens=max_tokens,
            num_steps=2,
            denominator=denominator,
            fixed_length=30,
        )
        return summed_loss(steps)

    reference = losses(*LAYOUTS[0])
    for layout in LAYOUTS[1:]:
        assert losses(*layout) == pytest.approx(reference, rel=1e-6)


def test_denominators_by_hand():
    samples = [sample(0, 1, 5, 4), sample(0, 2, 5, 2), sample(0, 2, 5, 3)]
    groups = [SampleGroup(0, samples)]
    (step,) = batches(groups, dp_size=1)
    assert step[0].denominator == 9
    assert step[0].num_tokens == 9
    assert step[0].token_weights == [1, 1, 1]
    (step,) = batches(groups, dp_size=1, denominator="sequences")
    # two rollouts, one of two siblings
    assert step[0].denominator == 2
    assert step[0].num_sequences == 3
    assert step[0].token_weights == [1 / 4, 1 / 5, 1 / 5]
    (step,) = batches(groups, dp_size=1, denominator="fixed", fixed_length=10)
    # two rollouts of ten
    assert step[0].denominator == 20
    assert step[0].token_weights == [1, 1, 1]


def test_groups_go_to_steps_in_order_and_stay_whole():
    groups = [SampleGroup(g, [sample(g, 10 * g + i, 4, 2) for i in (1, 2)]) for g in range(5)]
    parts = groups[:4] + [SampleGroup(0, [sample(0, 3, 4, 2)])]  # group 0 in two parts

    def ids(steps):
        found = []
        for step in steps:
            sequences = [sequence for shard in step for sequence in real_sequences(shard)]
            found.append(sorted(token // 10 for token, _ in sequences))
        return found

    assert ids(batches(groups, num_steps=2)) == [[0, 0, 1, 1], [2, 2, 3, 3, 4, 4]]
    assert ids(batches(parts, num_steps=2)) == [[0, 0, 0, 1, 1], [2, 2, 3, 3]]
    assert len(batches(groups[:2], num_steps=4)) == 2
    assert batches([], num_steps=4) == []


def test_load_is_balanced_by_cost():
    lengths = [100, 60, 50, 40, 30, 20, 20, 10]
    groups = [SampleGroup(0, [sample(0, i + 1, n, 1) for i, n in enumerate(lengths)])]
    (step,) = batches(groups, max_tokens=1000)
    tokens = [sum(n for _, n in real_sequences(shard)) for shard in step]
    assert sorted(tokens) == [160, 170]


def test_micro_batches_are_split_before_dummies_are_added():
    lengths = [60, 60, 40, 40, 40]  # 60 + 40 + 40 on one rank, 60 + 40 on the other
    groups = [SampleGroup(0, [sample(0, i + 1, n, 1) for i, n in enumerate(lengths)])]
    (step,) = batches(groups, max_tokens=100)
    assert [len(shard.microbatches) for shard in step] == [2, 2]
    assert [len(shard.token_ids) for shard in step] == [3, 2]


def test_the_same_groups_give_the_same_plan():
    a, b = (batches(random_groups(1), dp_size=3) for _ in range(2))
    assert [[s.microbatches for s in step] for step in a] == [
        [s.microbatches for s in step] for step in b
    ]
    assert all(
        torch.equal(x, y)
        for p, q in zip(a[0], b[0], strict=True)
        for x, y in zip(p.token_ids, q.token_ids, strict=True)
    )


def test_a_rank_without_sequences_gets_a_dummy_out_of_the_loss():
    (step,) = batches([SampleGroup(0, [sample(0, 1, 6, 3)])], dp_size=2)
    dummy = step[1].microbatch(step[1].microbatches[0])
    assert not dummy.loss_mask.any() and dummy.token_weights.sum() == 0
    assert dummy.denominator == 3


def test_a_step_with_nothing_in_the_loss_divides_by_one():
    (step,) = batches([SampleGroup(0, [sample(0, 1, 6, 0)])], dp_size=1)
    assert step[0].denominator == 1 and step[0].num_tokens == 0


def test_unusable_samples_are_refused_by_name():
    with pytest.raises(ValueError, match="group 3, rollout 9: token 0 is in the loss"):
        batches([SampleGroup(3, [sample(3, 9, 4, 4)])])
    short = sample(3, 9, 4, 2)
    short.rollout_logprobs = short.rollout_logprobs[1:]
    with pytest.raises(ValueError, match="equally long"):
        batches([SampleGroup(3, [short])])


def test_no_two_ranks_differ_by_much_however_the_lengths_are_spread():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5, 1, 60).clip(2, 1000).astype(int)
    groups = [SampleGroup(0, [sample(0, i + 1, n, 1) for i, n in enumerate(lengths)])]
    (step,) = batches(groups, dp_size=4, max_tokens=1000, parity_tokens=500.0)
    costs = [sum(n * (1 + n / 500) for _, n in real_sequences(shard)) for shard in step]
    assert max(costs) <= 1.01 * np.mean(costs)


def with_experts(groups):
    """Token t of rollout r went to experts r + t of every layer; what has no response has
    none.
    """
    for s in (s for group in groups for s in group.samples if s.num_response_tokens):
        s.routed_experts = np.zeros((s.num_tokens - 1, 3, 2), np.uint8)
        s.routed_experts[:] = (s.token_ids[0] + np.arange(s.num_tokens - 1))[:, None, None]
    return groups


def test_routed_experts_stay_with_their_tokens_and_unknown_ones_are_minus_one():
    steps = batches(with_experts(random_groups(0)), dp_size=4, num_steps=2)
    for shard in itertools.chain(*steps):
        for ids, mask, experts in zip(
            shard.token_ids, shard.loss_mask, shard.routed_experts, strict=True
        ):
            assert (experts.shape, experts.dtype) == ((len(ids), 3, 2), torch.int16)
            known = int(ids[0]) + torch.arange(len(ids) - 1) if mask.any() else torch.tensor(-1)
            assert (experts[:-1] == known.view(-1, 1, 1)).all()
            assert (experts[-1] == -1).all()
        packed = shard.microbatch(shard.microbatches[0]).routed_experts
        assert torch.equal(
            packed, torch.cat([shard.routed_experts[i] for i in shard.microbatches[0]])
        )


def test_a_rank_of_dummies_knows_the_size_of_the_experts():
    only = SampleGroup(0, [sample(0, 1, 5, 3)])
    shards = batches(with_experts([only]))[0]
    assert [[len(e) for e in shard.routed_experts] for shard in shards] in ([[5], [2]], [[2], [5]])


def test_a_sample_of_the_loss_without_experts_is_named():
    groups = with_experts([SampleGroup(i, [sample(i, i + 1, 5, 3)]) for i in range(2)])
    groups[1].samples[0].routed_experts = None
    with pytest.raises(
        ValueError, match="a sample of group 1 lacks routed_experts, which others have"
    ):
        batches(groups)


def spanned(group_id, rollout_id, spans, length=9, response=6, advantage=1.0):
    """A sample whose tokens are of several versions; `spans` are (first token, version)."""
    made = sample(group_id, rollout_id, length, response, advantage)
    made.policy_versions = spans
    return made


MIXED = [(0, 3), (5, 4), (7, 5)]  # of six tokens in the loss, two are of each version


@pytest.mark.parametrize("denominator", ["tokens", "sequences", "fixed"])
@pytest.mark.parametrize("oldest", [3, 4, 5])
def test_stale_tokens_leave_the_loss_as_if_the_mask_had_left_them_out(denominator, oldest):
    def groups():
        samples = [
            spanned(0, 1, MIXED, advantage=0.7),
            spanned(0, 1, [(3, 5), (4, 3)], advantage=-0.3),  # a sibling
            spanned(0, 2, [(0, 5)], advantage=2.0),
            spanned(0, 3, [(0, 2)], advantage=9.0),  # all of it is stale
        ]
        return [SampleGroup(0, samples)]

    masked = groups()
    for s in masked[0].samples:
        for first, end, version in s.arrays.spans():
            if version < oldest:
                s.loss_mask[first:end] = False
    masked[0].samples = [s for s in masked[0].samples if s.num_response_tokens]
    options = {"denominator": denominator, "fixed_length": 10}
    given = groups()
    got = batches(given, oldest_version_in_loss=oldest, **options)
    assert_same(got, batches(masked, **options))
    assert summed_loss(got) != pytest.approx(summed_loss(batches(groups(), **options)))
    # What was recorded stays as it was.
    assert [s.num_response_tokens for s in given[0].samples] == [6] * 4


@pytest.mark.parametrize("denominator", ["tokens", "sequences", "fixed"])
def test_masked_truncated_samples_leave_the_loss_as_if_they_had_not_been_sampled(denominator):
    """Siblings of one rollout go one by one; advantages stay those of the whole group."""

    def groups():
        samples = [sample(0, 1, 9, 6, 0.7), sample(0, 1, 5, 2, 0.7), sample(0, 2, 7, 6, -0.9)]
        samples[0].status = Status.TRUNCATED
        cut = sample(1, 3, 8, 8 - 1, 1.5)
        cut.status = Status.TRUNCATED
        return [SampleGroup(0, samples), SampleGroup(1, [cut])]

    left = SampleGroup(0, groups()[0].samples[1:])
    options = {"denominator": denominator, "fixed_length": 10}
    masked = batches(groups(), mask_truncated=True, **options)
    assert_same(masked, batches([left], **options))
    assert summed_loss(masked) != pytest.approx(summed_loss(batches(groups(), **options)))
    assert batches(groups()[1:], mask_truncated=True) == []


def test_a_rollout_of_stale_tokens_has_no_step():
    groups = [SampleGroup(g, [spanned(g, g + 1, [(0, 1)])]) for g in range(2)]
    assert batches(groups, oldest_version_in_loss=2) == []
    assert len(batches(groups, oldest_version_in_loss=1)) == 1


def test_a_report_counts_the_tokens_in_the_loss_by_their_version():
    report = spanned(0, 1, [(0, 4), (5, 3), (7, 4)]).report(None)
    assert list(report.loss_tokens_by_version.items()) == [(3, 2), (4, 4)]
    # The prompt is of no version; a span without tokens in the loss counts nothing.
    assert spanned(0, 1, [(0, 1), (3, 2)]).report(None).loss_tokens_by_version == {2: 6}


def assert_same(some, others):
    """The batches are equal bit for bit."""
    assert [len(step) for step in some] == [len(step) for step in others]
    for one, other in zip(itertools.chain(*some), itertools.chain(*others), strict=True):
        for field in fields(TrainBatch):
            a, b = getattr(one, field.name), getattr(other, field.name)
            if isinstance(a, list) and isinstance(a[0], torch.Tensor):
                assert len(a) == len(b)
                assert all(x.dtype == y.dtype and x.equal(y) for x, y in zip(a, b, strict=True))
            else:
                assert a == b, field.name


@pytest.mark.parametrize("seed", range(3))
def test_plans_hold_no_arrays_and_filled_with_fetched_ones_they_are_the_batches(seed):
    groups = with_experts(random_groups(seed))
    options = BatchingOptions(
        num_steps=2, dp_size=3, max_tokens=50, denominator="sequences", temperature=0.7
    )
    fetched = {
        KeptArrays(worker=1, group_id=group.group_id, index=index): sample.arrays
        for group in groups
        for index, sample in enumerate(group.samples)
    }
    reports = [
        GroupReport(
            group.group_id,
            [
                sample.report(KeptArrays(1, group.group_id, index))
                for index, sample in enumerate(group.samples)
            ],
        )
        for group in groups
    ]
    plans = pickle.loads(pickle.dumps(plan_train_batches(reports, options)))
    assert len(pickle.dumps(plans)) < 20_000
    asked = kept_arrays([plan for step in plans for plan in step])
    assert sorted(asked, key=str) == sorted(fetched, key=str)
    filled = [[fill(plan, fetched) for plan in step] for step in plans]
    assert_same(filled, make_train_batches(groups, options))
