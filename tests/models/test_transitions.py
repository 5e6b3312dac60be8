"""What follows what, against the definition written with dense matrices."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from hellm.data import Histories
from hellm.models.sequence import ItemPairs, TransitionModel

LISTS = [[0, 1, 2, 1], [3], [], [2, 1, 4, 0, 1]]
HISTORIES = Histories.of_lists(LISTS)
NUM_ITEMS = 6
SIMILAR = ItemPairs(torch.tensor([1, 1, 5]), torch.tensor([2, 4, 1]), torch.tensor([0.75, 0.25, 1.0]))


def dense(pairs: ItemPairs, num_items: int = NUM_ITEMS) -> torch.Tensor:
    matrix = torch.zeros(num_items, num_items)
    matrix.index_put_((pairs.source, pairs.target), pairs.weight, accumulate=True)
    return matrix


def defined_scores(decay: float, exponent: float, content_weight: float, max_lag: int) -> torch.Tensor:
    """[users, items] by loops over the lists."""
    counts = torch.zeros(NUM_ITEMS, NUM_ITEMS)
    for history in LISTS:
        for place, item in enumerate(history):
            for lag in range(1, min(max_lag, len(history) - 1 - place) + 1):
                counts[item, history[place + lag]] += decay ** (lag - 1)
    normalised = counts * (counts.sum(1, keepdim=True) + 1) ** -exponent
    alone = (counts.sum(0) == 0) & (counts.sum(1) == 0)
    spread = torch.eye(NUM_ITEMS) + torch.where(alone, 1.0, content_weight)[:, None] * dense(SIMILAR)
    query = torch.zeros(len(LISTS), NUM_ITEMS)
    for row, history in enumerate(LISTS):
        for age, item in enumerate(reversed(history)):
            query[row, item] += decay**age
    return query @ spread @ normalised @ spread.T


@pytest.mark.parametrize("content_weight", [0.0, 0.4])
@pytest.mark.parametrize(("decay", "exponent", "max_lag"), [(0.5, 0.5, 10), (1.0, 0.0, 2), (0.3, 1.0, 1)])
def test_scores_are_those_of_the_definition(decay, exponent, max_lag, content_weight):
    settings = {"decay": decay, "exponent": exponent, "content_weight": content_weight}
    model = TransitionModel.fit(HISTORIES, NUM_ITEMS, max_lag=max_lag, similar=SIMILAR, **settings)
    scores = model.history_scores(*HISTORIES)
    torch.testing.assert_close(scores, defined_scores(max_lag=max_lag, **settings), rtol=1e-5, atol=1e-6)
    assert (scores >= 0).all() and scores.dtype == torch.float32


def test_a_batch_is_what_each_is_alone(monkeypatch):
    monkeypatch.setattr("hellm.models.sequence.transitions._BATCH", 2)
    model = TransitionModel.fit(HISTORIES, NUM_ITEMS, similar=SIMILAR, content_weight=0.4)
    together = model.history_scores(*HISTORIES)
    alone = [model.history_scores(*HISTORIES.take(np.array([user]))) for user in range(len(LISTS))]
    assert torch.equal(together, torch.cat(alone))


def test_new_items_follow_what_their_nearest_follow():
    model = TransitionModel.fit(HISTORIES, NUM_ITEMS, similar=SIMILAR, content_weight=0.4)
    shares = torch.tensor([[0.0, 0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 1.0, 0]]).to_sparse()
    longer = model.extended(shares)
    scores, before = longer.history_scores(*HISTORIES), model.history_scores(*HISTORIES)
    assert torch.equal(scores[:, :NUM_ITEMS], before)
    plain = TransitionModel(NUM_ITEMS, model.transitions, SIMILAR, content_weight=0.4)
    weight = torch.tensor([0.4, 0.4, 0.4, 0.4, 0.4, 1.0])[:, None]
    unspread = plain.history_scores(*HISTORIES) @ torch.linalg.inv(torch.eye(NUM_ITEMS) + weight * dense(SIMILAR)).T
    torch.testing.assert_close(scores[:, NUM_ITEMS:], unspread @ shares.to_dense().T, rtol=1e-4, atol=1e-5)
    # In a history, the second new item counts as the item that is nearest to it.
    of_new, of_nearest = (longer.history_scores(*Histories.of_lists([[item]])) for item in (NUM_ITEMS + 1, 4))
    torch.testing.assert_close(of_new, of_nearest)
    assert of_new.any()


@pytest.mark.parametrize("content_weight", [0.0, 0.4])
def test_an_item_without_transitions_ranks_as_one_that_came_later(content_weight):
    there = TransitionModel.fit(HISTORIES, NUM_ITEMS, similar=SIMILAR, content_weight=content_weight)
    known = ItemPairs(*(part[SIMILAR.source < 5] for part in SIMILAR))
    before = TransitionModel.fit(HISTORIES, NUM_ITEMS - 1, similar=known, content_weight=content_weight)
    later = before.extended(torch.tensor([[0.0, 1.0, 0, 0, 0]]).to_sparse())
    torch.testing.assert_close(later.history_scores(*HISTORIES), there.history_scores(*HISTORIES))
    assert there.history_scores(*HISTORIES)[:, 5].any()


def test_a_saved_model_is_the_same(tmp_path):
    for similar in (SIMILAR, None):
        model = TransitionModel.fit(HISTORIES, NUM_ITEMS, similar=similar, content_weight=0.4, exponent=0.3)
        model.save(tmp_path)
        for other in (TransitionModel.load(tmp_path), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other.history_scores(*HISTORIES), model.history_scores(*HISTORIES))
            assert torch.equal(other.item_keys(), model.item_keys())


def test_items_of_like_company_have_like_keys():
    # 0 and 1 come before 2 and after 3; 4 and 5 have another company.
    lists = [[3, 0, 2], [3, 1, 2], [4, 5, 4, 5]]
    keys = TransitionModel.fit(Histories.of_lists(lists), NUM_ITEMS).item_keys()
    cosine = torch.nn.functional.cosine_similarity(keys[:1], keys)
    assert cosine[1] > 0.99 and (cosine[2:].abs() < 0.5).all()


def test_histories_are_checked():
    model = TransitionModel.fit(HISTORIES, NUM_ITEMS)
    with pytest.raises(ValueError, match=r"histories items must be in \[0, 6\), got 6"):
        model.history_scores(torch.tensor([0, 1]), torch.tensor([6]))
    nothing = TransitionModel.fit(Histories.of_lists([[], [1]]), NUM_ITEMS)
    assert not nothing.history_scores(*HISTORIES).any()
