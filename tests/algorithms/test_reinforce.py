"""RLOO's baseline, the returns of REINFORCE++, and its whitening over the whole batch, by
hand.
"""

import itertools
import math

import pytest
import torch

from nanoslime.algorithms.reinforce import discounted
from nanoslime.config.algorithm import ReinforcePPBaselineConfig, ReinforcePPConfig, RLOOConfig
from tests.algorithms.made import advantages, algorithm, group, shard


def alone(value):
    return value


def returns(masks, scalars, config=None, **values):
    made = algorithm(config or ReinforcePPConfig(normalize_advantages=False))
    return [t.tolist() for t in made.token_advantages(shard(masks, scalars, **values), alone)]


def test_rloo_compares_each_reward_with_the_mean_of_the_others():
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
    made = algorithm(RLOOConfig())
    got = advantages([group(0, [1.0, 2.0, 6.0])], made)
    assert got == pytest.approx([-3, -1.5, 4.5])
    without_others = [group(0, [0.7] * 8), group(1, [3.0])]
    assert advantages(without_others, made) == [0.0] * 9


def test_reinforce_plus_plus_takes_the_reward_and_its_baseline_form_the_centred_one():
    groups = [group(0, [1.0, 0.0, 0.0]), group(1, [4.0])]
    assert advantages(groups, algorithm(ReinforcePPConfig())) == [1.0, 0.0, 0.0, 4.0]
    centred = advantages(groups, algorithm(ReinforcePPBaselineConfig()))
    assert centred == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0.0])


def test_the_terminal_reward_is_on_the_last_unmasked_token():
    """Tool output or a cut tail may follow it: on the very last token the mask would drop
    the reward.
    """
    discount = ReinforcePPConfig(gamma=0.5, normalize_advantages=False)
    mask = [False, True, True, False, True, False, False]
    # the reward 8 is on token 4; token 2 is two positions before it, token 1 three
    assert returns([mask], [8.0], discount) == [[0, 1, 2, 0, 8, 0, 0]]
    assert returns([mask], [8.0]) == [[0, 8, 8, 0, 8, 0, 0]]
    assert returns([[False, False]], [8.0]) == [[0, 0]]


def test_kl_in_the_reward_flows_back_to_earlier_tokens():
    # k1 on tokens 1 and 2 is 0.5 and -1, times 0.1: x = -0.05, 2 + 0.1
    old = [[0.0, -1.0, -2.0]]
    ref = [[0.0, -1.5, -1.0]]
    config = ReinforcePPConfig(kl_coef=0.1, kl_loss_type="k1", normalize_advantages=False)
    (got,) = returns([[False, True, True]], [2.0], config, old=old, ref=ref)
    assert got == pytest.approx([0.0, 2.05, 2.1])


def test_masked_kl_is_no_part_of_a_return():
    nan = float("nan")
    config = ReinforcePPConfig(kl_coef=0.1, normalize_advantages=False)
    old = [[nan, -1.0, nan, -1.0]]
    ref = [[0.0, -1.0, 50.0, -1.0]]
    assert returns([[False, True, False, True]], [2.0], config, old=old, ref=ref) == [[0, 2, 0, 2]]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 100])
def test_discounted_sums_are_those_of_the_recursion(gamma, size):
    rewards = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    expected = []
    after = 0.0
    for reward in reversed(rewards.tolist()):
        after = reward + gamma * after
        expected.insert(0, after)
    assert discounted(rewards, gamma).tolist() == pytest.approx(expected)


# whitening

MASKS = [[False, True, True], [False, True, False], [False, True, True, True]]
SCALARS = [1.0, 3.0, -1.0]


def test_whitening_by_hand():
    # tokens 1 1 3 -1 -1 -1: mean 1/3; squares 2 x 4/9 + 64/9 + 3 x 16/9 = 120/9; unbiased
    # variance 8/3
    config = ReinforcePPConfig()
    unit = math.sqrt(8 / 3)
    good = (2 / 3) / unit
    best = (8 / 3) / unit
    bad = (-4 / 3) / unit
    got = returns(MASKS, SCALARS, config)
    assert got[0] == pytest.approx([0, good, good])
    assert got[1] == pytest.approx([0, best, 0])
    assert got[2] == pytest.approx([0, bad, bad, bad])


class Ranks:
    """An all_sum over ranks that run in turn, as often as values are still missing."""

    def __init__(self):
        self.sums = []
        self.mine = {}

    def of(self, rank):
        calls = itertools.count()

        def all_sum(value):
            call = next(calls)
            self.mine[rank, call] = value.clone()
            return sum(v for (_, c), v in self.mine.items() if c == call)

        return all_sum


@pytest.mark.parametrize("config", [ReinforcePPConfig(), ReinforcePPBaselineConfig()])
@pytest.mark.parametrize("parts", [([0, 1], [2]), ([0], [1, 2]), ([2, 0, 1], [])])
def test_whitening_across_ranks_equals_whitening_in_one(config, parts):
    made = algorithm(config)
    expected = made.token_advantages(shard(MASKS, SCALARS), alone)
    shards = []
    for part in parts:
        masks = [MASKS[i] for i in part] or [[False, False]]  # a rank without any has a dummy
        scalars = [SCALARS[i] for i in part] or [0.0]
        shards.append(shard(masks, scalars))
    ranks = Ranks()
    for _ in range(3):  # the first sums are whole in the second round, the second in the third
        got = [made.token_advantages(s, ranks.of(rank)) for rank, s in enumerate(shards)]
    for part, tensors in zip(parts, got, strict=True):
        for i, tensor in zip(part, tensors, strict=False):
            torch.testing.assert_close(tensor, expected[i], rtol=1e-6, atol=1e-7)
    assert len(ranks.mine) == 4  # two calls on each, also on the one without a token


def test_whitened_equal_values_are_exactly_zero():
    got = returns(MASKS, [0.7] * 3, ReinforcePPConfig())
    assert [x for sequence in got for x in sequence] == [0.0] * 10
    one_token = returns([[False, True]], [0.7], ReinforcePPConfig())
    assert one_token == [[0.0, 0.0]]  # no variance
    assert returns([[False, False]], [0.7], ReinforcePPConfig()) == [[0.0, 0.0]]


def test_whitening_may_be_had_with_any_algorithm():
    made = algorithm(normalize_advantages=True)
    got = made.token_advantages(shard([[False, True]] * 2, [1.0, -1.0]), alone)
    assert [t[1].item() for t in got] == pytest.approx([0.5**0.5, -(0.5**0.5)])  # variance 2
