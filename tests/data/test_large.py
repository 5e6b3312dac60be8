"""What keeps memory small gives the same as the plain definition, however many events are looked at once."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.datasets import make_dataset

from hellm.data import Histories, IdMap, check_dataset, splits
from hellm.data.dataset import _add_array
from hellm.data.forms._ids import _numbered, without_unused
from hellm.data.forms._times import to_seconds
from hellm.data.histories import user_counts
from hellm.data.load import _time_order

LENGTHS = st.lists(st.integers(0, 7), max_size=8)
MODULES = ("histories", "load", "splits", "check", "forms._ids", "forms._times")


@pytest.fixture(autouse=True, scope="module")
def three_events_at_once():
    patches = [patch(f"hellm.data.{one}._EVENTS", 3) for one in MODULES]
    # A sixteenth is three numbers.
    patches.append(patch("hellm._mapped.HELD_BYTES", 16 * 3 * 8))
    for one in patches:
        one.start()
    yield
    for one in patches:
        one.stop()


def users_of(lengths):
    return np.repeat(np.arange(len(lengths)), lengths)


class TestSplits:
    @settings(deadline=None, max_examples=50)
    @given(LENGTHS)
    def test_leave_two_out(self, lengths):
        expected = []
        for n in lengths:
            expected += [0] * (n - 2) + [1, 2] if n >= 3 else [0] * n
        assert splits.leave_two_out(users_of(lengths)).tolist() == expected

    @settings(deadline=None, max_examples=50)
    @given(LENGTHS, st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.3, 0.2), (0.5, 0.5, 0.0), (0.4, 0.0, 0.6)]))
    def test_ratio(self, lengths, ratios):
        expected = []
        for n in lengths:
            valid, test = (max(int(n * share + 1e-9), share > 0) for share in ratios[1:])
            valid = min(valid, n - 1 - (ratios[2] > 0))
            test = min(test, n - valid - 1)
            expected += [0] * (n - valid - test) + [1] * valid + [2] * test if n >= 3 else [0] * n
        assert splits.ratio(users_of(lengths), ratios).tolist() == expected

    @settings(deadline=None, max_examples=50)
    @given(LENGTHS, st.floats(0.1, 0.9), st.integers(0, 5))
    def test_user_cold(self, lengths, share, seed):
        found = splits.user_cold(users_of(lengths), share=share, seed=seed)
        enough = [user for user, n in enumerate(lengths) if n >= 3]
        chosen = np.random.default_rng(seed).permutation(enough)[: max(2, round(share * len(enough)))].tolist()
        expected = []
        for user, n in enumerate(lengths):
            last = 1 if user in chosen[: len(chosen) // 2] else 2
            expected += [3] * (n - 1) + [last] if user in chosen else [0] * n
        assert found.tolist() == expected


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), max_size=20), st.data())
def test_user_counts(users, data):
    users = np.array(users, dtype=np.int64)
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=len(users), max_size=len(users))), dtype=bool)
    assert user_counts(users, 12).tolist() == np.bincount(users, minlength=12).tolist()
    assert user_counts(users, 12, chosen).tolist() == np.bincount(users[chosen], minlength=12).tolist()
    assert user_counts(users, 4, divisor=3).tolist() == np.bincount(users // 3, minlength=4).tolist()
    ordered = np.sort(users)
    some, whole = (Histories.of_events(ordered, users, 12, one) for one in (chosen, None))
    assert some.items.tolist() == users[chosen].tolist() and whole.items is users
    assert some.lengths.tolist() == np.bincount(ordered[chosen], minlength=12).tolist()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12), st.booleans())
def test_order_of_events(events, timed):
    users, times = (np.array([one[side] for one in events], dtype=np.int64) for side in (0, 1))
    order = _time_order(users, times if timed else None)
    expected = sorted(range(len(events)), key=lambda at: events[at] if timed else events[at][0])
    assert (list(range(len(events))) if order is None else order.tolist()) == expected
    assert (order is None) == (expected == list(range(len(events))))


NUMBERS = st.integers(0, 10**18 - 1).map(str)
IDS = st.one_of(st.lists(NUMBERS, max_size=9), st.lists(st.text("ab70 \u00e9\U0001f600", max_size=3), max_size=9))


@settings(deadline=None, max_examples=50)
@given(IDS, st.lists(st.sampled_from(["7", "a", "b", "0", "zz"]), unique=True, max_size=4), st.data())
def test_ids_are_numbered_as_by_hand(ids, known, data):
    given_ = data.draw(st.lists(st.sampled_from([*ids, None]) if ids else st.none(), max_size=12))
    raw = pl.Series([f"raw {at}" for at in range(len(given_))], dtype=pl.String)
    column = _numbered(raw, pl.Series(given_, dtype=pl.String), known)
    there = {one for one in given_ if one is not None}
    plain = all(one.isascii() and one.isdecimal() and (one == "0" or one[0] != "0") for one in there)
    expected = known + [one for one in sorted(there, key=int if plain else str) if one not in known]
    assert column.ids.ids == expected
    place = dict(zip(column.raw.to_list(), column.index.tolist(), strict=True))
    assert [place[one] for one in raw.to_list()] == [-1 if one is None else expected.index(one) for one in given_]
    asked = pl.Series([None, *range(len(raw))], dtype=pl.UInt32)
    assert column.indices(asked).tolist() == [-1, *column.index.tolist()]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), max_size=9), st.integers(0, 3), st.booleans())
def test_ids_that_are_not_used_go(indices, num_known, as_texts):
    from hellm.data.texts import Texts

    ids = [f"id {one}" for one in range(6)]
    left, moved = without_unused(IdMap(Texts.of(ids) if as_texts else ids), num_known, np.array(indices, np.int32))
    assert [left.ids[one] for one in moved] == [ids[one] for one in indices]
    assert left.ids == [one for at, one in enumerate(ids) if at < num_known or at in indices]


SECONDS = st.one_of(st.integers(1, 2 * 10**9), st.floats(1, 2e9), st.integers(10**12, 2 * 10**12), st.just(20240229))


@settings(deadline=None, max_examples=50)
@given(st.lists(SECONDS, max_size=9), st.booleans())
def test_times_in_seconds(times, plain):
    """As without blocks."""
    with patch("hellm.data.forms._times._EVENTS", 1 << 20):
        notes: list[str] = []
        whole = to_seconds(np.array(times, np.float64), notes, plain=plain)
    ours: list[str] = []
    found = to_seconds(np.array(times, np.float64), ours, plain=plain)
    assert found.dtype == whole.dtype and found.tolist() == whole.tolist() and ours == notes
    if not plain:
        assert found.tolist() == np.array(times, np.float64).tolist() and not ours


def test_times_that_cannot_be_written_to_are_copied():
    times = np.frombuffer(np.array([1e12, 1.5e12]).tobytes())
    assert to_seconds(times, []).tolist() == [10**9, 15 * 10**8] and times.tolist() == [1e12, 1.5e12]


def test_fingerprint_and_report_do_not_depend_on_how_many_are_looked_at_once():
    rng = np.random.default_rng(0)
    dataset = replace(
        make_dataset(),
        items=rng.integers(0, 6, 14),
        timestamps=np.arange(14) // 3,
        split=rng.integers(0, 4, 14).astype(np.int8),
    )
    found = check_dataset(dataset), replace(dataset).fingerprint, replace(dataset).fingerprints
    with patch("hellm.data.check._EVENTS", 100), patch("hellm._mapped.HELD_BYTES", 16 * 100 * 8):
        assert found == (check_dataset(dataset), replace(dataset).fingerprint, replace(dataset).fingerprints)


def test_fingerprint_is_that_of_all_bytes():
    import hashlib

    times = np.arange(8)
    ours = hashlib.sha256()
    _add_array(ours, "timestamps", times)
    assert ours.digest() == hashlib.sha256(b"timestamps <f8 (8,)" + times.astype(np.float64).tobytes()).digest()
