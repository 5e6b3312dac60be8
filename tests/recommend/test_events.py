"""Events that come after training: who has them is known by the history, and nobody else changes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support.content_recommenders import DATA, MODELS, features, make_recommender
from support.threads import at_once

from hellm.data import DataError, Histories
from hellm.recommend import Recommender
from hellm.recommend.events import ARRIVED, Events

USERS = [f"u{row}" for row in range(DATA.num_users)]


@pytest.fixture(params=MODELS)
def recommender(request, tmp_path_factory) -> Recommender:
    return make_recommender(request.param, tmp_path_factory.mktemp("base"))


def events_of(recommender, user):
    return [one.item for one in recommender.history(user)]


def test_a_user_with_new_events_is_known_by_all_of_them(recommender):
    before = events_of(recommender, "u1")
    recommender.add_events(["u1", "u1"], ["i9", "i2"])
    assert events_of(recommender, "u1") == [*before, "i9", "i2"]
    (known,), (bare,) = recommender.recommend("u1"), recommender.recommend(histories=[[*before, "i9", "i2"]])
    assert known.basis == "history" and known.items == bare.items


def test_others_stay_bit_for_bit(recommender):
    others = [user for user in USERS if user != "u1"]
    before = [recommender.recommend(user) for user in others]
    popularity = recommender.popularity.clone()
    recommender.add_events(["u1", "new"], ["i9", "i2"])
    assert [recommender.recommend(user) for user in others] == before
    assert torch.equal(recommender.popularity, popularity)


def test_a_new_user_is_taken_up(recommender, tmp_path):
    recommender.add_events(["new", "u1", "new"], ["i3", "i0", "i6"])
    assert recommender.num_users == DATA.num_users + 1 and recommender.user_ids.ids[-1] == "new"
    (found,) = recommender.recommend("new")
    assert found.items == recommender.recommend(histories=[["i3", "i6"]])[0].items
    assert {one.item for one in recommender.explain("i9", user="new")} == {"i3", "i6"}
    score = recommender.history("new")[0].score
    rows = recommender._scores(recommender._current, np.array([DATA.num_users]))
    assert score == float(rows[0, 3]) and recommender.scores(torch.tensor([0, DATA.num_users])).shape[0] == 2
    loaded = Recommender.load(recommender.save(tmp_path / "saved"))
    assert loaded.recommend(["new", "u1", "u2"]) == recommender.recommend(["new", "u1", "u2"])
    loaded.add_events(["new"], ["i9"])
    assert events_of(loaded, "new") == ["i3", "i6", "i9"]


def test_evaluations_do_not_read_them(recommender):
    users = torch.arange(DATA.num_users)
    before = recommender.scorer("test").scores(users).clone()
    recommender.add_events(["u1", "new"], ["i9", "i2"])
    scorer = recommender.scorer("test")
    after = scorer(users) if callable(scorer) else scorer.scores(users)
    torch.testing.assert_close(after, before)
    assert recommender.has_training_events(*DATA.train)


def test_new_items_and_events_of_them(recommender):
    recommender.add_items({"text": features(1, 0)}, ["fresh"])
    recommender.add_events(["u1"], ["fresh"])
    assert events_of(recommender, "u1")[-1] == "fresh"
    assert "fresh" not in {one.item for one in recommender.recommend("u1", k=19)[0]}


@pytest.mark.parametrize(
    ("users", "items", "match"),
    [
        (["u1"], ["i99"], "unknown item 'i99' among the 18 items of the run; nearest: i"),
        (["u1", "u2"], ["i1"], "users and items must be of the same events, got 2 and 1"),
        ("u1", ["i1"], "users must be a list of texts"),
    ],
)
def test_what_does_not_fit_changes_nothing(recommender, users, items, match):
    before = recommender._current
    with pytest.raises((ValueError, DataError), match=match):
        recommender.add_events(users, items)
    recommender.add_events([], [])
    assert recommender._current is before


def test_readers_beside_writers_see_whole_states(recommender):
    start = len(events_of(recommender, "u1"))
    pair = ["i9", "i2"]

    def add():
        if recommender.num_users < DATA.num_users + 100:
            recommender.add_events(["u1", "u1", f"n{recommender.num_users}"], [*pair, "i3"])

    def whole():
        found = events_of(copy.copy(recommender), "u1")
        assert (len(found) - start) % 2 == 0 and found[start:] == pair * ((len(found) - start) // 2)
        state = recommender._current
        assert state.events.num_users == len(state.user_ids)
        recommender.recommend(state.user_ids.ids[-1], k=3)

    assert at_once(add, *[whole] * 6, seconds=1.0) == []


def test_events_are_put_at_the_end_of_their_users():
    before = Events(np.array([0, 0, 2]), np.array([5, 6, 7]), np.zeros(3, np.int8), 3)
    after = before.extended(np.array([2, 0, 3, 1, 0, 3]), np.array([10, 11, 12, 13, 14, 15]), 4)
    expected = Histories.of_lists([[5, 6, 11, 14], [13], [7, 10], [12, 15]])
    assert after.histories.items.tolist() == expected.items.tolist()
    assert after.histories.indptr.tolist() == expected.indptr.tolist()
    assert after.split.tolist() == [0, 0, ARRIVED, ARRIVED, ARRIVED, 0, ARRIVED, ARRIVED, ARRIVED]
    assert len(before.users) == 3 and after.has_arrived.tolist() == [True, True, True, True]
