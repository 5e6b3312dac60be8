"""Which models to add up, and with what weights, from their scores of validation events.

T = towers, E = validation events looked at, I = items.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hellm.evaluate import paired_gain
from hellm.models.fused import fit_weights

__all__ = ["FITTED_EVENTS", "Gain", "Selection", "TowerScores", "select_towers"]

FITTED_EVENTS = 2048
"""Events that the likelihood is fitted on; more move the weights by less than their validation can tell."""
# Factors tried on each weight after the fit, for lists instead of likelihoods.
_FACTORS = (0.5, 0.7, 1.4, 2.0)


@dataclass(frozen=True)
class TowerScores:
    """What each tower says of the same validation events.

    Attributes:
        scores: Name -> [E, I] float32, -inf where an item is no candidate.
        targets: [E] int64 items.
        users: [E] int64, whose event it is.
    """

    scores: Mapping[str, Tensor]
    targets: Tensor
    users: np.ndarray


@dataclass(frozen=True)
class Gain:
    """What adding a tower to others brings.

    Attributes:
        tower: Its name.
        gain: Mean difference of the monitored metric per user.
        low, high: Bootstrap interval over users.
        kept: Whether the interval lies above 0 (the gain itself, where it is kept `for_new_items`), and all users
            together give the tower a weight.
        for_new_items: Whether it was tried because no other tower knows items without training events.
    """

    tower: str
    gain: float
    low: float
    high: float
    kept: bool
    for_new_items: bool = False


@dataclass(frozen=True)
class Selection:
    """The chosen towers.

    Attributes:
        weights: Name -> weight > 0, of those that are kept, the best first.
        alone: Name -> monitored metric of every tower alone.
        fused: Monitored metric of the sum, of events that its weights were not fitted on.
        gains: What was kept, in order, then what each of the others would have brought.
    """

    weights: dict[str, float]
    alone: dict[str, float]
    fused: float
    gains: list[Gain]


def select_towers(
    given: TowerScores,
    monitor: str = "ndcg@20",
    *,
    level: float = 0.9,
    seed: int = 0,
    rank_new_items: Collection[str] = (),
) -> Selection:
    """Start from the best tower, and add the one whose help is surest as long as it is shown.

    Users are cut into halves: weights that are fitted on one half are judged on the other, and the other way round, so
    that every user judges once and no user judges weights that it made. A tower is kept if the bootstrap interval of
    the gain in the monitored metric lies above 0; of several, the one of the largest lower end is added. The weights of
    the chosen towers come from all events.

    Validation asks for few items that training knows nothing of, or for none, and so cannot show what it is worth to
    know them. If none of the chosen towers does, the surest of those that do is added unless it costs something.

    Args:
        given: Scores of all towers.
        monitor: "ndcg@k" or "recall@k".
        level: Coverage of the interval, in (0, 1).
        seed: Of the halves and the bootstrap.
        rank_new_items: Names of towers that rank an item without training events by what it is.
    Raises: ValueError, no event.
    """
    names = list(given.scores)
    if not len(given.users):
        raise ValueError("there must be validation events of users with a history, got none")
    half = _halves(given.users, seed)
    metric = _Metric(given, monitor)
    alone = {name: metric.mean(metric.per_user(given.scores[name])) for name in names}
    chosen = [max(names, key=alone.__getitem__)]
    best = metric.per_user(given.scores[chosen[0]])
    weights = [1.0]
    gains: list[Gain] = []

    def added(candidates: Collection[str], *, for_new_items: bool) -> bool:
        """Whether the surest of the candidates is kept."""
        nonlocal best, weights
        tried = {name: _cross_fitted(given, [*chosen, name], half, metric) for name in candidates}
        shown = {name: paired_gain(values, best, level=level, seed=seed) for name, values in tried.items()}
        # Whose gain is surest: the largest mean may be of few users, and then nothing else would be tried.
        by_sureness = sorted(shown, key=lambda one: shown[one][1], reverse=True)
        name = by_sureness[0]
        gain, low, _ = shown[name]
        wanted = gain >= 0 if for_new_items else low > 0
        longer = _fitted(given, [*chosen, name], np.ones(len(half), dtype=bool), metric) if wanted else [0.0]
        kept = longer[-1] > 0
        # Nothing is tried after a failure, so it tells what each of the others would have brought.
        for one in by_sureness[:1] if kept else by_sureness:
            gains.append(Gain(one, *shown[one], kept=kept, for_new_items=for_new_items))
        if kept:
            chosen.append(name)
            best, weights = tried[name], longer
        return kept

    # One user alone cannot judge weights that another made.
    if 0 < half.sum() < len(half):
        while rest := [name for name in names if name not in chosen]:
            if not added(rest, for_new_items=False):
                break
        rest = [name for name in names if name in rank_new_items]
        if rest and not set(rest) & set(chosen):
            added(rest, for_new_items=True)
    kept = {name: weight for name, weight in zip(chosen, weights, strict=True) if weight > 0}
    return Selection(kept, alone, metric.mean(best), gains)


def _halves(users: np.ndarray, seed: int) -> np.ndarray:
    """[E] bool, True for the events of about half of the users."""
    distinct, place = np.unique(users, return_inverse=True)
    return (np.random.default_rng(seed).permutation(len(distinct)) % 2 == 0)[place]


def _cross_fitted(given: TowerScores, names: Sequence[str], half: np.ndarray, metric: _Metric) -> np.ndarray:
    """Monitored metric of each user under the weights that the other half of the users gives."""
    values = np.zeros(metric.num_users)
    for judged in (half, ~half):
        weights = _fitted(given, names, ~judged, metric)
        rows = torch.from_numpy(np.flatnonzero(judged))
        total = _sum([given.scores[name][rows] for name in names], weights)
        values += metric.sums(total, rows)
    return values / metric.counts


def _fitted(given: TowerScores, names: Sequence[str], events: np.ndarray, metric: _Metric) -> list[float]:
    """Weights by likelihood, then each multiplied by what serves the monitored metric."""
    if len(names) == 1:
        return [1.0]
    rows = torch.from_numpy(np.flatnonzero(events))
    scores = [given.scores[name][rows] for name in names]
    some = slice(None, None, max(1, len(rows) // FITTED_EVENTS))
    weights = fit_weights([one[some] for one in scores], given.targets[rows][some]).tolist()
    if not any(weights):
        return [1.0] + [0.0] * (len(names) - 1)
    best = metric.sums(_sum(scores, weights), rows).sum()
    for place in range(len(names)):
        start = weights[place]
        for factor in _FACTORS:
            tried = [*weights[:place], start * factor, *weights[place + 1 :]]
            value = metric.sums(_sum(scores, tried), rows).sum()
            if value > best:
                best, weights = value, tried
    return weights


def _sum(scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum [E, I]; -inf stays -inf, also under a weight of 0."""
    total = scores[0].new_zeros(scores[0].shape)
    for one, weight in zip(scores, weights, strict=True):
        if weight:
            total.add_(one, alpha=weight)
    return total if all(weights) else total.masked_fill_(torch.isneginf(scores[0]), -torch.inf)


class _Metric:
    """The monitored metric of each user: the mean over the user's events of 1 or 1 / log2(rank + 1) within k.

    The rank of an event is among all items, the user's other targets included.
    """

    def __init__(self, given: TowerScores, monitor: str) -> None:
        name, _, k = monitor.partition("@")
        self._discounted, self._k, self._targets = name == "ndcg", int(k), given.targets
        users, self._user = np.unique(given.users, return_inverse=True)
        self.num_users = len(users)
        self.counts = np.bincount(self._user, minlength=self.num_users)

    def sums(self, scores: Tensor, rows: Tensor) -> np.ndarray:
        """[users] sum over the events `rows` [n], whose scores are [n, I]."""
        target = scores.gather(1, self._targets[rows, None])
        # Equal scores count as ahead, so that a tower of equal scores gains nothing by them.
        rank = (scores >= target).sum(dim=1).double()
        value = (rank + 1).log2().reciprocal() if self._discounted else torch.ones_like(rank)
        value = torch.where(rank <= self._k, value, 0.0).numpy()
        return np.bincount(self._user[rows.numpy()], weights=value, minlength=self.num_users)

    def per_user(self, scores: Tensor) -> np.ndarray:
        """[users] from the scores [E, I] of all events."""
        return self.sums(scores, torch.arange(len(self._targets))) / self.counts

    def mean(self, values: np.ndarray) -> float:
        return float(values.mean())
