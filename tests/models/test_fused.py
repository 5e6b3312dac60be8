"""The weighted sum of models as one query and one key, and the weights by likelihood."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from hellm.models import fused
from hellm.models.fused import FusedModel, fit_weights

U, I = 400, 60  # noqa: E741


class Table:
    """A model whose query is the mean of table rows of the history."""

    def __init__(self, width: int, seed: int, num_items: int = I) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(num_items, width, generator=generator)

    def embed(self, indptr, items):
        return torch.stack([self.table[items[a:b]].sum(0) for a, b in itertools.pairwise(indptr)])

    def item_keys(self):
        return self.table


def planted(weights, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(U, I, generator=generator) * scale for scale in (1.0, 3.0, 0.2)]
    logits = sum(weight * one for weight, one in zip(weights, scores, strict=True))
    return scores, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


def cross_entropy(scores, weights, targets):
    return F.cross_entropy(sum(w * one.double() for w, one in zip(weights, scores, strict=True)), targets)


def test_score_is_the_weighted_sum_of_the_towers():
    towers, weights = {"a": Table(3, 0), "b": Table(5, 1)}, {"a": 0.5, "b": 2.0}
    model = FusedModel(towers, weights)
    history = torch.tensor([0, 2, 3]), torch.tensor([4, 7, 9])
    score = model.embed(*history) @ model.item_keys().T
    parts = model.parts(*history)
    torch.testing.assert_close(score, parts["a"] + parts["b"])
    expected = sum(weights[name] * one.embed(*history) @ one.item_keys().T for name, one in towers.items())
    torch.testing.assert_close(score, expected)
    assert model.embed(*history).shape == (2, 8) and model.item_keys().shape == (I, 8)


@pytest.mark.parametrize(
    ("towers", "weights", "message"),
    [
        ({}, {}, r"weights must be of the towers \[\], got \[\]"),
        ({"a": Table(2, 0)}, {"b": 1.0}, r"weights must be of the towers \['a'\], got \['b'\]"),
        ({"a": Table(2, 0)}, {"a": -1.0}, r"weights\['a'\] must be finite and >= 0, got -1.0"),
        ({"a": Table(2, 0)}, {"a": float("nan")}, r"weights\['a'\] must be finite and >= 0, got nan"),
        ({"a": Table(2, 0)}, {"a": 0.0}, r"weights must not all be 0"),
        ({"a": Table(2, 0), "b": Table(2, 0, 7)}, {"a": 1.0, "b": 1.0}, r"of the same items, got \{'a': 60, 'b': 7\}"),
    ],
)
def test_towers_and_weights_must_fit(towers, weights, message):
    with pytest.raises(ValueError, match=message):
        FusedModel(towers, weights)


def test_weights_are_the_minimum_of_the_cross_entropy():
    scores, targets = planted((0.8, 0.3, 4.0))
    weights = fit_weights(scores, targets).requires_grad_()
    assert (weights > 0).all()
    (gradient,) = torch.autograd.grad(cross_entropy(scores, weights, targets), weights)
    spread = torch.tensor([1.0, 3.0, 0.2])
    assert (gradient / spread).abs().max() < 1e-4


@pytest.mark.parametrize("planted_weights", [(0.8, 0.3, 4.0), (0.5, 0.0, 1.0), (3.0, 2.0, 1.0), (0.0, 0.0, 0.1)])
def test_fits_take_few_steps(planted_weights, monkeypatch):
    """Scores are gone over once for each, and not once for every step that is too short to tell from rounding."""
    calls = []
    derivatives = fused._derivatives
    monkeypatch.setattr(fused, "_derivatives", lambda *given: calls.append(1) or derivatives(*given))
    scores, targets = planted(planted_weights)
    fit_weights(scores, targets)
    fit_weights([scores[0], -scores[0] + 0.1 * scores[1]], targets)
    assert len(calls) <= 20


def test_a_tower_that_says_the_contrary_gets_no_weight():
    scores, targets = planted((1.0, 0.0, 0.0))
    weights = fit_weights([scores[0], -scores[0] + 0.1 * scores[1]], targets)
    assert weights[1] == 0 and weights[0] > 0
    assert (fit_weights([-scores[0]], targets) == 0).all()


def test_weights_follow_the_scale_of_scores_and_not_their_offset():
    scores, targets = planted((0.5, 0.5, 1.0))
    weights = fit_weights(scores, targets)
    offsets = torch.randn(U, 1, generator=torch.Generator().manual_seed(5))
    changed = fit_weights([scores[0] * 100, scores[1] + offsets, scores[2]], targets)
    torch.testing.assert_close(changed * torch.tensor([100.0, 1.0, 1.0]), weights, rtol=1e-3, atol=1e-4)


def test_masked_items_do_not_count():
    scores, targets = planted((0.8, 0.3, 4.0))
    masked = torch.rand(U, I, generator=torch.Generator().manual_seed(1)) < 0.5
    masked[torch.arange(U), targets] = False
    hidden = [one.masked_fill(masked, -torch.inf) for one in scores]
    garbled = [torch.where(masked, torch.tensor(50.0), one) for one in scores]
    weights = fit_weights(hidden, targets)
    assert torch.isfinite(weights).all()
    assert not torch.allclose(weights, fit_weights(garbled, targets), rtol=0.1)
    with torch.no_grad():
        best = cross_entropy(hidden, weights, targets)
        for place in range(3):
            other = weights.clone()
            other[place] *= 1.05
            assert cross_entropy(hidden, other, targets) > best
