"""One recommender under many threads: the same bits as alone, and items come whole or not at all.

The long form takes a minute: HELLM_SLOW=1 python -m pytest tests/recommend/test_threads.py
"""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
from support.content_recommenders import DATA, MODELS, features, make_recommender
from support.threads import at_once

from hellm.recommend import Recommender

THREADS, WRITERS = 20, 3
SECONDS = 60.0 if os.environ.get("HELLM_SLOW") else 1.5


@pytest.fixture(params=MODELS)
def recommender(request, tmp_path_factory) -> Recommender:
    return make_recommender(request.param, tmp_path_factory.mktemp("base"))


def questions(recommender: Recommender) -> list:
    old = [f"i{row}" for row in range(DATA.num_items)]
    return [
        lambda: recommender.recommend("u1", k=3, candidates=old),
        lambda: recommender.recommend(["u1", "u5", "u3"], k=5, candidates=old),
        lambda: recommender.recommend(histories=[["i1", "i4"], [], ["i2"]], k=3, candidates=old),
        lambda: recommender.explain("i7", history=["i1", "i4"]),
        lambda: recommender.scores(torch.arange(4))[:, : DATA.num_items].tolist(),
    ]


def test_many_readers_get_the_same_bits_as_one(recommender):
    asked = questions(recommender)
    expected = [ask() for ask in asked]

    def check(number):
        assert asked[number]() == expected[number]

    works = [lambda number=number: check(number % len(asked)) for number in range(THREADS)]
    assert at_once(*works, seconds=SECONDS) == []


def test_readers_beside_writers_see_old_or_new(recommender, tmp_path):
    """Answers on the old items stay as they were; what is saved then loads."""
    asked = questions(recommender)
    expected = [ask() for ask in asked]
    counts = [0] * WRITERS

    def add(writer):
        if counts[writer] < 200:
            names = [f"n{writer}_{counts[writer]}_{row}" for row in range(2)]
            recommender.add_items({"text": features(2, counts[writer])}, names, ["a title", None])
            counts[writer] += 1

    def check(number):
        answer = asked[number]()
        if number == 4:
            np.testing.assert_allclose(answer, expected[number], rtol=1e-5, atol=1e-5)
        else:
            assert [getattr(one, "basis", one) for one in answer] == [getattr(o, "basis", o) for o in expected[number]]

    def whole():
        current = recommender._current
        sizes = {len(current.ids), len(current.titles), len(current.keys), len(current.popularity)}
        sizes |= {current.content.num_items, len(current.model.item_keys())}
        assert len(sizes) == 1 and (sizes.pop() - DATA.num_items) % 2 == 0
        recommender.similar_items("i1", k=3)
        recommender.recommend(histories=[[recommender.item_ids.ids[-1]]], k=3)

    works = [lambda writer=writer: add(writer) for writer in range(WRITERS)]
    works += [whole, whole]
    works += [lambda number=number: check(number % len(asked)) for number in range(THREADS - len(works))]
    assert at_once(*works, seconds=SECONDS) == []
    assert recommender.num_items == DATA.num_items + 2 * sum(counts) and sum(counts) >= WRITERS
    loaded = Recommender.load(recommender.save(tmp_path / "saved"))
    assert loaded.recommend("u1", k=9) == recommender.recommend("u1", k=9)


def test_what_is_saved_while_items_come_is_one_state(recommender, tmp_path):
    saved = []

    def add():
        number = recommender.num_items
        recommender.add_items({"text": features(1, number)}, [f"n{number}"])

    def save():
        if len(saved) < 5:
            saved.append(recommender.save(tmp_path / f"saved{len(saved)}"))

    assert at_once(add, save, seconds=1.0) == []
    sizes = [Recommender.load(path).num_items for path in saved]
    assert sizes == sorted(sizes) and sizes[-1] <= recommender.num_items


def test_a_failed_addition_changes_nothing_and_blocks_nobody(recommender):
    before = recommender._current
    with pytest.raises(ValueError, match="ids must be new"):
        recommender.add_items({"text": features(1, 0)}, ["i1"])
    assert recommender._current is before
    recommender.add_items({"text": features(1, 0)}, ["new"])
    assert before.ids is not recommender.item_ids and len(before.ids) == DATA.num_items == len(before.keys)


def test_a_copy_takes_items_of_its_own(recommender):
    other = copy.deepcopy(recommender)
    other.add_items({"text": features(1, 0)}, ["new"])
    assert (recommender.num_items, other.num_items) == (DATA.num_items, DATA.num_items + 1)
