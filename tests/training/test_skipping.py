"""Which gradient norms are accepted, and what is kept of steps that are not."""

import math

from nanoslime.training.skipping import LEAST, WINDOW, StepGuard


def guard(limit, norms):
    made = StepGuard(limit)
    assert all(made.accepts(norm) for norm in norms)
    return made


def test_a_norm_above_the_limit_times_the_median_is_refused():
    norms = [1.0, 3.0, 2.0] * 6  # median 2
    assert guard(2.5, norms).accepts(5.0)
    assert not guard(2.5, norms).accepts(5.001)
    assert guard(None, norms).accepts(1e30)


def test_there_must_be_enough_norms_to_judge_by():
    assert guard(2.0, [1.0] * (LEAST - 1)).accepts(100.0)
    assert not guard(2.0, [1.0] * LEAST).accepts(100.0)


def test_only_the_last_accepted_norms_count():
    moved = guard(3.0, [1.0] * WINDOW + [2.0] * (WINDOW // 2 + 1))
    assert moved.accepts(5.9) and not moved.accepts(6.1)  # the median is 2
    refused = guard(2.0, [1.0] * LEAST)
    assert not any(refused.accepts(10.0) for _ in range(WINDOW))
    assert refused.num_skipped == WINDOW and not refused.accepts(2.1)


def test_what_is_not_finite_is_refused_and_counted_with_a_limit_or_without():
    for limit in (None, 2.0):
        made = guard(limit, [0.0] * LEAST)
        assert not made.accepts(math.nan) and not made.accepts(math.inf)
        assert made.num_skipped == 2 and made.accepts(0.0)


def test_state_is_all_there_is():
    first, second = guard(2.0, [1.0, 2.0] * LEAST), StepGuard(2.0)
    first.accepts(math.nan)
    second.restore(first.state())
    assert second.state() == first.state() and second.num_skipped == 1
    assert not second.accepts(3.1) and second.accepts(3.0)
    assert len(first.state()["norms"]) == 2 * LEAST  # and not the other's
