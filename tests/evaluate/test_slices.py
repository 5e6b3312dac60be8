"""Slices of an evaluation, several protocols in one pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.protocol_table import PROTOCOL_TABLE, FakeDataset
from support.table_scorer import TableScorer, csr, descending

from hellm.evaluate import evaluate_dataset, evaluate_protocols, length_groups, mean_result, popularity_groups
from hellm.evaluate.protocols import PROTOCOLS
from hellm.evaluate.ranking import rank_by_protocols
from hellm.evaluate.slices import popularity_words, slices_of


def labels(groups, size):
    found = [[name for name, among in groups.items() if among[i]] for i in range(size)]
    assert all(len(one) == 1 for one in found)
    return [one[0] for one in found]


def test_popularity_groups_hold_a_third_of_the_events_each():
    # Sorted 1 1 1 1 2 2 4 of 12 events: ones reach 4 (middle 2/12), twos 8 (middle 6/12), the four 12 (10/12).
    counts = np.array([4, 1, 0, 2, 1, 2, 1, 1, 0])
    expected = ["popular", "rare", "cold", "middle", "rare", "middle", "rare", "rare", "cold"]
    groups = popularity_groups(counts)
    assert labels(groups, 9) == expected and list(groups) == ["cold", "rare", "middle", "popular"]
    assert popularity_words(counts, groups) == {
        "cold": "2 items with no train event",
        "rare": "4 items with 1 train event",
        "middle": "2 items with 2 train events",
        "popular": "1 item with 4 train events",
    }


def test_popularity_groups_of_many_items_are_thirds_and_never_part_equals():
    counts = np.ceil(np.random.default_rng(0).lognormal(1, 1, 5000)).astype(int)
    groups = popularity_groups(counts)
    shares = {name: counts[among].sum() / counts.sum() for name, among in groups.items()}
    assert list(shares) == ["rare", "middle", "popular"]
    assert all(0.25 < share < 0.42 for share in shares.values())
    assert counts[groups["rare"]].max() < counts[groups["middle"]].min()
    assert counts[groups["middle"]].max() < counts[groups["popular"]].min()
    assert list(popularity_groups(np.zeros(3))) == ["cold"]
    assert labels(popularity_groups(np.full(3, 7)), 3) == ["middle"] * 3


def test_length_groups_are_quantile_bins():
    lengths = np.array([9, 1, 2, 3, 4, 5, 6, 7])
    assert labels(length_groups(lengths), 8) == ["7 to 9", *["1 to 2"] * 2, *["3 to 4"] * 2, *["5 to 6"] * 2, "7 to 9"]
    # Half of the users have 3: they are one bin.
    lengths = np.array([3, 3, 3, 3, 3, 4, 8, 9])
    assert labels(length_groups(lengths), 8) == [*["3"] * 5, "4", "8 to 9", "8 to 9"]
    assert list(length_groups(np.array([2, 2]))) == ["2"]


def test_accuracy_by_target_equals_hand_worked_values():
    # Ranking 0 1 2 3 4 5. User 0 wants 1, 3, 5 and user 1 wants 0. Groups: even items, odd items.
    groups = {"even": np.arange(6) % 2 == 0, "odd": np.arange(6) % 2 == 1}
    (result,) = rank_by_protocols(
        descending(3, 6), csr([[1, 3, 5], [0], [2, 3]]), [(PROTOCOLS["standard"], None)], ks=(4,), item_groups=groups
    )
    even, odd = result.by_target["even"], result.by_target["odd"]
    assert (even.users.tolist(), odd.users.tolist()) == ([1, 2], [0, 2])
    # User 2: even target at rank 3, odd at 4; the other is neither hit nor missed.
    assert even.per_user["recall@4"].tolist() == [1, 1] and even.per_user["mrr@4"].tolist() == [1, 1 / 3]
    assert odd.per_user["recall@4"].tolist() == [2 / 3, 1] and odd.per_user["mrr@4"].tolist() == [1 / 2, 1 / 4]
    assert even.metrics["precision@4"] == 0.25 and not [name for name in even.metrics if name.startswith("coverage")]


def test_a_group_without_targets_is_left_out():
    groups = {"none": np.zeros(6, bool), "all": np.ones(6, bool)}
    (result,) = rank_by_protocols(
        descending(1, 6), csr([[1]]), [(PROTOCOLS["standard"], None)], ks=(4,), item_groups=groups
    )
    assert list(result.by_target) == ["all"] and result.by_target["all"].metrics["mrr@4"] == 0.5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    from hellm.data import load_dataset, write_sample_shop

    shop = tmp_path_factory.mktemp("shop") / "shop"
    write_sample_shop(shop, num_users=150, num_items=90, num_groups=4)
    return load_dataset(shop)


@pytest.fixture(scope="module")
def scores(dataset):
    return torch.from_numpy(np.random.default_rng(0).standard_normal((150, 90)).astype(np.float32))


def test_slices_partition_users_and_recombine_to_the_whole(dataset, scores):
    # One target per user, so every slice is a set of users and their weighted mean is the whole.
    (result,) = evaluate_protocols(TableScorer(scores), dataset, by_target=True)
    lengths = np.diff(dataset.histories("train", "valid")[0])
    slices = slices_of(result, lengths)
    for parts in slices.values():
        users = np.concatenate([part.users for part in parts.values()])
        assert len(parts) > 1 and sorted(users.tolist()) == result.users.tolist()
        for name in ("recall@10", "ndcg@20"):
            total = sum(part.metrics[name] * part.num_users for part in parts.values())
            assert total / result.num_users == pytest.approx(result.metrics[name])
    counts = np.bincount(dataset.pairs("train")[1], minlength=90)
    target = dict(zip(*dataset.pairs("test"), strict=True))
    for label, part in slices["item popularity"].items():
        among = popularity_groups(counts)[label]
        assert all(among[target[user]] for user in part.users)
    for label, part in slices["history length"].items():
        low, _, high = label.partition(" to ")
        assert all(int(low) <= lengths[user] <= int(high or low) for user in part.users)


def test_protocols_in_one_pass_are_those_alone(dataset, scores):
    names = ["standard", "mmrec", "recbole-sequential", "hellm-llm", "sampled-popularity"]
    for split in ("valid", "test"):
        scorer = TableScorer(scores)
        scorer.num_items = 90
        together = evaluate_protocols(scorer, dataset, split, names, batch_size=40)
        assert sum(scorer.batches) == 150
        for name, result in zip(names, together, strict=True):
            alone = evaluate_dataset(TableScorer(scores), dataset, split, name)
            assert result.metrics == alone.metrics and np.array_equal(result.users, alone.users)
            assert result.protocol.name == name


def test_protocols_with_different_users_share_a_pass():

    for split in ("valid", "test"):
        rows = [(name, expected) for name, one, expected in PROTOCOL_TABLE if one == split]
        results = evaluate_protocols(descending(4, 6), FakeDataset(), split, [name for name, _ in rows], ks=(3,))
        for (name, expected), result in zip(rows, results, strict=True):
            found = dict(zip(result.users.tolist(), result.per_user["mrr@3"].tolist(), strict=True))
            assert found == pytest.approx(expected), name


def test_diversity_is_of_the_features_of_the_data(dataset, scores):
    result = evaluate_dataset(TableScorer(scores), dataset, diversity=True)
    group = np.arange(90) % 4
    # Lists from one group of like items have less of it than random ones.
    alike = torch.from_numpy((group[None] == group[np.arange(150) % 4, None]).astype(np.float32))
    same = evaluate_dataset(TableScorer(alike), dataset, diversity=True)
    assert 0 < same.metrics["diversity@10"] < 0.8 * result.metrics["diversity@10"]
    bare = type(dataset)(**{**vars(dataset), "item_features": {}})
    with pytest.raises(ValueError, match="diversity needs item features, and data set 'shop' has none"):
        evaluate_dataset(TableScorer(scores), bare, diversity=True)


def test_means_over_seeds_hold_for_slices(dataset, scores):
    one, other = (evaluate_protocols(TableScorer(s), dataset, by_target=True)[0] for s in (scores, -scores))
    mean = mean_result([one, other])
    for label, part in mean.by_target.items():
        parts = [result.by_target[label].per_user["ndcg@20"] for result in (one, other)]
        np.testing.assert_allclose(part.per_user["ndcg@20"], np.mean(parts, axis=0))
