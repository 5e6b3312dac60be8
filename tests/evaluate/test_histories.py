from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hellm.data import Dataset, IdMap
from hellm.evaluate import HistoryScorer, evaluate_dataset, evaluate_histories

# user: items in time order with their split (0 train, 1 validation, 2 test)
EVENTS = {0: ([3, 1, 0, 2], [0, 0, 1, 2]), 1: ([4, 2, 1], [0, 1, 2]), 3: ([0, 3, 4, 1], [0, 0, 1, 2])}


class NextItem:
    """Scores 1 for the item after the last one (cyclic), 0 for the others; an empty history scores 0 everywhere."""

    num_items = 5

    def __init__(self):
        self.asked = []

    def embed(self, indptr, items):
        self.asked.append([items[start:stop].tolist() for start, stop in itertools.pairwise(indptr)])
        queries = torch.zeros(len(indptr) - 1, self.num_items)
        for row, history in enumerate(self.asked[-1]):
            if history:
                queries[row, (history[-1] + 1) % self.num_items] = 1
        return queries

    def item_keys(self):
        return torch.eye(self.num_items, requires_grad=True)


@pytest.fixture
def dataset():
    users = np.repeat(list(EVENTS), [len(items) for items, _ in EVENTS.values()])
    items, split = (np.concatenate([np.array(pair[part]) for pair in EVENTS.values()]) for part in (0, 1))
    return Dataset(
        name="four",
        num_users=4,
        num_items=5,
        users=users,
        items=items,
        timestamps=None,
        split=split.astype(np.int8),
        user_ids=IdMap.range(4),
        item_ids=IdMap.range(5),
    )


def test_scores_are_those_of_each_users_history():
    model = NextItem()
    scorer = HistoryScorer(model, np.array([0, 2, 2, 5]), np.array([1, 3, 0, 3, 4]))
    scores = scorer.scores(torch.tensor([2, 0, 1, 2]))
    assert model.asked == [[[0, 3, 4], [1, 3], [], [0, 3, 4]]]
    expected = torch.zeros(4, 5)
    # Without a history: how often each item is in the histories.
    expected[2] = torch.tensor([1.0, 1, 0, 2, 1])
    expected[0, 0] = expected[1, 4] = expected[3, 0] = 1
    assert torch.equal(scores, expected) and not scores.requires_grad
    assert scorer.num_items == 5


@pytest.mark.parametrize(
    ("split", "known"),
    [("valid", [[3, 1], [4], [], [0, 3]]), ("test", [[3, 1, 0], [4, 2], [], [0, 3, 4]])],
)
def test_a_split_is_scored_with_what_came_before_it(dataset, split, known):
    model = NextItem()
    HistoryScorer.of(model, dataset, split).scores(torch.arange(4))
    assert model.asked == [known]


def test_no_users_give_no_scores():
    assert HistoryScorer(NextItem(), np.array([0, 1]), np.array([2])).scores(
        torch.tensor([], dtype=torch.int64)
    ).shape == (0, 5)


def test_evaluation_of_histories_is_that_of_their_scorer(dataset):
    # validation: 1 -> 2 (is 0), 4 -> 0 (is 2), 3 -> 4 (is 4): one hit in three
    found = evaluate_histories(NextItem(), dataset, "valid", ks=(1,), protocol="recbole-sequential")
    assert found.metrics["recall@1"] == pytest.approx(1 / 3)
    # test: 0 -> 1 (is 2), 2 -> 3 (is 1), 4 -> 0 (is 1): no hit
    found = evaluate_histories(NextItem(), dataset, ks=(1,), protocol="recbole-sequential")
    assert found.split == "test" and found.metrics["recall@1"] == 0
    scorer = HistoryScorer.of(NextItem(), dataset, "test")
    assert (
        evaluate_dataset(scorer, dataset, ks=(1, 3)).metrics
        == evaluate_histories(NextItem(), dataset, ks=(1, 3)).metrics
    )


def test_wrong_arguments_are_named(dataset):
    with pytest.raises(ValueError, match=r"split must be 'valid' or 'test', got 'train'"):
        HistoryScorer.of(NextItem(), dataset, "train")
    with pytest.raises(ValueError, match=r"histories indptr must rise from 0 to len\(items\) = 1, got 0\.\.2"):
        HistoryScorer(NextItem(), np.array([0, 2]), np.array([2]))
