"""The metrics of top-k lists, a function each. A new one is a function and a line in the dictionary of its kind.

hit_i is 1 if the item at rank i of a list is a target, else 0; P is the number of targets of the user.
Shape letters: B users in a batch, K the largest k, I items.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .tables import Lists


class Hits:
    """Which of a batch of lists found what.

    Args:
        is_hit: [B, K] bool, whether the item at each rank is a target.
        num_targets: [B] P, distinct targets of each user.
        ideal: See `Protocol.ideal`.
    """

    def __init__(self, is_hit: np.ndarray, num_targets: np.ndarray, ideal: str) -> None:
        self.is_hit, self.num_targets, self.ideal = is_hit, num_targets, ideal
        self.ranks = np.arange(1, is_hit.shape[1] + 1)
        self.count = is_hit.cumsum(axis=1)
        """[B, K] hits up to each rank."""

    @cached_property
    def dcg(self) -> np.ndarray:
        """[B, K] sum of hit_i / log2(i + 1) up to each rank."""
        return (self.is_hit / np.log2(self.ranks + 1)).cumsum(axis=1)

    @cached_property
    def ideal_dcg(self) -> np.ndarray:
        """[K + 1] DCG of 0..K hits at the top; that of none is 1, for 0 is divided by it."""
        return np.concatenate([[1.0], (1 / np.log2(self.ranks + 1)).cumsum()])

    @cached_property
    def precision_sum(self) -> np.ndarray:
        """[B, K] sum of hit_i precision@i up to each rank."""
        return (self.is_hit * self.count / self.ranks).cumsum(axis=1)

    @cached_property
    def first_rank(self) -> np.ndarray:
        """[B] rank of the first hit, infinite without one."""
        return np.where(self.count[:, -1] > 0, self.is_hit.argmax(axis=1) + 1, np.inf)


def recall(hits: Hits, k: int) -> np.ndarray:
    """sum_{i<=k} hit_i / P, the share of the targets that is in the list."""
    return hits.count[:, k - 1] / np.maximum(hits.num_targets, 1)


def ndcg(hits: Hits, k: int) -> np.ndarray:
    """sum_{i<=k} hit_i / log2(i + 1) over its ideal, see `Protocol.ideal`."""
    best = hits.num_targets if hits.ideal == "all positives" else hits.count[:, -1]
    return hits.dcg[:, k - 1] / hits.ideal_dcg[np.minimum(best, k)]


def precision(hits: Hits, k: int) -> np.ndarray:
    """sum_{i<=k} hit_i / k, the share of the list that is a target."""
    return hits.count[:, k - 1] / k


def hit_rate(hits: Hits, k: int) -> np.ndarray:
    """1 if any hit_i, i <= k."""
    return (hits.count[:, k - 1] > 0).astype(np.float64)


def mrr(hits: Hits, k: int) -> np.ndarray:
    """1 / (rank of the first hit), 0 if beyond k."""
    return np.where(hits.first_rank <= k, 1 / hits.first_rank, 0.0)


def average_precision(hits: Hits, k: int) -> np.ndarray:
    """sum_{i<=k} hit_i precision@i / min(P, k); its mean over users is "map"."""
    return hits.precision_sum[:, k - 1] / np.clip(hits.num_targets, 1, k)


def novelty(lists: Lists, k: int) -> np.ndarray | None:
    """Mean over the k items of -log2(count_i / sum of counts), unseen items counted once; bits.

    Self-information, Zhou et al. 2010. None without `item_counts`.
    """
    if lists.information is None:
        return None
    items = lists.top[:, :k]
    valid = items >= 0
    bits = np.where(valid, lists.information[np.maximum(items, 0)], 0.0)
    return bits.sum(axis=1) / np.maximum(valid.sum(axis=1), 1)


def diversity(lists: Lists, k: int) -> np.ndarray | None:
    """Mean over the pairs of the k items of 1 - cosine of their vectors.

    Intra-list distance, Zhang and Hurley 2008. Items without a vector are left out, a list with fewer than two others
    counts 0. None without `item_vectors`.
    """
    if lists.vectors is None:
        return None
    # |sum of a list's unit vectors|^2 = n + the cosines of all ordered pairs.
    total, n = lists.vector_sum(k)
    cosines = total.double().square().sum(dim=1).numpy() - n
    return np.where(n > 1, 1 - cosines / np.maximum(n * (n - 1), 1), 0.0)


def coverage(counts: np.ndarray) -> float:
    """The share of the items that anybody gets."""
    return float((counts > 0).mean())


def gini(counts: np.ndarray) -> float:
    """Gini index of how often the items are recommended: 0 all equally often, or never; towards 1 one item only."""
    n, total = len(counts), counts.sum()
    weights = 2 * np.arange(1, n + 1) - n - 1
    return float((weights * np.sort(counts)).sum() / (n * total)) if total else 0.0


ACCURACY: dict[str, Callable[[Hits, int], np.ndarray]] = {
    "recall": recall,
    "ndcg": ndcg,
    "precision": precision,
    "hit_rate": hit_rate,
    "mrr": mrr,
    "map": average_precision,
}
"""Name -> (hits, k) -> [B], means over users of how well lists find the targets."""

LISTS: dict[str, Callable[[Lists, int], np.ndarray | None]] = {"novelty": novelty, "diversity": diversity}
"""Name -> (lists, k) -> [B], means over users that go by the lists alone; None where something to go by is missing."""

OVERALL: dict[str, Callable[[np.ndarray], float]] = {"coverage": coverage, "gini": gini}
"""Name -> how often each item is in the lists of all users [I] -> value, of all lists together."""

OVERALL_METRICS = tuple(OVERALL)
LIST_METRICS = (*LISTS, *OVERALL)
METRICS = (*ACCURACY, *LIST_METRICS)
"""Names before the "@k". `LIST_METRICS` go by the lists alone, whatever the targets; `OVERALL_METRICS` describe all
lists together, the others are means over users."""
