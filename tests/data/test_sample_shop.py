"""The sample shop holds the structure that it claims, and the built-in features see it."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from hellm.data import load_dataset, write_sample_shop
from hellm.data.simple_features import image_features, item_texts, text_features


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return write_sample_shop(tmp_path_factory.mktemp("shop") / "shop", num_users=200, num_items=160, seed=5)


@pytest.fixture(scope="module")
def dataset(shop):
    return load_dataset(shop)


def test_files_and_counts(shop, dataset):
    with (shop / "items.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == dataset.num_items == 160
    assert dataset.num_users == 200
    assert sum(not row["image"] for row in rows) == 4
    assert sum(not row["title"] for row in rows) == 4
    assert len(list((shop / "images").iterdir())) == 156
    assert dataset.item_features["image"].mask.sum() == 156
    # Two of the four items without a title still have a brand and a category.
    assert dataset.item_features["text"].mask.sum() == 158
    assert set(dataset.attribute_sets) == {"brand", "category"}
    assert dataset.notes == []


def test_users_keep_to_few_groups(dataset):
    group = dataset.items % 8
    counts = np.zeros((200, 8))
    np.add.at(counts, (dataset.users, group), 1)
    in_two_best = np.sort(counts, axis=1)[:, -2:].sum() / counts.sum()
    # Uniform buying would put about half of so short histories into the two best of eight groups.
    assert in_two_best > 0.85
    pairs = dataset.users * dataset.num_items + dataset.items
    assert len(np.unique(pairs)) == len(pairs)


def test_order_of_purchases_is_informative(dataset):
    same_user = np.diff(dataset.users) == 0
    assert ((np.diff(dataset.items) == 8) & same_user).sum() / same_user.sum() > 0.25


def test_users_keep_to_few_brands(dataset):
    brand = dataset.items // 8 // 4
    counts = np.zeros((200, 5))
    np.add.at(counts, (dataset.users, brand), 1)
    in_two_best = np.sort(counts, axis=1)[:, -2:].sum() / counts.sum()
    shuffled = np.zeros((200, 5))
    np.add.at(shuffled, (dataset.users, np.random.default_rng(0).permutation(brand)), 1)
    # Two of only five brands are soon bought empty.
    assert in_two_best > 1.03 * np.sort(shuffled, axis=1)[:, -2:].sum() / counts.sum()


def test_new_items_are_sold_in_the_last_week_only(dataset):
    new = dataset.items >= 152
    last_week = dataset.timestamps >= 1_700_000_000 + 173 * 24 * 3600
    assert not (new & ~last_week).any() and 0.1 < new[last_week].mean() < 0.5
    assert (dataset.split[new] == 2).mean() > 0.5


def test_same_seed_same_files(tmp_path, shop):
    again = write_sample_shop(tmp_path / "again", num_users=200, num_items=160, seed=5)
    other = write_sample_shop(tmp_path / "other", num_users=200, num_items=160, seed=6)
    for name in ("events.csv", "items.csv", "images/P1001.png"):
        assert (again / name).read_bytes() == (shop / name).read_bytes()
    assert (other / "events.csv").read_bytes() != (shop / "events.csv").read_bytes()


def test_pictures_of_a_group_differ(shop):
    assert (shop / "images" / "P1001.png").read_bytes() != (shop / "images" / "P1009.png").read_bytes()


@pytest.mark.parametrize(("modality", "least"), [("text", 0.9), ("image", 0.7)])
def test_nearest_neighbours_are_of_the_same_group(dataset, modality, least):
    features = dataset.item_features[modality]
    similarity = features.values @ features.values.T
    np.fill_diagonal(similarity, -np.inf)
    neighbours = np.argsort(-similarity, axis=1)[:, :5]
    same = neighbours % 8 == (np.arange(160) % 8)[:, None]
    assert same[features.mask].mean() > least


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_users": 0}, "num_users must be > 0, got 0"),
        ({"num_groups": 49}, r"num_groups must lie in 1\.\.48, got 49"),
        ({"num_items": 100}, r"num_items must be at least 20 per group \(160\), got 100"),
    ],
)
def test_sample_shop_errors(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_sample_shop(tmp_path / "x", **arguments)


def test_sample_shop_refuses_what_is_there(shop):
    with pytest.raises(FileExistsError, match="is not empty; overwrite=True replaces it"):
        write_sample_shop(shop)


def test_text_features_by_property():
    features = text_features(["red mug", "red mug", "", "blue lamp", "  "], dim=64)
    assert features.values.shape == (5, 64)
    assert features.values.dtype == np.float32
    assert features.mask.tolist() == [True, True, False, True, False]
    assert np.array_equal(features.values[0], features.values[1])
    np.testing.assert_allclose(np.linalg.norm(features.values, axis=1), [1, 1, 0, 1, 0], atol=1e-6)
    assert features.values[0] @ features.values[3] < 0.5
    with pytest.raises(ValueError, match="dim must be > 0, got 0"):
        text_features(["a"], dim=0)


def test_text_features_weigh_rare_words_more():
    texts = ["common rare", "common", "common", "common", "rare"]
    values = text_features(texts, dim=4096).values
    assert values[0] @ values[4] > values[0] @ values[1]


def test_item_texts_join_what_there_is():
    fields = {"brand": ["b", ""], "image": ["i", "i"], "category": ["c", "d"]}
    assert item_texts(["t", ""], fields) == ["t b c", "d"]
    assert item_texts(None, {"image": ["i"]}) is None


def test_image_features_by_colour_and_breakage(tmp_path):
    from PIL import Image

    for name, colour in (("red", (220, 20, 20)), ("crimson", (210, 30, 30)), ("blue", (20, 20, 220))):
        Image.new("RGB", (30, 50), colour).save(tmp_path / f"{name}.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    failed = []
    names = ["red", "crimson", "blue", "clear", "cut"]
    paths = [*(str(tmp_path / f"{name}.png") for name in names), ""]
    features = image_features(paths, on_unreadable=lambda path, error: failed.append(path))
    assert features.mask.tolist() == [True] * 4 + [False, False]
    assert failed == [paths[4]]
    similarity = features.values @ features.values.T
    assert similarity[0, 1] > similarity[0, 2] + 0.2
    np.testing.assert_allclose(similarity.diagonal()[:3], 2 / 3, atol=1e-5)
    assert not features.values[4:].any()
