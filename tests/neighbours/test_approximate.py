"""The approximate search: what it finds, what it says of that, and what it needs."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch
from support.datasets import make_blocks

from hellm.config import ModelConfig, PretrainConfig
from hellm.data import ItemFeatures
from hellm.graphs import nearest_items, search_recall, searching
from hellm.neighbours import approximate, approximate_knn
from hellm.ops import knn
from hellm.training.pretrain import pretrain

K = 8


@pytest.fixture
def usearch():
    return pytest.importorskip("usearch", reason='needs the extra: pip install "hellm[export]"')


@pytest.fixture(scope="module")
def small_dataset():
    return make_blocks()


def rows(num_rows=3000, dim=24):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_rows, 6)) @ rng.standard_normal((6, dim)) + 0.2 * rng.standard_normal((num_rows, dim))
    x[::50] = 0
    return x.astype(np.float32)


def test_what_it_finds_and_what_it_says_of_it(usearch):
    x = rows()
    index, similarity, recall = approximate_knn(x, K)
    exact, value = knn(torch.from_numpy(x), K)
    present = torch.from_numpy(x.any(axis=1))
    found = (index.unsqueeze(2) == exact.unsqueeze(1)).any(2)[present].float().mean()
    assert found > 0.98 and abs(found - recall) < 0.01
    assert (index[~present] == -1).all() and (similarity[~present] == 0).all()
    assert (index[present][:, 0] == present.nonzero()[:, 0]).all()
    assert (similarity.diff(dim=1) <= 0).all()
    same = index == exact
    torch.testing.assert_close(similarity[same], value[same], rtol=0, atol=1e-5)
    unit = torch.nn.functional.normalize(torch.from_numpy(x).double(), dim=1)
    cosines = (unit[index.clamp(min=0)] @ unit.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(similarity[present].double(), cosines[present], rtol=0, atol=1e-5)


def test_recall_is_measured_and_not_assumed(usearch, monkeypatch):
    """A graph of few links that is hardly searched misses neighbours, and the figure says how many."""
    for name, value in (("_CONNECTIVITY", 2), ("_EXPANSION_ADD", 2), ("_EXPANSIONS", (1,)), ("_SAMPLED", 3000)):
        monkeypatch.setattr(approximate, name, value)
    x = np.random.default_rng(0).standard_normal((3000, 24)).astype(np.float32)
    index, _, recall = approximate_knn(x, K)
    found = (index.unsqueeze(2) == knn(torch.from_numpy(x), K)[0].unsqueeze(1)).any(2).float().mean()
    assert recall < 0.9 and recall == pytest.approx(float(found), abs=1e-3)


def test_fewer_rows_than_neighbours(usearch):
    x = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], np.float32)
    index, similarity, recall = approximate_knn(x, 3)
    assert index.tolist() == [[0, 2, -1], [-1, -1, -1], [2, 0, -1]] and recall == 1
    assert similarity[:, 2].tolist() == [0, 0, 0]
    assert approximate_knn(np.zeros((2, 3), np.float32), 1)[0].tolist() == [[-1], [-1]]


def test_one_thread_gives_the_same_again(usearch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, again = approximate_knn(rows(500), K), approximate_knn(rows(500), K)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and first[2] == again[2]


def test_the_result_of_stage_1_says_what_was_found(usearch, small_dataset, tmp_path):
    config = PretrainConfig(model=ModelConfig(embedding_dim=8, knn_k=4, knn_search="approximate"), max_epochs=1)
    result = pretrain(config, small_dataset, tmp_path / "run")
    assert set(result["knn_recall"]) == set(small_dataset.item_features)
    assert all(0.9 < recall <= 1 for recall in result["knn_recall"].values())
    exact = pretrain(
        PretrainConfig(model=ModelConfig(embedding_dim=8), max_epochs=1), small_dataset, tmp_path / "exact"
    )
    assert "knn_recall" not in exact


def test_searches_are_kept_apart(usearch):
    features = ItemFeatures.from_values(rows(300))
    assert search_recall(features, K) is None
    assert search_recall(features, K, search="approximate") > 0.9
    with searching("approximate"):
        assert search_recall(features, K) > 0.9
    assert search_recall(features, K) is None


def test_without_the_extra_nothing_begins(small_dataset, tmp_path, monkeypatch):
    importing = builtins.__import__

    def without(name, *given, **options):
        if name.startswith("usearch"):
            raise ImportError(name)
        return importing(name, *given, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    config = PretrainConfig(model=ModelConfig(knn_search="approximate"))
    with pytest.raises(ImportError, match=r'needs the package usearch: pip install "hellm\[export\]"'):
        pretrain(config, small_dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_search_is_refused():
    with pytest.raises(ValueError, match=r"search must be one of exact, approximate, got 'quick'"):
        nearest_items(ItemFeatures.from_values(rows(30)), 2, search="quick")
