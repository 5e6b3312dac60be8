"""The metrics of top-k lists, collected batch by batch.

Shape letters: B users in a batch, I items, K the largest k, U evaluated users, D feature width.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from hellm.data import Histories

OVERALL_METRICS = ("coverage", "gini")
LIST_METRICS = ("novelty", "diversity", *OVERALL_METRICS)
METRICS = ("recall", "ndcg", "precision", "hit_rate", "mrr", "map", *LIST_METRICS)
"""Names before the "@k". `LIST_METRICS` go by the lists alone, whatever the targets; `OVERALL_METRICS` describe all
lists together, the others are means over users."""


class AccuracyTable:
    """Metrics per user of how well lists find the targets. See `ranking_metrics` for the formulas.

    Args:
        targets: Items of each user; a repeated target counts once.
        num_items: I.
        ks: Cut-offs, ascending.
        ideal: See `Protocol.ideal`.
        among: [I] bool; targets outside count neither as hits nor as missed. None is all.
    """

    def __init__(
        self, targets: Histories, num_items: int, ks: tuple[int, ...], ideal: str, among: np.ndarray | None = None
    ):
        items, owner = targets.items, targets.owners
        if among is not None:
            owner, items = owner[among[items]], items[among[items]]
        # One sorted key per distinct (user, target): membership of any top item is one binary search.
        self.target_keys = np.unique(owner * num_items + items)
        self.num_targets = np.bincount(self.target_keys // num_items, minlength=targets.num_users)
        self.num_items, self.ks, self.ideal = num_items, ks, ideal
        self.parts: list[dict[str, np.ndarray]] = []

    def add(self, users: np.ndarray, top: np.ndarray) -> None:
        """users: [B]; top: [B, K] item indices, -1 = none."""
        hits = (top >= 0) & is_member(users[:, None] * self.num_items + top, self.target_keys)
        positives = self.num_targets[users]
        ranks = np.arange(1, top.shape[1] + 1)
        count = hits.cumsum(axis=1)
        dcg = (hits / np.log2(ranks + 1)).cumsum(axis=1)
        # DCG of n hits at the top; n = 0 divides 0 by 1.
        best_dcg = np.concatenate([[1.0], (1 / np.log2(ranks + 1)).cumsum()])
        sum_precision = (hits * count / ranks).cumsum(axis=1)
        first_rank = np.where(count[:, -1] > 0, hits.argmax(axis=1) + 1, np.inf)
        part = {}
        for k in self.ks:
            best = np.minimum(positives if self.ideal == "all positives" else count[:, -1], k)
            part[f"recall@{k}"] = count[:, k - 1] / np.maximum(positives, 1)
            part[f"ndcg@{k}"] = dcg[:, k - 1] / best_dcg[best]
            part[f"precision@{k}"] = count[:, k - 1] / k
            part[f"hit_rate@{k}"] = (count[:, k - 1] > 0).astype(np.float64)
            part[f"mrr@{k}"] = np.where(first_rank <= k, 1 / first_rank, 0.0)
            part[f"map@{k}"] = sum_precision[:, k - 1] / np.clip(positives, 1, k)
        self.parts.append(part)

    def per_user(self) -> dict[str, np.ndarray]:
        """Metric -> [U] float64."""
        return _joined(self.parts)


class ListTable:
    """Metrics of the lists themselves, whatever the targets. See `ranking_metrics` for the formulas.

    Args:
        num_items: I.
        ks: Cut-offs, ascending.
        item_counts: [I] train events, for novelty; None leaves it out.
        item_vectors: [I, D] content features, for diversity; rows of zeros are items without. None leaves it out.
    """

    def __init__(self, num_items: int, ks: tuple[int, ...], item_counts, item_vectors) -> None:
        self.num_items, self.ks = num_items, ks
        self.information = None if item_counts is None else self_information(item_counts, num_items)
        self.vectors = None if item_vectors is None else _unit_rows(item_vectors, num_items)
        self.recommended = np.zeros((len(ks), num_items), dtype=np.int64)
        self.parts: list[dict[str, np.ndarray]] = []

    def add(self, top: np.ndarray) -> None:
        """top: [B, K] item indices, -1 = none."""
        part = {}
        for row, k in enumerate(self.ks):
            if self.information is not None:
                part[f"novelty@{k}"] = self._novelty(top[:, :k])
            self.recommended[row] += np.bincount(top[:, :k][top[:, :k] >= 0], minlength=self.num_items)
        self.parts.append(part | self._diversity(top))

    def _novelty(self, top: np.ndarray) -> np.ndarray:
        valid = top >= 0
        bits = np.where(valid, self.information[np.maximum(top, 0)], 0.0)
        return bits.sum(axis=1) / np.maximum(valid.sum(axis=1), 1)

    def _diversity(self, top: np.ndarray) -> dict[str, np.ndarray]:
        """From the length of the sum of a list's unit vectors: |sum|^2 = n + the cosines of all ordered pairs."""
        if self.vectors is None:
            return {}
        table, has = self.vectors
        # The last row of the table is zero: no item, or one without features.
        index = np.where((top >= 0) & has[top], top, self.num_items)
        number = (index < self.num_items).cumsum(axis=1)
        part, total, done = {}, 0.0, 0
        for k in self.ks:
            total = total + F.embedding_bag(torch.from_numpy(index[:, done:k]), table, mode="sum")
            done, n = k, number[:, k - 1]
            cosines = total.double().square().sum(dim=1).numpy() - n
            part[f"diversity@{k}"] = np.where(n > 1, 1 - cosines / np.maximum(n * (n - 1), 1), 0.0)
        return part

    def per_user(self) -> dict[str, np.ndarray]:
        """Metric -> [U] float64."""
        return _joined(self.parts)

    def overall(self) -> dict[str, float]:
        """The metrics that are not a mean over users."""
        overall = {}
        for k, counts in zip(self.ks, self.recommended, strict=True):
            overall[f"coverage@{k}"] = float((counts > 0).mean())
            overall[f"gini@{k}"] = gini(counts)
        return overall


def gini(counts: np.ndarray) -> float:
    """Gini index of non-negative counts [n]; 0 if all are 0."""
    n, total = len(counts), counts.sum()
    weights = 2 * np.arange(1, n + 1) - n - 1
    return float((weights * np.sort(counts)).sum() / (n * total)) if total else 0.0


def self_information(item_counts, num_items: int) -> np.ndarray:
    """[I] -log2 of each item's share of the events, in bits; an item without events counts as one with one."""
    counts = checked_counts(item_counts, num_items)
    return -np.log2(np.maximum(counts, 1) / counts.sum())


def checked_counts(item_counts, num_items: int) -> np.ndarray:
    """[I] float64. Raises: ValueError, another shape, a count that is negative or not finite, or all 0."""
    counts = np.asarray(item_counts, dtype=np.float64)
    if counts.shape != (num_items,):
        raise ValueError(f"item_counts must have shape ({num_items},), got {counts.shape}")
    if not (np.isfinite(counts).all() and (counts >= 0).all() and counts.sum() > 0):
        raise ValueError("item_counts must be finite, >= 0 and not all 0")
    return counts


def _unit_rows(vectors, num_items: int) -> tuple[torch.Tensor, np.ndarray]:
    """[I + 1, D] float32 rows of length 1, the last of zeros, and [I] whether an item has a vector."""
    vectors = torch.as_tensor(vectors).detach().float().cpu()
    if vectors.ndim != 2 or len(vectors) != num_items:
        raise ValueError(f"item_vectors must have shape [{num_items}, D], got {list(vectors.shape)}")
    if not vectors.isfinite().all():
        raise ValueError("item_vectors must be finite")
    return F.pad(F.normalize(vectors, dim=1), (0, 0, 0, 1)), vectors.any(dim=1).numpy()


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def is_member(keys: np.ndarray, sorted_keys: np.ndarray) -> np.ndarray:
    """Bool of the shape of `keys`: which of them are among `sorted_keys`."""
    if not len(sorted_keys):
        return np.zeros(keys.shape, dtype=bool)
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return sorted_keys[place] == keys
