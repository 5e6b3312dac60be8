"""Triples drawn by torch operators: what they hold, how often, and that nothing but the step decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hellm.training.device_random import RandomWords, distinct_below, step_keys, uniform_below
from hellm.training.samplers import DeviceTripleSampler, TripleSampler

chisquare = pytest.importorskip("scipy.stats", reason="scipy is not installed").chisquare

NUM_USERS, NUM_ITEMS = 12, 9
# User 3 has nothing, user 4 everything, user 5 one item twice, user 6 all but one.
KNOWN = {0: [2, 5], 1: [0], 2: [8, 1, 4], 4: [*range(9)], 5: [3, 3, 7], 6: [0, 1, 2, 3, 4, 6, 7, 8]}
KNOWN |= {user: [user % 9, (user + 4) % 9] for user in range(7, 12)}
USERS = np.concatenate([np.full(len(items), user) for user, items in KNOWN.items()])
ITEMS = np.concatenate(list(KNOWN.values()))
ELIGIBLE = [user for user in KNOWN if user != 4]


def make(batch_size=4, seed=0, **settings):
    host = TripleSampler(USERS, ITEMS, NUM_USERS, NUM_ITEMS, batch_size=batch_size, seed=seed)
    return DeviceTripleSampler(host, "cpu", **settings)


def drawn(sampler, steps):
    """Users, positives and negatives of many steps, each [steps * B]."""
    batches = [sampler.draw(sampler.keys(0, step))[0] for step in range(steps)]
    return [torch.cat(part).numpy() for part in zip(*batches, strict=True)]


def test_triples_hold_distinct_users_a_known_and_an_unknown_item():
    sampler = make()
    assert sampler.num_steps == len(USERS) // 4 + 1
    for step in range(200):
        triples, rows = sampler.draw(sampler.keys(3, step))
        users, positives, negatives = (part.tolist() for part in triples)
        assert rows == [] and len(set(users)) == 4 and set(users) <= set(ELIGIBLE)
        for user, positive, negative in zip(users, positives, negatives, strict=True):
            assert positive in KNOWN[user] and negative not in KNOWN[user] and 0 <= negative < NUM_ITEMS


def test_users_come_with_equal_chance():
    counts = np.bincount(drawn(make(seed=1), 4000)[0], minlength=NUM_USERS)[ELIGIBLE]
    assert counts.sum() == 16000 and chisquare(counts).pvalue > 1e-3


def test_pairs_of_users_come_with_equal_chance():
    sampler, counts = make(batch_size=2, seed=2), np.zeros((NUM_USERS, NUM_USERS))
    for step in range(9000):
        pair = sorted(sampler.draw(sampler.keys(0, step))[0].users.tolist())
        counts[tuple(pair)] += 1
    pairs = [counts[a, b] for a in ELIGIBLE for b in ELIGIBLE if a < b]
    assert sum(pairs) == 9000 and chisquare(pairs).pvalue > 1e-3


@pytest.mark.parametrize("user", [0, 2, 5, 6, 11])
def test_items_come_with_equal_chance(user):
    users, positives, negatives = drawn(make(batch_size=len(ELIGIBLE), seed=8), 3000)
    own = np.bincount(KNOWN[user], minlength=NUM_ITEMS)
    for items, weight in ((positives, own), (negatives, (own == 0).astype(int))):
        counts = np.bincount(items[users == user], minlength=NUM_ITEMS)
        assert counts.sum() == 3000 and not counts[weight == 0].any()
        if (weight > 0).sum() > 1:
            assert chisquare(counts[weight > 0], 3000 * weight[weight > 0] / weight.sum()).pvalue > 1e-3


def test_positive_and_negative_are_independent():
    users, positives, negatives = drawn(make(batch_size=len(ELIGIBLE), seed=4), 6000)
    both = positives[users == 0] * NUM_ITEMS + negatives[users == 0]
    counts = np.bincount(both, minlength=NUM_ITEMS**2)
    counts = counts[counts > 0]
    assert len(counts) == 2 * 7 and chisquare(counts).pvalue > 1e-3


def test_every_rank_is_another_free_item(monkeypatch):
    sampler = make(batch_size=len(ELIGIBLE))
    keys, found = sampler.keys(0, 0), {user: set() for user in ELIGIBLE}
    words = [word.clone() for word in sampler._words.draw(keys)]
    monkeypatch.setattr(sampler._words, "draw", lambda keys: words)
    for word in range(0, 2**32, 2**24):
        words[3].fill_(word)
        triples, _ = sampler.draw(keys)
        for user, negative in zip(triples.users.tolist(), triples.negatives.tolist(), strict=True):
            found[user].add(negative)
    assert found == {user: set(range(NUM_ITEMS)) - set(KNOWN[user]) for user in ELIGIBLE}


def test_step_depends_on_seed_epoch_and_step_only():
    first, second = (make(seed=5, choices=((30, 7),)) for _ in range(2))
    for step in (3, 1, 2):
        second.draw(second.keys(0, step))

    def flat(sampler, epoch, step):
        triples, rows = sampler.draw(sampler.keys(epoch, step))
        return torch.cat([*triples, *rows])

    expected = flat(first, 2, 1)
    assert torch.equal(flat(second, 2, 1), expected)
    for other in (flat(make(seed=6, choices=((30, 7),)), 2, 1), flat(first, 1, 1), flat(first, 2, 2)):
        assert not torch.equal(other, expected)


def test_choices_are_distinct_and_come_with_equal_chance():
    sampler, counts = make(seed=7, choices=((20, 6), (5, 5))), np.zeros(20)
    for step in range(3000):
        six, all_five = sampler.draw(sampler.keys(0, step))[1]
        assert len(set(six.tolist())) == 6 and sorted(all_five.tolist()) == [0, 1, 2, 3, 4]
        counts[six.numpy()] += 1
    assert chisquare(counts).pvalue > 1e-3


def test_only_the_published_triples_can_be_drawn_on_the_device():
    for settings in ({"strategy": "interaction-uniform"}, {"negatives": "popularity"}):
        host = TripleSampler(USERS, ITEMS, NUM_USERS, NUM_ITEMS, **settings)
        with pytest.raises(ValueError, match='sampler must be "user-uniform" with "uniform" negatives'):
            DeviceTripleSampler(host, "cpu")


def test_words_are_uniform_and_unlike_those_of_other_keys():
    words = RandomWords([2**16, 2**16], "cpu")
    first, second = words.draw(step_keys(0, 0, 0, 2))
    assert first.min() >= 0 and first.max() < 2**32 and len(first.unique()) == 2**16
    streams = [first, second, *words.draw(step_keys(0, 0, 1, 2))]
    for shift in (0, 12, 24):
        counts = [np.bincount(stream.numpy() >> shift & 255, minlength=256) for stream in streams]
        assert min(chisquare(count).pvalue for count in counts) > 1e-4
    correlation = np.corrcoef(np.stack(streams)) - np.eye(4)
    # Standard error 1/256.
    assert np.abs(correlation).max() < 0.02


def test_neighbouring_keys_flip_half_of_the_bits():
    words = RandomWords([4096], "cpu")
    keys = torch.tensor([[12345, 67890]])
    before = words.draw(keys)[0]
    for row in range(2):
        for bit in range(32):
            changed = keys.clone()
            changed[0, row] ^= 1 << bit
            flipped = before ^ words.draw(changed)[0]
            share = sum(int((flipped >> place & 1).sum()) for place in range(32)) / (32 * 4096)
            assert 0.4 < share < 0.6, (row, bit, share)


def test_uniform_below_uses_both_words_and_stays_below():
    high = torch.tensor([1, 7, 2**31 - 1])
    top = torch.full((3,), 2**32 - 1)
    assert uniform_below(high, top, top).tolist() == [0, 6, 2**31 - 2]
    assert uniform_below(high, torch.zeros_like(top), top).tolist() == [0, 0, 0]


def test_distinct_below_takes_the_largest_words():
    assert distinct_below(torch.tensor([5, 9, 5, 1, 2**32 - 1]), 3).tolist() == [4, 1, 2]


def test_draw_reads_no_value():
    sampler = make(choices=((20, 6),))
    for holder in (sampler, sampler._words):
        tensors = {name: value for name, value in vars(holder).items() if isinstance(value, torch.Tensor)}
        vars(holder).update({name: value.to("meta") for name, value in tensors.items()})
    triples, rows = sampler.draw(sampler.keys(0, 0).to("meta"))
    assert [tuple(part.shape) for part in (*triples, *rows)] == [(4,), (4,), (4,), (6,)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none")
def test_device_draws_what_the_cpu_draws():
    host = TripleSampler(USERS, ITEMS, NUM_USERS, NUM_ITEMS, batch_size=4)
    samplers = [DeviceTripleSampler(host, device, ((20, 6),)) for device in ("cpu", "cuda")]
    for step in range(20):
        keys = samplers[0].keys(1, step)
        expected, found = (s.draw(keys.to(d)) for s, d in zip(samplers, ("cpu", "cuda"), strict=True))
        assert torch.equal(torch.cat([*expected[0], *expected[1]]), torch.cat([*found[0], *found[1]]).cpu())
