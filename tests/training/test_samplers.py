from __future__ import annotations

import numpy as np
import pytest

from hellm.training.samplers import TripleSampler

NUM_USERS, NUM_ITEMS = 40, 25


@pytest.fixture
def events():
    """Training events: user u has 1 + u % 5 items; users 7 and 8 have none; user 9 lists one item twice."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(NUM_USERS), 1 + np.arange(NUM_USERS) % 5)
    items = np.concatenate([rng.choice(NUM_ITEMS, 1 + u % 5, replace=False) for u in range(NUM_USERS)])
    kept = ~np.isin(users, [7, 8])
    users, items = users[kept], items[kept]
    users, items = np.append(users, 9), np.append(items, items[users == 9][0])
    order = rng.permutation(len(users))
    return users[order], items[order]


def make(events, **settings):
    return TripleSampler(*events, NUM_USERS, NUM_ITEMS, **settings)


def pairs(users, items):
    return set(zip(users.tolist(), items.tolist(), strict=True))


@pytest.mark.parametrize("strategy", ["user-uniform", "interaction-uniform"])
@pytest.mark.parametrize("negatives", ["uniform", "popularity"])
def test_triples_hold_a_known_and_an_unknown_item(events, strategy, negatives):
    sampler, known = make(events, batch_size=16, strategy=strategy, negatives=negatives), pairs(*events)
    for step in range(sampler.num_steps):
        triples = sampler.sample(0, step)
        assert pairs(triples.users, triples.positives) <= known
        assert not pairs(triples.users, triples.negatives) & known
        assert all(ids.dtype == np.int64 and len(ids) <= 16 for ids in triples)


def test_user_uniform_draws_distinct_users_with_equal_chance(events):
    sampler = make(events, batch_size=10, seed=3)
    counts, rounds = np.zeros(NUM_USERS), 4000
    for step in range(rounds):
        users = sampler.sample(0, step).users
        assert len(np.unique(users)) == 10
        counts[users] += 1
    assert counts[7] == counts[8] == 0
    drawn = counts[counts > 0] / rounds
    assert len(drawn) == NUM_USERS - 2
    # each of 38 users has the chance 10/38; standard error 0.007
    assert np.abs(drawn - 10 / 38).max() < 0.03


def test_user_uniform_draws_each_training_event_of_a_user_with_equal_chance(events):
    sampler, counts = make(events, batch_size=38), np.zeros(NUM_ITEMS)
    for step in range(3000):
        triples = sampler.sample(0, step)
        counts[triples.positives[triples.users == 9]] += 1
    expected = np.bincount(events[1][events[0] == 9], minlength=NUM_ITEMS) / 6
    # user 9 has five items, one of them twice: chances 1/6 and 2/6
    assert np.abs(counts / 3000 - expected).max() < 0.03


def test_uniform_negatives_are_uniform_over_free_items(events):
    sampler, counts = make(events, batch_size=38), np.zeros(NUM_ITEMS)
    for step in range(4000):
        triples = sampler.sample(1, step)
        counts[triples.negatives[triples.users == 9]] += 1
    free = np.setdiff1d(np.arange(NUM_ITEMS), events[1][events[0] == 9])
    assert np.abs(counts[free] / 4000 - 1 / len(free)).max() < 0.012


def test_popularity_negatives_follow_popularity(events):
    sampler, counts = make(events, batch_size=38, negatives="popularity"), np.zeros(NUM_ITEMS)
    for step in range(4000):
        triples = sampler.sample(1, step)
        counts[triples.negatives[triples.users == 9]] += 1
    weight = np.bincount(events[1], minlength=NUM_ITEMS) ** 0.75
    weight[events[1][events[0] == 9]] = 0
    assert np.abs(counts / 4000 - weight / weight.sum()).max() < 0.015


def test_interaction_uniform_visits_every_event_once_per_epoch(events):
    sampler = make(events, batch_size=16, strategy="interaction-uniform")
    orders = []
    for epoch in range(2):
        batches = [sampler.sample(epoch, step) for step in range(sampler.num_steps)]
        drawn = [np.concatenate(part) for part in list(zip(*batches, strict=True))[:2]]
        orders.append(drawn[0])
        sort, expected = np.lexsort(drawn), np.lexsort(events)
        assert np.array_equal(drawn[0][sort], events[0][expected])
        assert np.array_equal(drawn[1][sort], events[1][expected])
    assert not np.array_equal(*orders)


@pytest.mark.parametrize("strategy", ["user-uniform", "interaction-uniform"])
def test_step_depends_on_seed_epoch_and_step_only(events, strategy):
    first, second = (make(events, batch_size=8, strategy=strategy, seed=5) for _ in range(2))
    for step in (3, 1, 2):
        second.sample(0, step)
    assert all(map(np.array_equal, first.sample(2, 1), second.sample(2, 1)))
    other = make(events, batch_size=8, strategy=strategy, seed=6).sample(2, 1)
    for triples in (other, first.sample(2, 2), first.sample(1, 1)):
        assert not all(map(np.array_equal, first.sample(2, 1), triples))


def test_published_number_of_steps(events):
    num_events = len(events[0])
    assert make(events, batch_size=16).num_steps == num_events // 16 + 1
    assert make(events, batch_size=16, strategy="interaction-uniform").num_steps == -(-num_events // 16)


def test_fewer_users_than_the_batch_use_what_there_is(events):
    sampler = make(events, batch_size=1024)
    assert sampler.batch_size == 38
    assert sorted(sampler.sample(0, 0).users) == [u for u in range(NUM_USERS) if u not in (7, 8)]


@pytest.mark.parametrize("negatives", ["uniform", "popularity"])
def test_user_with_one_free_item_gets_it(negatives):
    num_items = 5000
    items = np.delete(np.arange(num_items), 1234)
    events = np.zeros(len(items), dtype=np.int64), items
    sampler = TripleSampler(*events, 1, num_items, negatives=negatives)
    assert [sampler.sample(0, step).negatives.tolist() for step in range(3)] == [[1234]] * 3


def test_user_who_has_everything_is_left_out():
    sampler = TripleSampler(np.array([0, 0, 1]), np.array([0, 1, 0]), 2, 2, batch_size=2)
    assert sampler.sample(0, 0).users.tolist() == [1]
    sampler = TripleSampler(np.array([0, 0, 1]), np.array([0, 1, 0]), 2, 2, strategy="interaction-uniform")
    assert (sampler.num_steps, sampler.sample(0, 0).users.tolist()) == (1, [1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "all"}, r"strategy must be one of 'user-uniform', 'interaction-uniform', got 'all'"),
        ({"negatives": "hard"}, r"negatives must be one of 'uniform', 'popularity', got 'hard'"),
        ({"batch_size": 0}, r"batch_size must be >= 1, got 0"),
        ({"users": [0, 0]}, r"users and items must be \[num_events\] alike, got \(2,\) and \(1,\)"),
        ({"users": [2]}, r"users must be in \[0, 2\), got 2"),
        ({"items": [-1]}, r"items must be in \[0, 3\), got -1"),
        ({"users": [], "items": []}, r"no user has both a training event and an item without one"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {"users": [0], "items": [1], "num_users": 2, "num_items": 3} | changes
    with pytest.raises(ValueError, match=message):
        TripleSampler(**arguments)
