"""Which gradient norms are accepted, and how many are remembered."""

import math

from nanoslime.training.skipping import LEAST, MOST_REFUSED, WINDOW, StepHistory


def after(norms):
    made = StepHistory()
    assert all(made.accepts(norm, None) for norm in norms)
    return made


def test_a_norm_above_the_limit_times_the_median_is_refused():
    norms = [1.0, 3.0, 2.0] * 6  # median 2
    assert after(norms).accepts(5.0, 2.5)
    assert not after(norms).accepts(5.001, 2.5)
    assert after(norms).accepts(1e30, None)


def test_there_must_be_enough_norms_to_judge_by():
    assert after([1.0] * (LEAST - 1)).accepts(100.0, 2.0)
    assert not after([1.0] * LEAST).accepts(100.0, 2.0)


def test_only_the_last_accepted_norms_count():
    moved = after([1.0] * WINDOW + [2.0] * (WINDOW // 2 + 1))
    assert len(moved.norms) == WINDOW
    # the median is 2
    assert moved.accepts(5.9, 3.0)
    assert not moved.accepts(6.1, 3.0)
    refused = after([1.0] * LEAST)
    assert not any(refused.accepts(10.0, 2.0) for _ in range(MOST_REFUSED - 1))
    assert refused.num_skipped == MOST_REFUSED - 1
    assert not refused.accepts(2.1, 2.0)


def test_norms_that_stay_high_begin_a_new_history():
    made = after([1.0] * LEAST)
    assert not any(made.accepts(10.0, 2.0) for _ in range(MOST_REFUSED))
    assert not made.accepts(math.nan, 2.0), "with no history either"
    assert all(made.accepts(10.0, 2.0) for _ in range(LEAST))
    assert made.norms == [10.0] * LEAST
    assert not made.accepts(21.0, 2.0)
    assert made.num_skipped == MOST_REFUSED + 2


def test_only_refusals_in_a_row_and_above_the_limit_count():
    made = after([1.0] * LEAST)
    for _ in range(MOST_REFUSED):
        assert not made.accepts(10.0, 2.0)
        assert not made.accepts(math.inf, 2.0)
        assert made.accepts(1.0, 2.0)
    assert not made.accepts(10.0, 2.0)
    assert len(made.norms) == LEAST + MOST_REFUSED


def test_what_is_not_finite_is_refused_and_counted_with_a_limit_or_without():
    for limit in (None, 2.0):
        made = after([0.0] * LEAST)
        assert not made.accepts(math.nan, limit)
        assert not made.accepts(math.inf, limit)
        assert made.num_skipped == 2 and made.accepts(0.0, limit)
