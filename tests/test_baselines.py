from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from support.recommender_contract import PlantedBlocks, RecommenderContract, planted_blocks

from hellm.baselines import ALS, BASELINES, BPR, Baseline, ItemKNN, Popularity, fit_baseline

needs_implicit = pytest.mark.skipif(find_spec("implicit") is None, reason="the implicit library is not installed")
USERS, ITEMS = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 2])


class FakeDataset:
    num_users, num_items = 4, 5

    def pairs(self, split):
        assert split == "train"
        return USERS, ITEMS


class BaselineContract(RecommenderContract):
    baseline = ""
    settings: dict = {}  # noqa: RUF012

    def fit(self, data: PlantedBlocks, seed: int = 0) -> Baseline:
        model = BASELINES[self.baseline](seed=seed, **self.settings)
        return model.fit(data.train, data.num_users, data.num_items)


class TestPopularityContract(BaselineContract):
    baseline, personal = "popularity", False


def test_chance_is_the_same_in_every_batch_and_other_for_every_user_and_seed():
    model = fit_baseline("random", FakeDataset(), seed=1)
    scores = model.scores(torch.tensor([2, 0, 2]))
    assert scores.shape == (3, 5) and torch.equal(scores[0], scores[2])
    assert torch.equal(model.scores(torch.tensor([0]))[0], scores[1]) and not torch.equal(scores[0], scores[1])
    assert not torch.equal(fit_baseline("random", FakeDataset(), seed=2).scores(torch.tensor([2]))[0], scores[0])
    assert model.scores(torch.zeros(0, dtype=torch.int64)).shape == (0, 5)


@needs_implicit
class TestItemKNNContract(BaselineContract):
    baseline = "itemknn"


@needs_implicit
class TestItemKNNCosineContract(BaselineContract):
    baseline, settings = "itemknn", {"weighting": "cosine"}


@needs_implicit
class TestItemKNNTfidfContract(BaselineContract):
    baseline, settings = "itemknn", {"weighting": "tfidf"}


@needs_implicit
class TestBPRContract(BaselineContract):
    baseline = "bpr"
    settings = {"factors": 8, "iterations": 200}  # noqa: RUF012


@needs_implicit
class TestALSContract(BaselineContract):
    baseline = "als"
    settings = {"factors": 3}  # noqa: RUF012 (as many as blocks: more would reproduce the gaps as well)


def test_planted_blocks_leave_out_one_item_of_the_own_block():
    data = planted_blocks()
    users, items = data.train
    assert (data.block_of_user[users] == data.block_of_item[items]).all()
    assert (data.block_of_item[data.best_item] == data.block_of_user).all()
    assert len(users) == data.num_users * 5  # six items a block, one left out
    assert not (data.best_item[users] == items).any()


def test_popularity_counts_train_events():
    model = Popularity().fit((np.array([0, 1, 1]), np.array([2, 2, 0])), 2, 4)
    assert model.scores(torch.tensor([1, 0])).tolist() == [[1, 0, 2, 0], [1, 0, 2, 0]]


@needs_implicit
def test_item_knn_scores_are_sums_of_cosines():
    # Items as sets of users: 0 {0, 1}, 1 {0, 1, 2}, 2 {2}. cosine = |common| / sqrt(|a| |b|):
    # (0, 1) 2/sqrt(6), (1, 2) 1/sqrt(3), (0, 2) 0.
    # Users 0 and 1 have items 0, 1; user 2 has 1, 2; user 3 has none.
    users, items = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 1, 2])
    model = ItemKNN(weighting="cosine").fit((users, items), 4, 3)
    a, b = 2 / 6**0.5, 1 / 3**0.5
    expected = torch.tensor([[a, a, b], [a, a, b], [a, b, b], [0, 0, 0]])
    torch.testing.assert_close(model.scores(torch.arange(4)), expected)


@needs_implicit
def test_item_knn_keeps_only_the_nearest_neighbours_besides_itself():
    users, items = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 1, 2])
    model = ItemKNN(num_neighbors=1, weighting="cosine").fit((users, items), 4, 3)
    # Nearest of 0 is 1, of 1 is 0, of 2 is 1.
    assert (model.similarity.toarray() > 0).tolist() == [
        [False, True, False],
        [True, False, False],
        [False, True, False],
    ]


@needs_implicit
def test_bm25_counts_a_shared_short_history_more_than_a_shared_long_one():
    # Items 0, 1 share user 0, who has only these; items 2, 3 share user 1, who has 2..9.
    users, items = np.array([0, 0] + [1] * 8 + [2, 3]), np.array([0, 1, *range(2, 10), 10, 11])
    similarity = {name: ItemKNN(weighting=name).fit((users, items), 4, 12).similarity for name in ("bm25", "cosine")}
    assert similarity["cosine"][0, 1] == similarity["cosine"][2, 3]
    assert similarity["bm25"][0, 1] > similarity["bm25"][2, 3]


@needs_implicit
def test_repeated_events_count_once_for_item_knn():
    once = ItemKNN().fit((USERS, ITEMS), 4, 5)
    twice = ItemKNN().fit((np.tile(USERS, 2), np.tile(ITEMS, 2)), 4, 5)
    assert torch.equal(once.scores(torch.arange(4)), twice.scores(torch.arange(4)))


@needs_implicit
@pytest.mark.parametrize("name", ["bpr", "als"])
def test_another_seed_gives_other_scores(name):
    data = planted_blocks()
    first, second = (
        BASELINES[name](factors=4, iterations=2, seed=seed).fit(data.train, data.num_users, data.num_items)
        for seed in (0, 1)
    )
    assert not torch.equal(first.scores(torch.arange(3)), second.scores(torch.arange(3)))


@needs_implicit
@pytest.mark.parametrize("name", list(BASELINES))
def test_fit_baseline_is_quiet_and_uses_the_train_split(name, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fit_baseline(name, FakeDataset(), seed=3)
    assert model.scores(torch.arange(4)).shape == (4, 5)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_fit_baseline_passes_settings_on():
    with pytest.raises(ValueError, match=r"num_neighbors must be >= 1, got 0"):
        fit_baseline("itemknn", FakeDataset(), num_neighbors=0)


def test_unknown_baseline_is_named():
    with pytest.raises(ValueError, match=r"baseline must be one of popularity, random, itemknn, bpr, als, got 'svd'"):
        fit_baseline("svd", FakeDataset())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ItemKNN(weighting="jaccard"), r"weighting must be 'bm25', 'tfidf' or 'cosine', got 'jaccard'"),
        (lambda: BPR(factors=0), r"factors must be >= 1, got 0"),
        (lambda: BPR(iterations=0), r"iterations must be >= 1, got 0"),
        (lambda: BPR(learning_rate=0), r"learning_rate must be > 0, got 0"),
        (lambda: BPR(regularization=-1), r"regularization must be >= 0, got -1"),
        (lambda: ALS(factors=0), r"factors must be >= 1, got 0"),
        (lambda: ALS(alpha=0), r"alpha must be > 0, got 0"),
        (lambda: ALS(regularization=-0.1), r"regularization must be >= 0, got -0.1"),
        (lambda: ALS(iterations=-1), r"iterations must be >= 1, got -1"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("pairs", "sizes", "message"),
    [
        ((USERS, ITEMS), (), r"num_users and num_items must be given with arrays"),
        ((USERS, ITEMS[:2]), (3, 3), r"equally long, got \(5,\), \(2,\)"),
        ((USERS[:0], ITEMS[:0]), (3, 3), r"training pairs must not be empty"),
        ((USERS, ITEMS), (2, 3), r"users must be in \[0, 2\), got 2"),
        ((USERS, ITEMS - 1), (3, 3), r"items must be in \[0, 3\), got -1"),
    ],
)
def test_wrong_pairs_are_named(pairs, sizes, message):
    with pytest.raises(ValueError, match=message):
        Popularity().fit(pairs, *sizes)


def test_scores_before_fit_and_for_unknown_users_raise():
    with pytest.raises(RuntimeError, match=r"Popularity must be fitted before scores\(\) is called"):
        Popularity().scores(torch.tensor([0]))
    model = Popularity().fit((USERS, ITEMS), 3, 3)
    with pytest.raises(ValueError, match=r"users must be in \[0, 3\), got -1"):
        model.scores(torch.tensor([-1]))


@pytest.mark.parametrize(
    ("name", "module"),
    [("ItemKNN", "implicit.nearest_neighbours"), ("BPR", "implicit.bpr"), ("ALS", "implicit.als")],
)
def test_missing_library_names_the_extra(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "implicit", None)
    with pytest.raises(ImportError, match=rf'{name} needs the implicit library: pip install "hellm\[baselines\]"'):
        fit_baseline(name.lower(), FakeDataset())
