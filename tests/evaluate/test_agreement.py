"""Agreement of lists, by hand and by properties."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hellm.evaluate.agreement import overlap, rank_biased_overlap

lists = st.lists(st.integers(0, 12), unique=True, max_size=8)


def test_overlap_by_hand():
    assert overlap("abc", "cbd") == 2 / 3
    assert overlap("abc", "c") == 1 / 3
    assert overlap("ab", "cd") == 0 and overlap("", "") == 1


def test_rank_biased_overlap_by_hand():
    # Agreement at depths 1, 2, 3: 0, 1/2 (b), 1 (a, b, c).
    expected = 0.1 / 0.9 * (0.9**2 * 1 / 2 + 0.9**3 * 1) + 0.9**3
    assert rank_biased_overlap("abc", "bca") == pytest.approx(expected)
    # Of a list that ends, the other goes on alone.
    assert rank_biased_overlap("ab", "a", 0.5) == pytest.approx(0.5 + 0.25 / 2 + 0.25 / 2)


def test_p_is_between_0_and_1():
    with pytest.raises(ValueError, match=r"p must be in \(0, 1\), got 1"):
        rank_biased_overlap("a", "a", 1)


@settings(deadline=None)
@given(lists, lists, st.floats(0.05, 0.95))
def test_both_are_shares_that_do_not_depend_on_the_order_of_the_two(a, b, p):
    for measure in (overlap, lambda one, other: rank_biased_overlap(one, other, p)):
        assert measure(a, b) == pytest.approx(measure(b, a))
        assert -1e-9 <= measure(a, b) <= 1 + 1e-9
        assert measure(a, a) == pytest.approx(1)
    if a and b and not set(a) & set(b):
        assert overlap(a, b) == rank_biased_overlap(a, b, p) == 0


def test_a_swap_at_the_top_counts_more_than_one_at_the_end():
    assert rank_biased_overlap("abcdef", "bacdef") < rank_biased_overlap("abcdef", "abcdfe") < 1
    assert overlap("abcdef", "bacdef") == 1
