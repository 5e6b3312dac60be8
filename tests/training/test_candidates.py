from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hellm.training.candidates import CandidateItems, Candidates, next_item_loss

EVENTS = np.array([40, 0, 3, 1, 1, 9, 0, 2, 1, 25])
TARGETS = np.array([5, 0, 5])


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_targets_stand_for_themselves_and_only_trained_items_are_drawn():
    items = CandidateItems(EVENTS, count=4, seed=3)
    for step in range(50):
        chosen, log_weight = items.of_step(1, step, TARGETS)
        assert chosen.tolist() == sorted(set(chosen.tolist())) and {0, 5} <= set(chosen.tolist())
        assert EVENTS[chosen].min() > 0 and len(chosen) <= 6
        assert log_weight[(chosen == 0) | (chosen == 5)].eq(0).all()


def test_a_draw_depends_on_seed_epoch_and_step_alone():
    def drawn(seed, epoch, step):
        return CandidateItems(np.arange(1, 200), count=20, seed=seed).of_step(epoch, step, TARGETS)

    first = drawn(3, 1, 2)
    assert all(map(torch.equal, first, drawn(3, 1, 2)))
    assert not any(torch.equal(first.rows, drawn(*other).rows) for other in ((4, 1, 2), (3, 2, 2), (3, 1, 3)))


@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_sum_over_all_items_is_estimated_without_bias(count):
    items, values = CandidateItems(EVENTS, count=count), rows(10).exp()
    whole = values[EVENTS > 0].sum().item()
    sums = []
    for step in range(4000):
        chosen, log_weight = items.of_step(0, step, TARGETS)
        sums.append((log_weight.double().exp() * values[chosen]).sum().item())
    assert np.mean(sums) == pytest.approx(whole, abs=4 * np.std(sums) / 4000**0.5)
    assert np.std(sums) > 0


def test_losses_and_gradients_come_near_those_of_the_whole_softmax():
    query, keys = rows(12, 4, seed=1).requires_grad_(), 0.5 * rows(300, 4, seed=2)
    items = CandidateItems(np.random.default_rng(0).zipf(1.5, 300).clip(max=1000), count=60)
    targets = np.arange(12)

    def both(candidates):
        chosen = keys if candidates is None else keys[candidates.rows]
        loss = next_item_loss(query, chosen, torch.from_numpy(targets), candidates)
        return loss.detach(), torch.autograd.grad(loss, query)[0]

    loss, gradient = both(None)
    drawn = [items.of_step(0, step, targets) for step in range(100)]
    losses, gradients = zip(*map(both, drawn), strict=True)
    # The logarithm of an estimate is low by half its relative variance, here some 0.04.
    assert (sum(losses) / 100 - loss).abs() < 0.1
    assert (sum(gradients) / 100 - gradient).norm() < 0.1 * gradient.norm()
    # The same items, each for itself alone, are a smaller catalogue.
    assert (sum(both(one._replace(log_weight=None))[0] for one in drawn) / 100 - loss).abs() > 1


def test_all_items_where_not_fewer_are_asked_for():
    every = CandidateItems(EVENTS).of_step(0, 0, TARGETS)
    assert every.rows.tolist() == [0, 2, 3, 4, 5, 7, 8, 9] and every.log_weight is None
    assert torch.equal(CandidateItems(EVENTS, count=8).of_step(0, 0, TARGETS).rows, every.rows)
    assert CandidateItems(EVENTS + 1).of_step(0, 0, TARGETS) is None
    with pytest.raises(ValueError, match="count must be None or >= 1, got 0"):
        CandidateItems(EVENTS, count=0)


def test_loss_by_hand():
    query, keys, candidates = rows(2, 3, seed=1), rows(3, 3, seed=2), Candidates(torch.tensor([2, 5, 9]))
    loss = next_item_loss(query, keys, torch.tensor([9, 2]), candidates)
    torch.testing.assert_close(loss, F.cross_entropy(query @ keys.T, torch.tensor([2, 0])), rtol=1e-6, atol=0.0)
