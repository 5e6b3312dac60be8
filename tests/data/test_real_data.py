"""The public data sets give the counts that their authors print."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from hellm.data import check_dataset, load_dataset, save_dataset

EXPECTED = {
    "tiktok": ("mmrec", "given", 9308, 6710, (59541, 3051, 6130)),
    "beauty": ("sasrec", "leave-two-out", 22363, 12101, (153776, 22363, 22363)),
    "scientific": ("json", "leave-two-out", 8317, 4344, (41858, 8317, 8317)),
}


@pytest.fixture(scope="module", params=EXPECTED)
def real(request, shared_data):
    return request.param, load_dataset(shared_data / request.param)


def test_counts(real):
    name, dataset = real
    counts = tuple(dataset.split_counts().values())
    assert (dataset.form, dataset.split_name, dataset.num_users, dataset.num_items, counts) == EXPECTED[name]
    assert len(np.unique(dataset.users)) == dataset.num_users


@pytest.mark.parametrize("form", ["hellm", "mmrec", "recbole", "lattice", "sasrec", "json", "shop"])
def test_round_trip(real, tmp_path, form):
    name, dataset = real
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_dataset(dataset, tmp_path / name, form=form)
    back = load_dataset(tmp_path / name, features="auto" if form != "shop" else "none")
    assert back.user_ids.ids == dataset.user_ids.ids
    assert back.item_ids.ids == dataset.item_ids.ids
    assert np.array_equal(back.users, dataset.users)
    assert np.array_equal(back.items, dataset.items)
    if form in ("sasrec", "json") and name == "tiktok":
        assert back.split_name == "leave-two-out"
    else:
        assert np.array_equal(back.split, dataset.split)


def test_tiktok_features(shared_data):
    dataset = load_dataset(shared_data / "tiktok")
    assert sorted(dataset.item_features) == ["audio", "image"]
    for features in dataset.item_features.values():
        assert features.values.shape == (6710, 128)
        assert features.values.dtype == np.float32
        assert features.mask.all()
    raw = np.load(shared_data / "tiktok" / "image_feat.npy")
    assert np.array_equal(dataset.item_features["image"].values[4321], raw[4321].astype(np.float32))


def test_beauty_ids_and_report(shared_data):
    dataset = load_dataset(shared_data / "beauty")
    assert dataset.item_ids.ids[0] == "1"
    assert dataset.user_ids.ids[-1] == "22363"
    # First line of the file: "1 1 2 3 4 5".
    assert dataset.items[:5].tolist() == [0, 1, 2, 3, 4]
    report = check_dataset(dataset)
    assert report["cold"]["test"] == {"users": 0, "items": 33, "events": 138}
    # It is published as a 5-core.
    assert report["five_core"] == {"users": 22363, "items": 12101, "events": 198502}
    assert report["duplicates"]["repeats"] == 0


def test_scientific_titles(shared_data):
    dataset = load_dataset(shared_data / "scientific", features="simple")
    assert dataset.item_titles[0].startswith("SUPCO SPP6 Relay/Capacitor")
    assert sorted(dataset.item_fields) == ["brand", "category", "description"]
    assert dataset.item_features["text"].mask.all()
