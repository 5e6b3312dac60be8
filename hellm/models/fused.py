"""Several models as one, and the weights of the sum.

B = histories, I = items, T = towers, D = widths of all towers side by side, U = users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hellm._rows import dot_products

__all__ = ["FusedModel", "fit_weights"]

# Newton's method on a convex function of a few variables; it needs about ten.
_MAX_STEPS = 50
# Rows of the [U, T, I] block that derivatives are made from.
_BLOCK = 256


class FusedModel:
    """The weighted sum of the scores of several models is itself a score `<query, key>`.

        sum_t w_t <q_t, k_t> = <[w_1 q_1, ..., w_T q_T], [k_1, ..., k_T]>

    So the sum ranks a catalogue by one matrix product, exactly, and its keys can be indexed like those of any model.
    Softmax subtracts a number that is the same for all items of a history, so the sum of weighted log-probabilities
    ranks alike.

    A tower may have `history_scores(indptr, items)` [B, I] in place of queries, such as counts of what followed what.
    These are >= 0 and 0 for most items, so that the first k of the sum are among the first k by query and key and the
    items that such a tower names.

    Args:
        towers: name -> model with `embed(indptr, items)` and `item_keys()`, or `history_scores`, all of the same items.
        weights: name -> weight >= 0, of the same names.
    Raises: ValueError, no tower, other names, a negative or no positive weight, or towers of different items.
    """

    def __init__(self, towers: Mapping[str, Any], weights: Mapping[str, float]) -> None:
        if not towers or set(towers) != set(weights):
            raise ValueError(f"weights must be of the towers {list(towers)}, got {list(weights)}")
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"weights[{name!r}] must be finite and >= 0, got {weight}")
        if not any(weights.values()):
            raise ValueError("weights must not all be 0")
        self.towers = dict(towers)
        self.weights = {name: float(weights[name]) for name in towers}
        counts = {name: len(tower.item_keys()) for name, tower in towers.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"towers must be of the same items, got {counts}")

    def _embedding(self) -> dict[str, Any]:
        """The towers that have queries and keys."""
        return {name: tower for name, tower in self.towers.items() if not hasattr(tower, "history_scores")}

    def embed(self, indptr: Tensor, items: Tensor) -> Tensor:
        """Queries [B, D] float32 of histories in time order, given as CSR, of the towers that have them."""
        queries = [self.weights[name] * tower.embed(indptr, items) for name, tower in self._embedding().items()]
        return torch.cat(queries, 1) if queries else torch.zeros(len(indptr) - 1, 0)

    def item_keys(self) -> Tensor:
        """[I, D] float32, of the towers that have queries; of all where none has."""
        return torch.cat([tower.item_keys() for tower in (self._embedding() or self.towers).values()], dim=1)

    def history_scores(
        self, indptr: Tensor, items: Tensor, keys: Tensor | None = None, queries: Tensor | None = None
    ) -> Tensor:
        """Scores [B, I] of all items after histories.

        `keys` are `item_keys()` and `queries` those of `embed`, where they are there already.
        """
        parts, embedding = [], self._embedding()
        if embedding:
            queries = self.embed(indptr, items) if queries is None else queries
            parts.append(dot_products(queries, self.item_keys() if keys is None else keys))
        # In the order of the towers, as a sum has the same bits in one order only.
        for name, tower in self.towers.items():
            if name not in embedding:
                parts.append(self.weights[name] * tower.history_scores(indptr, items))
        return sum(parts[1:], parts[0])

    def parts(self, indptr: Tensor, items: Tensor) -> dict[str, Tensor]:
        """What each tower adds to the scores: name -> [B, I]; their sum is the score."""
        embedding = self._embedding()
        return {
            name: self.weights[name] * tower.embed(indptr, items) @ tower.item_keys().T
            if name in embedding
            else self.weights[name] * tower.history_scores(indptr, items)
            for name, tower in self.towers.items()
        }


def fit_weights(scores: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Non-negative weights [T] of the sum of scores whose softmax gives the targets the largest likelihood.

        minimise over w >= 0:  mean_u( log sum_i exp(sum_t w_t s_tui) - sum_t w_t s_tu,target(u) )

    It is convex, so its minimum does not depend on where the search starts. Scores of -inf are no candidates.

    Args:
        scores: T of [U, I] float32, each with a range of its own.
        targets: [U] int64 items.
    Returns: [T] float64. All zero where no scores are better than none.
    """
    # Towers of one range, so that one step size serves all.
    scale = torch.stack([_spread(one) for one in scores])
    candidate = torch.isfinite(scores[0])
    weight = torch.zeros(len(scores), dtype=torch.float64)
    value, gradient, hessian = _derivatives(scores, targets, candidate, weight / scale)
    for _ in range(_MAX_STEPS):
        gradient, hessian = gradient / scale, hessian / (scale[:, None] * scale)
        free = (weight > 0) | (gradient < 0)
        step = torch.zeros_like(weight)
        damped = hessian[free][:, free] + 1e-9 * torch.eye(int(free.sum()), dtype=torch.float64)
        step[free] = -torch.linalg.solve(damped, gradient[free])
        if -(gradient @ step) / 2 < 1e-9:  # what the whole step promises
            break
        # A value that is worse by no more than rounding is not worse: every shorter step would be tried in vain.
        worst = value + torch.finfo(torch.float32).eps * max(abs(value), 1.0)
        length = 1.0
        while True:
            moved = (weight + length * step).clamp(min=0)
            found = _derivatives(scores, targets, candidate, moved / scale)
            if found[0] <= worst or length < 1e-6:
                break
            length /= 2
        gain, moving = value - found[0], (moved - weight).abs().max()
        if found[0] <= worst:
            weight, (value, gradient, hessian) = moved, found
        if gain < 1e-9 or moving < 1e-6:
            break
    return weight / scale


def _spread(scores: Tensor) -> Tensor:
    """Standard deviation of a user's scores over some users, as a float64 scalar."""
    block = scores[:_BLOCK].double()
    allowed = torch.isfinite(block)
    count = allowed.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(allowed, block, 0.0).sum(1, keepdim=True) / count
    spread = torch.where(allowed, block - mean, 0.0).square().mean().sqrt()
    return spread if spread > 0 else torch.ones_like(spread)


def _derivatives(
    scores: Sequence[Tensor], targets: Tensor, candidate: Tensor, weight: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Mean cross-entropy, its gradient [T] and Hessian [T, T] in the weights."""
    count = len(targets)
    value, gradient = 0.0, torch.zeros(len(weight), dtype=torch.float64)
    hessian = torch.zeros(len(weight), len(weight), dtype=torch.float64)
    for start in range(0, count, _BLOCK):
        rows = slice(start, start + _BLOCK)
        allowed = candidate[rows]
        block = torch.stack([torch.where(allowed, one[rows], 0.0) for one in scores], dim=1)
        total = torch.einsum("t,uti->ui", weight.float(), block).masked_fill(~allowed, -torch.inf)
        share = total.softmax(dim=1)
        mean = torch.einsum("ui,uti->ut", share, block).double()
        second = torch.einsum("ui,uti,usi->ts", share, block, block).double()
        at_target = block.gather(2, targets[rows, None, None].expand(-1, len(weight), 1)).squeeze(2).double()
        value += float((total.double().logsumexp(1) - at_target @ weight).sum())
        gradient += (mean - at_target).sum(0)
        hessian += second - mean.T @ mean
    return value / count, gradient / count, hessian / count
