"""Queries of histories by an encoder in place of the model, see `Recommender.encode_with`."""

from __future__ import annotations

import copy

import pytest
import torch
from support.planted_runs import DATA, make_recommender

from hellm.recommend import Recommender

ASKED = {"histories": [["p1", "p4"], ["p2"], ["p17", "p3"]], "k": 5}


class Encoder:
    """The queries of a model, times a factor, and which histories were asked for."""

    def __init__(self, recommender: Recommender, factor: float = 1.0, num_items: int = DATA.num_items) -> None:
        self.model, self.factor, self.num_items = recommender.model, factor, num_items
        self.asked: list[int] = []

    def __call__(self, indptr: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        self.asked += indptr.diff().tolist()
        return self.factor * self.model.embed(indptr, items)


def scores(recommender: Recommender) -> list[list[float]]:
    return [[item.score for item in one.items] for one in recommender.recommend(**ASKED)]


@pytest.mark.parametrize("name", ["graph", "sequence", "fused", "sum"])
def test_the_queries_of_the_encoder_count(name):
    recommender = make_recommender(name)
    before, users = recommender.recommend(**ASKED), recommender.recommend(["u1"])
    other = copy.copy(recommender)
    same = Encoder(recommender)
    recommender.encode_with(same)
    assert recommender.recommend(**ASKED) == before and same.asked == [2, 1, 2]
    recommender.encode_with(Encoder(recommender, 2.0))
    assert scores(recommender) != scores(other)
    if name != "sum":
        assert scores(recommender) == [[2 * score for score in one] for one in scores(other)]
    # Who is known by a trained embedding needs no encoder.
    assert (recommender.recommend(["u1"]) == users) is (name == "graph")
    assert other.recommend(**ASKED) == before


def test_the_sum_keeps_the_towers_without_queries():
    """Queries of nothing leave what followed what."""
    recommender = make_recommender("sum")
    recommender.encode_with(Encoder(recommender, 0.0))
    transitions = recommender.model.towers["transitions"]
    rows = torch.tensor([0, 2]), torch.tensor([1, 4])
    expected = recommender.model.weights["transitions"] * transitions.history_scores(*rows)[0]
    (found,) = recommender.recommend(histories=[["p1", "p4"]], k=3)
    assert [item.score for item in found.items] == [float(expected[int(item.item[1:])]) for item in found.items]


@pytest.mark.parametrize("name", ["graph", "sum"])
def test_histories_with_items_that_it_does_not_know_are_read_by_the_model(name):
    recommender = make_recommender(name)
    encoder = Encoder(recommender, 2.0, num_items=17)
    before = recommender.recommend(**ASKED)
    recommender.encode_with(encoder)
    after = recommender.recommend(**ASKED)
    assert encoder.asked == [2, 1] and after[2] == before[2]
    assert after[0] != before[0] and after[1] != before[1]


def test_it_stays_when_events_come():
    recommender = make_recommender("graph")
    encoder = Encoder(recommender)
    recommender.encode_with(encoder)
    recommender.add_events(["u1"], ["p5"])
    recommender.recommend(["u1"])
    assert len(encoder.asked) == 1
