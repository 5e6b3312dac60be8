from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from hellm.losses import bpr_loss, l2_loss, softmax_loss, synergistic_contrastive_loss


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def published_info_nce(first, second, temperature):
    """The published formula with its dense similarities: positive inside the sum, own anchor similarity taken out."""
    first, second = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) for x in (first, second))
    within, across = torch.exp(first @ first.T / temperature), torch.exp(first @ second.T / temperature)
    return -torch.log(across.diag() / (within.sum(1) + across.sum(1) - within.diag())).mean()


def test_bpr_loss_by_hand():
    user = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    positive = torch.tensor([[3.0, 9.0], [0.0, 1.0]])
    negative = torch.tensor([[1.0, 9.0], [5.0, 1.0]])
    # differences 2 and 0
    expected = (math.log(1 + math.exp(-2)) + math.log(2)) / 2
    assert bpr_loss(user, positive, negative).item() == pytest.approx(expected, rel=1e-6)


def test_bpr_loss_stays_finite_and_keeps_its_gradient_for_large_differences():
    user = torch.tensor([[1.0]])
    positive = torch.tensor([[-200.0]], requires_grad=True)
    loss = bpr_loss(user, positive, torch.tensor([[200.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(400.0)
    assert positive.grad.item() == pytest.approx(-1.0)


def test_softmax_loss_is_the_cross_entropy_of_cosines_over_the_candidates():
    user, item, positive = rows(6, 4), F.normalize(rows(5, 4, seed=1), dim=1), torch.tensor([0, 3, 3, 1, 0, 4])
    cosine = F.cosine_similarity(user[:, None], item[None], dim=2) / 0.3
    for log_weight in (None, torch.tensor([0.0, 0.0, -torch.inf, 0.0, 1.5])):
        logits = cosine if log_weight is None else cosine + log_weight
        value = softmax_loss(user, item, positive, 0.3, log_weight=log_weight)
        torch.testing.assert_close(value, F.cross_entropy(logits, positive), rtol=1e-6, atol=0.0)


def test_softmax_needs_a_temperature():
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        softmax_loss(rows(1, 2), rows(3, 2), torch.tensor([0]), 0)


def test_l2_loss_by_hand():
    # 0.5 * (5 + 4 + 0 + 1) / 2 rows
    value = l2_loss(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    assert value.item() == pytest.approx(2.5)


@pytest.mark.parametrize("temperature", [0.6, 0.3])
def test_contrastive_loss_is_the_published_formula_with_its_gradients(temperature):
    first, second = rows(17, 6, seed=1).requires_grad_(), rows(17, 6, seed=2).requires_grad_()
    ours = synergistic_contrastive_loss(first, second, temperature)
    published = published_info_nce(first, second, temperature)
    torch.testing.assert_close(ours, published, rtol=1e-10, atol=0)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (first, second)), torch.autograd.grad(published, (first, second)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_the_sum_of_negatives_is_estimated_without_bias_by_some_keys():
    first, second, temperature = rows(7, 4), rows(7, 4, seed=1), 0.5
    # exp(loss) - 1 is the sum of the negatives over the positive: linear in what is estimated.
    whole = torch.expm1(torch.stack([published_row(first, second, temperature, i) for i in range(7)]))
    found = torch.zeros(7, dtype=torch.float64)
    for keys in itertools.combinations(range(7), 4):
        for anchor in keys:
            chosen = {"rows": torch.tensor([anchor]), "keys": torch.tensor(keys)}
            found[anchor] += torch.expm1(synergistic_contrastive_loss(first, second, temperature, **chosen))
    # Each anchor is in 20 of the 35 draws.
    torch.testing.assert_close(found / 20, whole, rtol=1e-12, atol=0.0)


def published_row(first, second, temperature, anchor):
    """The published loss of one anchor."""
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    within, across = (torch.exp(one @ first[anchor] / temperature) for one in (first, second))
    return -torch.log(across[anchor] / (within.sum() + across.sum() - within[anchor]))


def test_a_tiny_loss_of_some_keys_keeps_its_digits_and_gradient():
    first = torch.eye(4, dtype=torch.float64)
    second = first.clone().requires_grad_()
    loss = synergistic_contrastive_loss(first, second, 0.02, keys=torch.tensor([0, 2]))
    # 2 negatives of similarity 0 among the keys, 6 in all, beside exp(50).
    assert loss.item() == pytest.approx(6 * math.exp(-50), rel=1e-9)
    loss.backward()
    assert torch.isfinite(second.grad).all() and second.grad[0, 2].item() > 0


def test_keys_that_are_all_or_too_few():
    first, second = rows(6, 4), rows(6, 4, seed=1)
    whole = synergistic_contrastive_loss(first, second, 0.5)
    assert torch.equal(synergistic_contrastive_loss(first, second, 0.5, keys=torch.arange(6)), whole)
    with pytest.raises(ValueError, match="keys must be at least 2 nodes, got 1"):
        synergistic_contrastive_loss(first, second, 0.5, keys=torch.tensor([3]))


def test_contrastive_rows_average_to_the_whole():
    first, second = rows(12, 4, seed=3), rows(12, 4, seed=4)
    parts = [synergistic_contrastive_loss(first, second, 0.5, rows=torch.tensor([i, i + 6])) for i in range(6)]
    torch.testing.assert_close(torch.stack(parts).mean(), synergistic_contrastive_loss(first, second, 0.5))


def test_shapes_are_checked():
    good, short, flat = torch.ones(2, 3), torch.ones(1, 3), torch.ones(3)
    with pytest.raises(ValueError, match=r"negative must have shape \(2, 3\) like user, got \(1, 3\)"):
        bpr_loss(good, good, short)
    with pytest.raises(ValueError, match=r"positive must be \[B, D\] with B >= 1, got shape \(3,\)"):
        bpr_loss(good, flat, good)
    with pytest.raises(ValueError, match=r"rows\[0\] must be \[B, D\] with B >= 1, got shape \(0, 3\)"):
        l2_loss(torch.ones(0, 3))
    with pytest.raises(ValueError, match=r"l2_loss needs at least one tensor \[B, D\], got none"):
        l2_loss()
