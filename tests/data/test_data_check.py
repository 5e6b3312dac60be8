"""The report on a data set whose defects are known."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from support.datasets import make_dataset

from hellm.data import DataError, Dataset, IdMap, check_dataset, save_dataset


def defective() -> Dataset:
    # User 0: item 0 twice in train and again in test, item 1 in valid; 1: one event; 2: only test events; 3: none.
    events = [
        (0, 0, 10, 0),
        (0, 0, 10, 0),
        (0, 2, 30, 0),
        (0, 1, 20, 1),
        (0, 0, 40, 2),
        (1, 2, 5, 0),
        (2, 3, 7, 2),
        (2, 2, 8, 2),
    ]
    events.sort(key=lambda event: event[0])
    users, items, times, split = np.array(events).T
    return Dataset(
        name="bad",
        num_users=4,
        num_items=5,
        users=users,
        items=items,
        timestamps=times,
        split=split.astype(np.int8),
        user_ids=IdMap.range(4),
        item_ids=IdMap.range(5),
        item_titles=["a", "", "c", "d", ""],
        notes=["a note"],
    )


def test_known_defects_are_counted():
    report = check_dataset(defective())
    assert report["events"] == {"train": 4, "valid": 1, "test": 3, "total": 8}
    assert (report["users"], report["items"]) == (4, 5)
    assert report["density"] == pytest.approx(6 / 20)
    assert report["duplicates"] == {"repeats": 2, "within_split": 1, "across_splits": 1}
    assert report["leakage"] == {"train_valid": 0, "train_test": 1, "valid_test": 0}
    days = {"first_day": "1970-01-01", "last_day": "1970-01-01"}
    assert report["time"] == {"known": True, "tied_share": 2 / 8, "first": 5.0, "last": 40.0, **days}
    assert report["order"] == {"by": "time, oldest first", "inversions": 1}
    assert report["largest_user"] == {"user": "0", "events": 5, "share": 5 / 8, "suspicious": True}
    assert report["cold"]["valid"] == {"users": 0, "items": 1, "events": 1}
    assert report["cold"]["test"] == {"users": 1, "items": 1, "events": 1}
    assert report["without_events"] == {"users": 1, "items": 1}
    assert report["short_histories"] == 2
    assert report["history_length"]["p50"] == 2
    assert report["history_length"]["p100"] == 5
    assert report["titles"] == {"missing": 2}
    assert report["notes"] == ["a note"]
    json.dumps(report)


def test_clean_data_without_times():
    dataset = replace(make_dataset(timestamps=False), item_titles=None)
    report = check_dataset(dataset)
    assert report["duplicates"] == {"repeats": 0, "within_split": 0, "across_splits": 0}
    assert report["time"] == {"known": False, "tied_share": None}
    assert report["order"] == {"by": "order of the source, oldest first", "inversions": None}
    assert report["features"] == {"image": {"dim": 2, "missing": 1}}
    assert report["titles"] is None
    assert report["items_missing_from_table"] is None


def test_items_missing_from_the_table_are_reported_not_raised(tmp_path):
    (tmp_path / "events.csv").write_text("user,item\na,x\na,y\nb,z\n")
    (tmp_path / "items.csv").write_text("item,title\nx,X\n")
    report = check_dataset(tmp_path)
    assert report["items_missing_from_table"] == {"count": 2, "first": ["y", "z"]}
    assert report["items"] == 3
    assert report["form"] == "shop"
    with pytest.raises(DataError, match="2 items of the events"):
        check_dataset(tmp_path, missing_items="error")


def test_path_of_a_form_without_item_table(tmp_path):
    save_dataset(make_dataset(), tmp_path / "x")
    report = check_dataset(tmp_path / "x")
    assert report["items_missing_from_table"] is None
    assert report["short_histories"] == 1


def test_five_core_drops_again_and_again():
    # Users 0..4 buy items 0..4 (a 5-core); user 5 buys items 0..3 and 5 (4 once item 5 is gone), user 6 only item 5.
    pairs = (
        [(user, item) for user in range(5) for item in range(5)] + [(5, item) for item in (0, 1, 2, 3, 5)] + [(6, 5)]
    )
    users, items = np.array(pairs).T
    dataset = Dataset(
        "core", 7, 6, users, items, None, np.zeros(len(users), np.int8), IdMap.range(7), IdMap.range(6), {}, None
    )
    assert check_dataset(dataset)["five_core"] == {"users": 5, "items": 5, "events": 25}
    assert check_dataset(make_dataset())["five_core"] == {"users": 0, "items": 0, "events": 0}
