from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.datasets import make_dataset

from hellm.data import DataError, IdMap, ItemFeatures
from hellm.data.attributes import AttributeSet


def test_id_map_appends_and_never_moves():
    ids = IdMap(["x", "y"])
    assert ids.add(["y", "z", "x", "w"]).tolist() == [1, 2, 0, 3]
    assert ids.ids == ["x", "y", "z", "w"]
    assert ids.index("w") == 3
    assert ids.indices(["z", "x"]).tolist() == [2, 0]
    assert "y" in ids
    assert "v" not in ids


def test_id_map_copy_is_independent():
    ids = IdMap(["x"])
    ids.copy().add(["y"])
    assert ids.ids == ["x"]


def test_id_map_errors():
    with pytest.raises(DataError, match="id 'nobody' is not one of the 2 known ids"):
        IdMap(["x", "y"]).index("nobody")
    with pytest.raises(DataError, match="distinct, got 'x' twice"):
        IdMap(["x", "y", "x"])


def test_features_mask_follows_zero_rows():
    features = ItemFeatures.from_values(np.array([[1, 0], [0, 0]]))
    assert features.values.dtype == np.float32
    assert features.mask.tolist() == [True, False]


@pytest.mark.parametrize(
    ("values", "mask", "message"),
    [
        (np.zeros(3), np.ones(3, bool), r"values must be \[num_items, dim\], got shape \[3\]"),
        (np.zeros((3, 2)), np.ones(2, bool), r"mask must be \[3\] bool, got \[2\] bool"),
        (np.zeros((2, 2)), np.ones(2), r"mask must be \[2\] bool, got \[2\] float64"),
        (np.array([[0.0], [np.nan]]), np.ones(2, bool), "values must be finite, got NaN or infinity in row 1"),
    ],
)
def test_features_errors(values, mask, message):
    with pytest.raises(ValueError, match=message):
        ItemFeatures(values, mask)


def test_pairs_and_histories():
    dataset = make_dataset()
    users, items = dataset.pairs("test")
    assert users.tolist() == [0, 1, 3]
    assert items.tolist() == [3, 4, 3]
    indptr, items = dataset.histories("train", "valid")
    assert indptr.tolist() == [0, 3, 5, 7, 11]
    assert items.tolist() == [0, 1, 2, 1, 3, 2, 0, 4, 0, 1, 2]
    indptr, items = dataset.histories()
    assert indptr.tolist() == [0, 4, 7, 9, 14]
    assert indptr.dtype == items.dtype == np.int64
    assert dataset.split_counts() == {"train": 8, "valid": 3, "test": 3}


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of train, valid, test, got 'dev'"):
        make_dataset().pairs("dev")


def test_fingerprint_sees_events_split_and_features_but_not_names():
    dataset = make_dataset()
    assert dataset.fingerprint == make_dataset().fingerprint
    assert dataset.fingerprint == replace(dataset, name="other", item_titles=None).fingerprint
    changed = dataset.items.copy()
    changed[0] = 5
    values = dataset.item_features["image"].values + np.float32(0.5)
    others = [
        replace(dataset, items=changed),
        replace(dataset, split=np.zeros_like(dataset.split)),
        replace(dataset, timestamps=None),
        replace(dataset, item_features={}),
        replace(dataset, item_features={"image": ItemFeatures(values, dataset.item_features["image"].mask)}),
    ]
    assert len({one.fingerprint for one in others} | {dataset.fingerprint}) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_users": 5}, r"must hold num_users \(5\) and num_items \(6\) ids, got 4 and 6"),
        ({"items": np.zeros(3, np.int64)}, r"items must be \[14\], got \[3\]"),
        ({"items": np.full(14, 6)}, r"items must lie in 0\.\.5, got 6\.\.6"),
        ({"split": np.full(14, 4, np.int8)}, r"split must lie in 0\.\.3, got 4\.\.4"),
        ({"users": np.arange(14)[::-1] % 4}, "users must be grouped and ascending"),
        (
            {"item_features": {"text": ItemFeatures.from_values(np.ones((2, 1)))}},
            r"item_features\['text'\] must have 6 rows",
        ),
    ],
)
def test_dataset_errors(change, message):
    with pytest.raises(ValueError, match=message):
        replace(make_dataset(), **change)


def test_events_that_are_only_history_are_known_and_not_trained_on():
    dataset = make_dataset()
    split = dataset.split.copy()
    split[:4] = [3, 3, 3, 2]
    dataset = replace(dataset, split=split)
    assert dataset.has_cold_users and not make_dataset().has_cold_users
    assert dataset.pairs("train")[0].min() == 1 and dataset.pairs("history")[1].tolist() == [0, 1, 2]
    assert dataset.histories("train")[1][:3].tolist() == [0, 1, 2]
    assert dataset.histories("test")[1][:1].tolist() == [3]
    assert dataset.split_counts() == {"train": 6, "valid": 2, "test": 3, "history": 3}
    assert list(make_dataset().split_counts()) == ["train", "valid", "test"]
    with pytest.raises(ValueError, match=r"split must lie in 0..3, got 0..4"):
        replace(dataset, split=split + (split == 3))


class TestAttributeSets:
    def dataset(self, **fields):
        plain = make_dataset()
        columns = {name: (values * plain.num_items)[: plain.num_items] for name, values in fields.items()}
        return replace(plain, item_fields=columns)

    def test_values_that_tell_nothing_apart_are_left_out(self):
        # "a" is on 3 of 6 items, "b" on 2, "c" on 4, which is more than half, and "d" on 1.
        lists = [("a", "c"), ("a", "b"), ("c", "b"), ("a", "c"), ("d", "c"), ()]
        found = AttributeSet.of(lists)
        assert found.values == ("a", "b")
        assert found.indicators.tolist() == [[1, 0], [1, 1], [0, 1], [1, 0], [0, 0], [0, 0]]
        assert found.indicators.dtype == np.float32

    def test_the_most_frequent_values_are_kept(self):
        lists = [(f"v{item // 2}", "often" if item % 2 else f"v{item // 2 + 1}") for item in range(2600)]
        found = AttributeSet.of(lists)
        assert len(found.values) == 1024 and found.values[0] == "often"

    def test_data_sets_have_those_that_items_share(self):
        dataset = self.dataset(brand=["x", "y"], colour=["red"], description=["a", "b"])
        assert {name: one.values for name, one in dataset.attribute_sets.items()} == {"brand": ("x", "y")}
        content = dataset.item_content
        assert list(content) == [*sorted(dataset.item_features), "brand"]
        assert content["brand"].values[:2].tolist() == [[1, 0], [0, 1]] and content["brand"].mask.all()

    def test_features_of_the_same_name_stand_for_the_attribute(self):
        dataset = self.dataset(brand=["x", "y"])
        features = {"brand": ItemFeatures.from_values(np.ones((dataset.num_items, 2)))}
        assert not replace(dataset, item_features=features).attribute_sets

    def test_fingerprints_tell_attributes(self):
        one, other = self.dataset(brand=["x", "y"]), self.dataset(brand=["x", "x", "y"])
        assert one.fingerprints["attributes"] != other.fingerprints["attributes"]
        assert "attributes" not in make_dataset().fingerprints
        assert one.fingerprint == other.fingerprint
