from __future__ import annotations

import numpy as np
import pytest

from hellm.data import splits


def users_of(*lengths):
    return np.repeat(np.arange(len(lengths)), lengths)


def test_leave_two_out_by_hand():
    assert splits.leave_two_out(users_of(4, 2, 0, 3, 1)).tolist() == [0, 0, 1, 2, 0, 0, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("length", "ratios", "expected"),
    [
        (30, (0.8, 0.1, 0.1), [24, 3, 3]),
        (10, (0.8, 0.1, 0.1), [8, 1, 1]),
        (5, (0.8, 0.1, 0.1), [3, 1, 1]),
        (2, (0.8, 0.1, 0.1), [2, 0, 0]),
        (3, (0.05, 0.9, 0.05), [1, 1, 1]),
        (3, (0.05, 0.05, 0.9), [1, 1, 1]),
        (10, (0.8, 0.0, 0.2), [8, 0, 2]),
        (4, (0.5, 0.5, 0.0), [2, 2, 0]),
    ],
)
def test_ratio_counts(length, ratios, expected):
    split = splits.ratio(users_of(length), ratios)
    assert np.bincount(split, minlength=3).tolist() == expected
    assert (np.diff(split) >= 0).all()


def test_time_cut_keeps_equal_times_together():
    times = np.array([1, 2, 3, 4, 5, 6, 7, 8, 8, 8])
    assert splits.time_cut(times).tolist() == [0, 0, 0, 0, 0, 0, 0, 2, 2, 2]
    assert splits.time_cut(np.arange(10)).tolist() == [0] * 8 + [1, 2]
    assert splits.time_cut(np.arange(10), (0.8, 0.0, 0.2)).tolist() == [0] * 8 + [2, 2]
    assert splits.time_cut(np.arange(10), (0.8, 0.2, 0.0)).tolist() == [0] * 8 + [1, 1]


def test_item_cold_keeps_held_out_items_out_of_train():
    items = np.tile(np.arange(20), 5)
    split = splits.item_cold(items, 25, share=0.3, seed=1)
    parts = [set(items[split == part].tolist()) for part in range(3)]
    assert [len(part) for part in parts] == [14, 3, 3]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert np.array_equal(split, splits.item_cold(items, 25, share=0.3, seed=1))
    assert not np.array_equal(split, splits.item_cold(items, 25, share=0.3, seed=2))


def test_user_cold_keeps_users_out_of_train():
    users = users_of(*[4] * 20, 2, 0, 1)
    split = splits.user_cold(users, share=0.3, seed=1)
    of_user = [split[users == user].tolist() for user in range(23)]
    held = [4 * [0], [3, 3, 3, 1], [3, 3, 3, 2]]
    assert [of_user[:20].count(one) for one in held] == [14, 3, 3]
    assert of_user[20:] == [[0, 0], [], [0]]
    assert np.array_equal(split, splits.user_cold(users, share=0.3, seed=1))
    assert not np.array_equal(split, splits.user_cold(users, share=0.3, seed=2))
    assert splits.user_cold(users_of(0)).tolist() == []
    assert splits.user_cold(users_of(2, 1)).tolist() == [0, 0, 0]


def test_errors():
    with pytest.raises(ValueError, match=r"ratios must be three shares .* got \(0.5, 0.1, 0.1\)"):
        splits.ratio(users_of(3), (0.5, 0.1, 0.1))
    with pytest.raises(ValueError, match=r"the first above 0, got \(0, 0.5, 0.5\)"):
        splits.time_cut(np.arange(3), (0, 0.5, 0.5))
    with pytest.raises(ValueError, match='split="time" needs timestamps'):
        splits.time_cut(None)
    with pytest.raises(ValueError, match="cold_share must lie between 0 and 1, got 1"):
        splits.item_cold(np.arange(3), 3, share=1)
    with pytest.raises(ValueError, match="cold_share must lie between 0 and 1, got 0"):
        splits.user_cold(users_of(3), share=0)
