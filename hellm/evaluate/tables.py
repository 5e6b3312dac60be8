"""Metrics collected batch by batch.

Shape letters: B users in a batch, I items, K the largest k, U evaluated users, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from hellm.data import Histories

from . import metrics


class AccuracyTable:
    """Metrics per user of how well lists find the targets, `hellm.evaluate.metrics.ACCURACY`.

    Args:
        targets: Items of each user; a repeated target counts once.
        num_items: I.
        ks: Cut-offs, ascending.
        ideal: See `Protocol.ideal`.
        among: [I] bool; targets outside count neither as hits nor as missed. None is all.
    """

    def __init__(
        self, targets: Histories, num_items: int, ks: tuple[int, ...], ideal: str, among: np.ndarray | None = None
    ) -> None:
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
        is_hit = (top >= 0) & is_member(users[:, None] * self.num_items + top, self.target_keys)
        hits = metrics.Hits(is_hit, self.num_targets[users], self.ideal)
        self.parts.append(
            {f"{name}@{k}": metric(hits, k) for k in self.ks for name, metric in metrics.ACCURACY.items()}
        )

    def per_user(self) -> dict[str, np.ndarray]:
        """Metric -> [U] float64."""
        return _joined(self.parts)


class Lists:
    """A batch of lists, and what is known of the items in them.

    Attributes:
        top: [B, K] item indices, -1 = none.
        information: [I] bits of each item, see `self_information`; None without counts.
        vectors: [I + 1, D] of length 1, the last of zeros, and [I] whether an item has one; None without.
    """

    def __init__(
        self, top: np.ndarray, information: np.ndarray | None, vectors: tuple[torch.Tensor, np.ndarray] | None
    ) -> None:
        self.top, self.information, self.vectors = top, information, vectors
        self._done, self._sum = 0, torch.zeros(())

    def vector_sum(self, k: int) -> tuple[torch.Tensor, np.ndarray]:
        """[B, D] sum of the unit vectors of the first k items, and [B] how many there are; asked in ascending k."""
        assert self.vectors is not None
        table, has = self.vectors
        # The last row of the table is zero: no item, or one without features.
        index = np.where((self.top >= 0) & has[self.top], self.top, len(has))
        if k > self._done:
            self._sum = self._sum + F.embedding_bag(torch.from_numpy(index[:, self._done : k]), table, mode="sum")
            self._done = k
        return self._sum, (index[:, :k] < len(has)).sum(axis=1)


class ListTable:
    """Metrics of the lists themselves, `hellm.evaluate.metrics.LISTS` and `OVERALL`.

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
        lists = Lists(top, self.information, self.vectors)
        values = {f"{name}@{k}": metric(lists, k) for k in self.ks for name, metric in metrics.LISTS.items()}
        self.parts.append({name: value for name, value in values.items() if value is not None})
        for counts, k in zip(self.recommended, self.ks, strict=True):
            counts += np.bincount(top[:, :k][top[:, :k] >= 0], minlength=self.num_items)

    def per_user(self) -> dict[str, np.ndarray]:
        """Metric -> [U] float64."""
        return _joined(self.parts)

    def overall(self) -> dict[str, float]:
        """The metrics that are not a mean over users."""
        counted = list(zip(self.ks, self.recommended, strict=True))
        return {f"{name}@{k}": metric(counts) for k, counts in counted for name, metric in metrics.OVERALL.items()}


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


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def is_member(keys: np.ndarray, sorted_keys: np.ndarray) -> np.ndarray:
    """Bool of the shape of `keys`: which of them are among `sorted_keys`."""
    if not len(sorted_keys):
        return np.zeros(keys.shape, dtype=bool)
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return sorted_keys[place] == keys
