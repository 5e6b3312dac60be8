from __future__ import annotations

import numpy as np
import pytest

from hellm.training.history_sampler import HistorySampler

# User 0 has five events, user 1 has none, user 2 two, user 3 one.
USERS = np.array([0, 0, 0, 0, 0, 2, 2, 3])
ITEMS = np.array([10, 11, 12, 13, 14, 20, 21, 30])


def pairs(sampler, epoch=0):
    """All (history, targets) of an epoch."""
    found = []
    for step in range(sampler.num_steps):
        batch = sampler.sample(epoch, step)
        per_target = len(batch.targets) == len(batch.indptr) - 1
        for row in range(len(batch.indptr) - 1):
            part = slice(batch.indptr[row], batch.indptr[row + 1])
            own = batch.targets[row : row + 1] if per_target else batch.targets[part]
            found.append((tuple(batch.items[part].tolist()), tuple(own.tolist())))
    return sorted(found)


def test_one_history_per_user_has_a_target_at_every_position():
    sampler = HistorySampler(USERS, ITEMS, 4, batch_tokens=8)
    assert pairs(sampler) == [((10, 11, 12, 13), (11, 12, 13, 14)), ((20,), (21,))]
    assert (sampler.num_histories, sampler.num_targets, sampler.num_tokens) == (2, 5, 5)


def test_one_history_per_target_has_all_before_it():
    sampler = HistorySampler(USERS, ITEMS, 4, per_target=True, batch_tokens=6)
    expected = [((10,), (11,)), ((10, 11), (12,)), ((10, 11, 12), (13,)), ((10, 11, 12, 13), (14,)), ((20,), (21,))]
    assert pairs(sampler) == expected
    assert (sampler.num_histories, sampler.num_targets) == (5, 5)


def test_long_histories_keep_their_latest_items():
    assert ((12, 13), (13, 14)) in pairs(HistorySampler(USERS, ITEMS, 4, max_length=2))
    assert ((12, 13), (14,)) in pairs(HistorySampler(USERS, ITEMS, 4, per_target=True, max_length=2))


def random_events(seed=0, num_users=200):
    rng = np.random.default_rng(seed)
    count = rng.integers(0, 30, num_users)
    return np.repeat(np.arange(num_users), count), rng.integers(0, 50, count.sum()), num_users


@pytest.mark.parametrize("per_target", [False, True])
def test_batches_stay_within_their_tokens_and_waste_little(per_target):
    sampler = HistorySampler(
        *random_events(), per_target=per_target, batch_tokens=300, tokens_around=7, tokens_per_item=2, max_length=20
    )
    padded = 0
    for step in range(sampler.num_steps):
        lengths = np.diff(sampler.sample(0, step).indptr)
        padded += len(lengths) * (7 + 2 * lengths.max())
        assert len(lengths) * (7 + 2 * lengths.max()) <= 300
    assert padded == sampler.num_padded_tokens
    assert sampler.num_tokens <= padded <= 1.15 * sampler.num_tokens


def test_epochs_hold_the_same_histories_in_other_batches():
    sampler = HistorySampler(*random_events(), batch_tokens=100)
    assert pairs(sampler, 0) == pairs(sampler, 1)
    assert any(
        sampler.sample(0, step).items.tolist() != sampler.sample(1, step).items.tolist()
        for step in range(sampler.num_steps)
    )


def test_a_batch_depends_on_seed_epoch_and_step_alone():
    one, other = (HistorySampler(*random_events(), batch_tokens=100, seed=3) for _ in range(2))
    for step in reversed(range(other.num_steps)):
        assert all(np.array_equal(*both) for both in zip(one.sample(2, step), other.sample(2, step), strict=True))


def test_unsorted_batches_have_a_fixed_number_of_histories():
    sampler = HistorySampler(*random_events(), per_target=True, batch_size=7, sort=False)
    sizes = [len(sampler.sample(0, step).indptr) - 1 for step in range(sampler.num_steps)]
    assert sizes[:-1] == [7] * (len(sizes) - 1) and sum(sizes) == sampler.num_histories


@pytest.mark.parametrize("sort", [True, False])
def test_max_steps_takes_other_histories_every_epoch(sort):
    settings = {"per_target": True, "batch_tokens": 10**9, "batch_size": 7, "sort": sort}
    whole, part = (HistorySampler(*random_events(), **settings, max_steps=steps) for steps in (None, 5))
    assert part.num_steps == 5 < whole.num_steps
    for step in range(5):
        assert np.array_equal(part.sample(1, step).items, whole.sample(1, step).items)
    assert pairs(part, 0) != pairs(part, 1)
    epochs = [sum(len(part.sample(epoch, step).items) for step in range(5)) for epoch in range(300)]
    assert abs(np.mean(epochs) / part.num_tokens - 1) < 0.05
    assert abs(part.num_histories - 35) <= 1 and part.num_targets == part.num_histories
    assert part.num_padded_tokens < whole.num_padded_tokens


def test_max_steps_beyond_the_epoch_changes_nothing():
    settings = {"batch_tokens": 100, "tokens_around": 3}
    whole, same = (HistorySampler(*random_events(), **settings, max_steps=steps) for steps in (None, 10**6))
    names = ("num_steps", "num_histories", "num_targets", "num_tokens", "num_padded_tokens")
    assert [getattr(whole, name) for name in names] == [getattr(same, name) for name in names]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 0}, "max_length must be >= 1, got 0"),
        ({"batch_tokens": 0}, "batch_tokens must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"max_steps": 0}, "max_steps must be >= 1, got 0"),
        ({"sort": False}, "batch_size must be given with sort=False, got None"),
    ],
)
def test_arguments_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        HistorySampler(USERS, ITEMS, 4, **settings)


def test_users_without_a_second_event_are_an_error():
    with pytest.raises(ValueError, match="no user has two training events"):
        HistorySampler(np.array([0, 1]), np.array([3, 4]), 2)
