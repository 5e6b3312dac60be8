"""A metric is one function in one dictionary: results and the names that commands take follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hellm.evaluate import METRICS, compare, metrics, ranking_metrics
from hellm.evaluate.metrics import ACCURACY, LISTS, OVERALL

TARGETS = (np.array([0, 2, 3]), np.array([0, 3, 1]))
SCORES = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])


def scored(users: torch.Tensor) -> torch.Tensor:
    return SCORES[users]


def test_every_metric_is_in_one_dictionary_by_the_name_that_commands_take():
    assert (*ACCURACY, *LISTS, *OVERALL) == METRICS
    found = ranking_metrics(scored, TARGETS, ks=(1, 2), item_counts=np.ones(4), item_vectors=np.eye(4))
    assert set(found.metrics) == {f"{name}@{k}" for name in METRICS for k in (1, 2)}
    assert set(found.per_user) == {f"{name}@{k}" for name in (*ACCURACY, *LISTS) for k in (1, 2)}


def test_a_new_metric_of_each_kind_is_in_the_result(monkeypatch):
    monkeypatch.setitem(ACCURACY, "last_hit", lambda hits, k: hits.is_hit[:, k - 1].astype(float))
    monkeypatch.setitem(LISTS, "first_item", lambda lists, k: lists.top[:, 0].astype(float))
    monkeypatch.setitem(OVERALL, "most", lambda counts: float(counts.max()))
    found = ranking_metrics(scored, TARGETS, ks=(1, 2))
    assert found.per_user["last_hit@1"].tolist() == [1.0, 0.0]
    assert found.per_user["last_hit@2"].tolist() == [0.0, 1.0]
    assert found.metrics["first_item@2"] == 0.0 and found.metrics["most@1"] == 2.0
    # What goes by the lists alone is left out where the protocol draws candidates.
    drawn = ranking_metrics(scored, TARGETS, ks=(1,), protocol="sampled-uniform")
    assert "last_hit@1" in drawn.metrics and not {"first_item@1", "most@1"} & drawn.metrics.keys()


def test_every_metric_says_its_formula():
    for metric in (*ACCURACY.values(), *LISTS.values(), *OVERALL.values()):
        assert metric.__module__ == metrics.__name__ and len(metric.__doc__) > 20
    with pytest.raises(ValueError, match=r"must be among recall, ndcg, .*gini, got 'auc'"):
        compare({"one": scored}, None, metrics=("auc",))
